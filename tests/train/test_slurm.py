"""The job script for slurm, with slurm's two commands played by scripts."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="a clip store has a Parquet index, and pyarrow is not installed")
pytest.importorskip("tensorboard", reason="training logs to tensorboard, which is not installed")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "train.sbatch"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="the job script is one of bash, which is not installed")

# Every node's task at once, as srun does with --ntasks-per-node=1; all nodes are this machine.
SRUN = """#!/bin/bash
tasks=()
for _ in $(seq "$SLURM_NNODES"); do "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
"""
# More than a pipe holds: whoever leaves after the first line would end the job by SIGPIPE, as pipefail asks.
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[1-2]" ] && printf 'localhost\\n%.0s' {1..20000}
"""


def test_two_nodes_train_and_a_requeued_job_goes_on(trained_store, tmp_path: Path) -> None:
    """Two processes over gloo, in one torchrun a node; then the same job again, which finds all done."""
    commands = tmp_path / "commands"
    commands.mkdir()
    torchrun = f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", torchrun)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    # Any port will do; another test run on this machine should not have the same.
    slurm["SLURM_JOB_ID"] = str(random.SystemRandom().randrange(10**6))
    environment = {**os.environ, **slurm, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    environment["PATH"] = f"{commands}{os.pathsep}{os.environ['PATH']}"
    words = ["decoder", "--recipe", "smoke", "--steps", "3", "--data", str(trained_store.store)]
    words += ["--tokenizer", str(trained_store.tokenizer), "--out", str(tmp_path / "run")]
    assert BASH is not None
    job = [BASH, str(SCRIPT), *words]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2, 3, 3]
    parts = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-00000003").glob("*.distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}  # of two processes
    again = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "run" / "log.jsonl").read_text() == log


def test_the_page_names_the_script() -> None:
    """Its options are ones that the command has, and a refusal of slurm's own commands ends the job."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    command = re.search(r"sbatch docs/train\.sbatch (decoder .*(?:\\\n.*)*)", page)
    assert command is not None
    from kinetok.cli.training import decoder

    options = {name.replace("_", "-") for name in decoder.__annotations__}
    assert {word.removeprefix("--") for word in command[1].split() if word.startswith("--")} <= options
    assert BASH is not None
    alone = subprocess.run([BASH, str(SCRIPT)], env={"PATH": "/nowhere"}, capture_output=True, text=True)
    assert alone.returncode and "SLURM_JOB_NODELIST" in alone.stderr
