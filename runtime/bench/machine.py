"""What a result file says about the machine and the software that made it."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve()
GPU_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def gpus() -> list[str]:
    """Name and driver version of each GPU that nvidia-smi reports, whether or not torch can use it."""
    found = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return found.splitlines() if found else []


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    about = {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    query = f"--query-gpu={','.join(GPU_FIELDS)}"
    found = _output("nvidia-smi", query, "--format=csv,noheader", f"--id={properties.uuid}")
    # A container may hide the tool or a field of it; the file then says that nobody could read it.
    values = found.split(", ") if found else []
    return about | dict(zip(GPU_FIELDS, values if len(values) == len(GPU_FIELDS) else [None] * 6, strict=True))


def commit() -> str:
    """The short commit of this checkout, with ``-changed`` where tracked files differ; "unknown" outside of one."""
    # An installed copy may lie inside somebody else's repository, whose commit says nothing about ours.
    if _output("git", "ls-files", "--error-unmatch", HERE.name) is None:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", ":/")
    return f"{_output('git', 'rev-parse', '--short', 'HEAD')}{'-changed' if changed else ''}"


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks as they stand now, versions and commit; None where something cannot be read."""
    triton: str | None
    try:
        import triton as package

        triton = package.__version__
    except ImportError:
        triton = None
    name = commit()
    return {
        **(
            _gpu(torch.cuda.current_device())
            if device.type == "cuda"
            else {"device": cpu_name(), "threads": torch.get_num_threads()}
        ),
        "cpu": cpu_name(),
        # Others' work at the start: figures from a machine with a neighbour at work mean little beyond their ratios.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": None if name == "unknown" else name.removesuffix("-changed"),
        "uncommitted_changes": None if name == "unknown" else name.endswith("-changed"),
    }
