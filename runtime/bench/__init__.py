"""Measuring: what a machine can do, what the models do on it, and whether two result files differ.

Benchmarks inside the package, so that ``kinetok bench`` and ``kinetok doctor`` work from an installed copy;
``benchmarks/`` holds suites and committed results.
"""
