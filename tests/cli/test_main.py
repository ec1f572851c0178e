"""``python -m kinetok`` as a process."""

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def test_files_of_the_current_folder_are_not_imported(tmp_path) -> None:
    (tmp_path / "typer.py").write_text("raise SystemExit(9)")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-m", "kinetok", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "generate" in done.stdout, done
