"""Every Triton kernel on this GPU against its reference: ``python benchmarks/kernels/check_gpu.py --json FILE``.

Runs the tests of tests/kernels that launch kernels, a process a family at the same time, since most of the time goes to
compiling. Needs pytest; tests that need hypothesis are skipped where it is not installed, and counted as skipped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FAMILIES = {path.stem.removeprefix("test_"): path for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))}


class Outcomes:
    """The pytest plugin of one family: keeps the tests that launch kernels, writes outcomes as they come."""

    def __init__(self, report: Path) -> None:
        self.report = report
        self.found: dict[str, Any] = {"wanted": 0, "passed": 0, "failed": 0, "skipped": 0, "failures": []}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if "launcher" in item.fixturenames]
        self.found["wanted"] = len(items)
        self.write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self.found[report.outcome] += 1
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.found["failures"].append({"test": report.nodeid, "why": str(crash or report.longrepr)[:400]})
            self.write()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found["failed"] += 1
            self.found["failures"].append({"test": report.nodeid, "why": str(report.longrepr)[-400:]})
            self.write()

    def write(self) -> None:
        self.report.write_text(json.dumps(self.found))


def _stand_in_for_hypothesis() -> None:
    """Let test files that import hypothesis load without it; what it would draw inputs for is skipped."""
    import pytest

    module, strategies = types.ModuleType("hypothesis"), types.ModuleType("hypothesis.strategies")
    skip = pytest.mark.skip(reason="hypothesis is not installed")

    def given(*_: Any, **__: Any) -> Any:
        return skip

    anything = type("Anything", (), {"__getattr__": lambda self, _: self, "__call__": lambda self, *_, **__: self})()
    module.given, module.assume, module.strategies = given, anything, strategies  # type: ignore[attr-defined]
    module.settings = lambda *_, **__: lambda function: function  # type: ignore[attr-defined]

    def drawn(name: str) -> Any:
        if name.startswith("__"):  # whoever walks over the loaded modules asks for their files
            raise AttributeError(name)
        return anything

    strategies.__getattr__ = drawn  # type: ignore[method-assign]
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": strategies}


def run_family(name: str, report: Path) -> int:
    import pytest

    try:
        import hypothesis  # noqa: F401
    except ImportError:
        _stand_in_for_hypothesis()
    return int(pytest.main([str(FAMILIES[name]), "-q", "-p", "no:cacheprovider", "--tb=short"], [Outcomes(report)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=150, help="stop what has not ended by then")
    parser.add_argument("--family", choices=FAMILIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.family:
        sys.exit(run_family(options.family, options.json))
    import torch

    sys.path.append(str(ROOT / "src"))
    from kinetok.runtime.bench.machine import machine

    if not torch.cuda.is_available():
        print("check_gpu.py: torch finds no CUDA GPU; nothing was checked", file=sys.stderr)
        sys.exit(2)
    about = machine(torch.device("cuda"))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    reports = {name: options.json.with_name(f".{options.json.stem}-{name}.json") for name in FAMILIES}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    running = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--family", name, "--json", str(report)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for name, report in reports.items()
    }
    families: dict[str, Any] = {}
    while running:
        for name, process in list(running.items()):
            late = time.monotonic() - began > options.seconds
            if process.poll() is None and not late:
                continue
            process.kill()
            process.wait()
            del running[name]
            found = json.loads(reports[name].read_text()) if reports[name].exists() else {"failed": 0}
            if not late and process.returncode not in (0, 1, 5):  # 5: a family without kernels has no such tests
                found["failed"] += 1
                found.setdefault("failures", []).append(
                    {"test": name, "why": f"pytest ended with {process.returncode}"}
                )
            reports[name].unlink(missing_ok=True)
            families[name] = {**found, "ended": not late, "seconds": round(time.monotonic() - began, 1)}
            print(name, {key: value for key, value in families[name].items() if key != "failures"}, flush=True)
            for failure in found.get("failures", []):
                print("  FAILED", failure["test"], failure["why"].splitlines()[0] if failure["why"] else "")
            options.json.write_text(json.dumps({"machine": about, "families": families}, indent=1) + "\n")
        time.sleep(0.2)
    sys.exit(any(found["failed"] for found in families.values()))


if __name__ == "__main__":
    main()
