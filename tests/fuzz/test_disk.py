"""A full disk and a kill at every change of the disk that a command makes: what was there before stays, or the new is whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.fuzz.disk_driver import IN_PLACE

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
SHARES = {"plan": 6, "report": 6, "prune": 120, "save": 120, "analyze": 30, "distill": 200, "then": 300, "images": 40, "eval": 10,
          "generate": 20}  # of the profile ci: one change in so many


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What came of every run, as tests.fuzz.disk_driver prints it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    folder = tmp_path_factory.mktemp("disk")
    shim = folder / "disk.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, Path(__file__).with_name("disk.c"), "-ldl"], check=True)
    jobs = [f"{name}:{1 if settings().max_examples > 100 else share}" for name, share in SHARES.items()]
    done = subprocess.run([sys.executable, "-m", "tests.fuzz.disk_driver", folder, *jobs], cwd=ROOT, text=True,
                          capture_output=True, check=False,
                          env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_command_was_met(runs):
    """And nothing was written that the shim did not see, nor any kind of change left out."""
    for name in SHARES:
        mine = [run for run in runs if run["command"] == name]
        whole, met = mine[0], [run for run in mine if run["mode"] in ("full", "kill")]
        assert whole["code"] == 0 and whole["state"] == "after" and whole["bytes"] >= whole["size"] > 0, whole
        assert {run["mode"] for run in met} == {"full", "kill"}
        assert {run["state"] for run in met} <= {"before", "after", *(["unfinished"] if name in IN_PLACE else [])}
        assert {whole["changes"][run["at"] - 1] for run in met} == set(whole["changes"])
        if settings().max_examples > 100:
            assert sorted((run["mode"], run["at"]) for run in met) == [
                (mode, at) for mode in ("full", "kill") for at in range(1, len(whole["changes"]) + 1)]
    assert {run["state"] for run in runs} == {"before", "after", "unfinished"}


def test_a_full_disk_keeps_what_was_there_and_says_what_to_do(runs):
    for run in (run for run in runs if run["mode"] == "full"):
        assert not run["killed"] and (run["code"], run["state"]) in (
            (2, "before"), (2, "unfinished"), (0, "after"), *([(2, "after")] if run["command"] == "generate" else [])), run
        assert run["checkpoint"] is None and not [name for name in run["left"] if name.endswith(".part")], run
        assert run["code"] == 0 or ("work/out" in run["err"] and "No space left on device" in run["err"]
                                    and "Traceback" not in run["err"]), run
        if run["code"] == 2:
            last = run["err"].splitlines()[-1]
            assert re.search(r"make room and (run it again|resume)", last), run
            if run["command"] not in ("save", "images"):  # functions
                assert re.match(r"pydit: error: \S+/work/out[\w./-]*: ", last), run


def test_a_kill_leaves_the_old_or_the_new(runs):
    for run in (run for run in runs if run["mode"] == "kill"):
        assert run["killed"] and run["state"] in ("before", "after", "unfinished") and run["checkpoint"] is None, run


def test_the_next_run_ends_well_and_tidies_up(runs):
    """The same command, with --resume where it says so: what an unbroken run writes, and nothing beside it."""
    again = [run for run in runs if run["mode"] == "again"]
    assert len(again) == len([run for run in runs if run["mode"] in ("full", "kill") and run["code"] != 0])
    for run in again:
        assert (run["code"], run["state"], run["left"]) == (0, "after", []), run
