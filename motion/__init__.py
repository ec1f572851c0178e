"""Human motion on the SMPL-22 skeleton: 272 features, quality measures, files and pictures."""

if __name__ != "kinetok.motion":
    raise ImportError("import kinetok.motion, not the bare folder motion: an operator would be registered twice")

from kinetok.motion.motion import Motion

__all__ = ["Motion"]
