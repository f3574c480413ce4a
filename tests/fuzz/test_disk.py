"""A full disk and a kill at every change of the disk that a command makes: what was there before stays, or the new is whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
STEPS = {"plan": 1, "prune": 23, "save": 45, "analyze": 7, "distill": 70}  # of the profile ci; nightly takes them all


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What came of every run, as tests.fuzz.disk_driver prints it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    folder = tmp_path_factory.mktemp("disk")
    shim = folder / "disk.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, Path(__file__).with_name("disk.c"), "-ldl"], check=True)
    jobs = [f"{name}:{1 if settings().max_examples > 100 else step}" for name, step in STEPS.items()]
    done = subprocess.run([sys.executable, "-m", "tests.fuzz.disk_driver", folder, *jobs], cwd=ROOT, text=True,
                          capture_output=True, check=False,
                          env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_command_was_met(runs):
    for name in STEPS:
        mine = [run for run in runs if run["command"] == name]
        assert {run["mode"] for run in mine} == {"full", "kill"}
        assert {run["state"] for run in mine if run["mode"] == "kill"} <= {"before", "after"}
    assert {run["state"] for run in runs} == {"before", "after"}


def test_a_full_disk_keeps_what_was_there_and_says_what_to_do(runs):
    for run in (run for run in runs if run["mode"] == "full"):
        assert not run["killed"] and (run["code"], run["state"]) in ((2, "before"), (0, "after")), run
        assert run["checkpoint"] is None and not [name for name in run["left"] if name.endswith(".part")], run
        assert run["code"] == 0 or ("No space left on device" in run["err"] and "Traceback" not in run["err"]), run
        if run["code"] == 2 and run["command"] != "save":  # a function, whose caller says what to do
            assert run["err"].splitlines()[-1].startswith("pydit: error: ") and "make room" in run["err"], run


def test_a_kill_leaves_the_old_or_the_new(runs):
    for run in (run for run in runs if run["mode"] == "kill"):
        assert run["killed"] and run["state"] in ("before", "after") and run["checkpoint"] is None, run
        assert run.get("code after", 0) == 0 and run.get("left after", []) == [], run
