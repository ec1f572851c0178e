"""kinetok: a sentence to human motion. ``load`` a model, ``Engine.generate`` motion, ``Motion.save`` it."""

from typing import TYPE_CHECKING, Any

from kinetok.errors import UserError

if TYPE_CHECKING:
    from kinetok.motion import Motion
    from kinetok.runtime import Engine, SamplingParams, load

__version__ = "0.1.0"
__all__ = ["Engine", "Motion", "SamplingParams", "UserError", "load"]


def __getattr__(name: str) -> Any:
    # torch takes a second to import, which `kinetok --help` should not pay for.
    if name == "Motion":
        from kinetok.motion import Motion

        return Motion
    if name in ("Engine", "SamplingParams", "load"):
        from kinetok import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'kinetok' has no attribute {name!r}")
