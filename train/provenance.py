"""Where a result comes from: the commit and the machine."""

import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The short commit of this checkout, with ``-changed`` where tracked files differ; "unknown" outside of one."""
    try:
        runs = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return runs[0].stdout.strip() + ("-changed" if runs[1].stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, threads and versions; figures depend on them in the last digits only, times much more."""
    import numpy as np
    import torch

    return {
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
