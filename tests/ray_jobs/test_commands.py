"""Jobs as commands: `ray job submit ray_jobs/train.py` runs the file itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ray_jobs

ROOT = Path(ray_jobs.__file__).parents[1]
JOBS = sorted(file for file in (ROOT / "ray_jobs").glob("*.py") if '__name__ == "__main__"' in file.read_text())


def test_there_are_ten_jobs() -> None:
    names = {file.stem for file in JOBS}
    assert names == {
        "check_base", "compare", "evaluate", "graft", "label", "localize", "locatability", "map_rows", "prepare", "train",
    }  # fmt: skip


@pytest.mark.parametrize("job", JOBS, ids=lambda file: file.stem)
def test_a_job_can_be_run_as_a_file(job: Path) -> None:
    assert job.read_text().startswith("#!/usr/bin/env python\n")
    assert os.access(job, os.X_OK)


def test_the_main_job_shows_its_flags() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "ray_jobs" / "train.py", "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert {"--config", "--set", "--redo", "--system", "--evaluate", "--dry-run", "--photos"} <= set(
        shown.replace(",", " ").split()
    )
