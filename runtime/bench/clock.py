"""Times, percentiles, and the limits of a device: what it copies, reads and multiplies in a second."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

CPU_FLUSH = 128 << 20  # bytes; four times the last-level cache of the machines this runs on


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Seconds of one call at a time, caches flushed before it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else CPU_FLUSH // 2
        self.flush = torch.empty(2 * cache_bytes, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], Any]) -> float:
        self.flush.fill_(1)
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def all(self, calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
        """Times of each call, taken in turns so that a drift meets all of them, in about ``seconds`` a call."""
        for call in calls.values():
            for _ in range(2):
                call()
        longest = max(self.once(call) for call in calls.values())
        repeats = min(200, max(5, round(seconds / max(longest, 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(repeats):
            for name in order:
                times[name].append(self.once(calls[name]))
            order.append(order.pop(0))  # a busy neighbour must not always meet the same route
        return times


class Marks:
    """Moments of one run, in seconds from its start; on a GPU they are events, so that marking does not wait."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize(device)
        self._at: list[Any] = []
        self()

    def __call__(self) -> None:
        if not self.cuda:
            self._at.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._at.append(event)

    def seconds(self) -> list[float]:
        """From the start to each mark."""
        first, *rest = self._at
        if not self.cuda:
            return [at - first for at in rest]
        torch.cuda.synchronize()
        return [first.elapsed_time(at) / 1e3 for at in rest]


def spread(name: str, milliseconds: Sequence[float]) -> dict[str, float]:
    """mean, median, std, p50, p95 and p99 under vLLM's names: ``mean_<name>_ms`` and so on."""
    cuts = statistics.quantiles(milliseconds, n=100, method="inclusive") if len(milliseconds) > 1 else []
    one = milliseconds[0]
    return {
        f"mean_{name}_ms": statistics.fmean(milliseconds),
        f"median_{name}_ms": statistics.median(milliseconds),
        f"std_{name}_ms": statistics.pstdev(milliseconds),
        f"p50_{name}_ms": statistics.median(milliseconds),
        f"p95_{name}_ms": cuts[94] if cuts else one,
        f"p99_{name}_ms": cuts[98] if cuts else one,
    }


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of a large copy on ``device``."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (256 << 20), dtype=torch.int8, device=device).fill_(3)
    target = torch.empty_like(source)
    times = Clock(device).all({"copy": lambda: target.copy_(source)}, 0.5)["copy"]
    return 2 * source.nbytes / statistics.median(times)


@cache
def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large sum reads on ``device``, with torch's threads: the limit of a decode step's weights."""
    source = torch.ones((1 << 28) if device.type == "cuda" else (64 << 20), device=device)
    times = Clock(device).all({"read": lambda: source.sum()}, 0.5)["read"]
    return source.nbytes / statistics.median(times)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point (int8: integer) operations a second of a large square product on random numbers."""
    side = 8192 if device.type == "cuda" else 1024
    if dtype == torch.int8:
        a, b = (torch.randint(-99, 99, (side, side), device=device, dtype=dtype) for _ in range(2))
        product = lambda: torch._int_mm(a, b.T)  # noqa: E731
    else:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = lambda: a @ b.T  # noqa: E731
    return 2 * side**3 / statistics.median(Clock(device).all({"product": product}, 0.5)["product"])


def release(device: torch.device) -> None:
    """Give back what nobody holds any more, on a GPU what torch's allocator keeps for later too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Memory:
    """Peak and present bytes from its making on: of torch's allocator on a GPU, of the process on Linux, else None.

    before: what ``added`` counts from, None for what is there now.
    """

    def __init__(self, device: torch.device, before: int | None = None) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        else:
            # The process's own high-water mark starts anew; where it cannot, the peak includes what went before.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
        self.before = before if before is not None else self.read()["steady_memory_bytes"] or 0

    def read(self) -> dict[str, int | None]:
        if self.cuda:
            return {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "steady_memory_bytes": torch.cuda.memory_allocated(),
            }
        status = Path("/proc/self/status")
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}

        def size(name: str) -> int | None:
            return int(lines[name].split()[0]) * 1024 if name in lines else None

        return {"peak_memory_bytes": size("VmHWM"), "steady_memory_bytes": size("VmRSS")}

    def added(self, common: int) -> dict[str, int | None]:
        """What came on top since then, and ``common`` bytes that were there before and are used as well."""
        return {
            name: None if value is None else max(0, value - self.before) + common for name, value in self.read().items()
        }
