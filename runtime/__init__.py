"""Text to motion: sampling, the decode loops, and the engine that ties the models together."""

if __name__ != "kinetok.runtime":
    raise ImportError("import kinetok.runtime, not the bare folder runtime: an operator would be registered twice")

from kinetok.runtime.engine import Engine, load
from kinetok.runtime.generate import generate_tokens
from kinetok.runtime.sampling import SamplingParams

__all__ = ["Engine", "SamplingParams", "generate_tokens", "load"]
