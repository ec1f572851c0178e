"""benchmarks/run_gpu.sh and runtime/run_cpu.sh: what they would run, in which order, and each ``kinetok bench`` of theirs at a
tiny size."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import goals
import pytest

from kinetok.cli import main
from kinetok.model.config import DecoderConfig, TokenizerConfig
from kinetok.runtime.bench import figures, record, subject, tokenizer

FOLDER = Path(__file__).parents[2] / "benchmarks"
GPU, CPU = FOLDER / "run_gpu.sh", FOLDER / "runtime" / "run_cpu.sh"
STUB = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exit "${NO_GPU:-0}"; fi
printf '%s\\n' "$*" >>"$CALLS"
if [[ "$*" == *"${BREAKS:-nothing}"* ]]; then exit 3; fi
"""
TINY = {
    **{"--tokens": "20", "--seconds": "1.2", "--text": "5", "--characters": "2", "--steps": "4"},
    **{"--batch": "1,2", "--positions": "30,60", "--device": "cpu"},
}


def run(tmp_path: Path, script: Path = GPU, **environment: str) -> tuple[int, list[str], str]:
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls.write_text("")
    surroundings = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "CALLS": str(calls), "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", str(script)], env={**surroundings, **environment}, capture_output=True, text=True, timeout=60
    )
    return done.returncode, calls.read_text().splitlines(), done.stdout + done.stderr


def test_correctness_first_and_parts(tmp_path) -> None:
    code, calls, said = run(tmp_path)
    assert code == 0, said
    assert "check_gpu.py" in calls[0] and "check_fused.py" in calls[1]
    first = next(at for at, call in enumerate(calls) if "bench_" in call or "kinetok bench" in call)
    assert "bench decode" in calls[first] and not any("check_" in call or "-m pytest" in call for call in calls[first:])
    code, only, said = run(tmp_path, PARTS="runtime")
    assert code == 0 and only == [call for call in calls if "kinetok bench" in call], said


def test_failures_and_limits_are_told(tmp_path) -> None:
    code, calls, said = run(tmp_path, PARTS="runtime", BREAKS="int8")
    assert code == 1 and "FAILED: decode_7B_int8" in said and len(calls) > 8
    code, calls, said = run(tmp_path, LIMIT="5")
    assert code == 0 and calls == [] and "no time left" in said
    code, calls, said = run(tmp_path, NO_GPU="1")
    assert code == 2 and calls == [] and "no torch that finds a CUDA GPU" in said


@pytest.fixture
def tiny(monkeypatch) -> None:
    for module in (figures, record):
        for name in ("copy_bandwidth", "read_bandwidth", "matmul_rate"):
            monkeypatch.setattr(module, name, lambda *_: 1e10)
    small = DecoderConfig(n_layer=1, n_head=2, n_embd=128, codebook=240, text_dim=8, block_size=96)
    monkeypatch.setattr(subject, "decoder_preset", lambda name: small)
    sizes = {"nb_code": 256, "code_dim": 8, "width": 8, "depth": 1}
    for module in (subject, tokenizer):
        monkeypatch.setattr(module, "TokenizerConfig", partial(TokenizerConfig, **sizes))


@pytest.fixture
def measured(monkeypatch):
    """Run a script's own command line, with the sizes alone made tiny; its report."""

    def call(line: str, *more: str) -> dict:
        arguments = line.split()[2:]  # after -m kinetok
        path = Path(arguments[arguments.index("--json") + 1])
        for at, word in enumerate(arguments[:-1]):
            arguments[at + 1] = TINY.get(word, arguments[at + 1])
        monkeypatch.setattr(sys, "argv", ["kinetok", *arguments, "--threads", "1", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, line
        found = record.read(path)
        assert found["rows"], line
        return {path.name: found}

    return call


def test_every_gpu_benchmark_runs_and_serves_the_goals(tmp_path, tiny, measured) -> None:
    """On the definitions of the fused kernels."""
    reports = {}
    for call in run(tmp_path, PARTS="runtime")[1]:
        made = measured(call, "--backend", "fused")
        reports |= made
        for found in made.values():
            # As a GPU would have written it.
            found["machine"] |= {"device": "NVIDIA H100", "compute_capability": "9.0"}
            for row in found["rows"]:
                if row["kind"] == "decode":
                    row["tokens"] = 150
                if row["kind"] == "step":
                    row["batch"], row["context"] = (64, 170) if "170" in call else (1, 5 * row["context"])
    for where, what, _, figures_, _ in goals.table(reports):
        # The graph is the one peer that a CPU lacks.
        known = figures_.replace(f" / {goals.NOTHING}", "") if "graph" in what else figures_
        assert where == "CPU" or goals.NOTHING not in known, (what, figures_)


def test_every_cpu_benchmark_runs(tmp_path, tiny, measured) -> None:
    code, calls, said = run(tmp_path, CPU, NOTE="idle")
    assert code == 0, said
    *benches, last = calls
    assert "bench_default.py" in last and len(benches) == 7
    for call in benches:
        measured(call.replace(",compile", ""))  # which takes its time: tests/runtime/test_bench.py
    code, calls, said = run(tmp_path, CPU, BREAKS="crowd", PRESET="44M")
    assert code == 1 and "FAILED: crowd" in said and len(calls) == 8 and "decode_44M_cpu.json" in calls[0]
