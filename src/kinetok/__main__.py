"""``python -m kinetok``."""

from kinetok.cli import main

main()
