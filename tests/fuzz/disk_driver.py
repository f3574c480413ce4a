"""Runs one command over and over in forked processes; each meets a full disk or a kill at another change of the disk.

Started with ``disk.c`` preloaded: ``python -m tests.fuzz.disk_driver FOLDER COMMAND:STEP ...``; STEP: every so many changes.
One JSON line per run tells how it ended and what lay in the output then: what was there before, what the command writes, or
something else.
"""

import contextlib
import ctypes
import functools
import io
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch

import pydit.cli.distill
import pydit.cli.model
import pydit.cli.options
from pydit import files
from pydit.cli import main
from pydit.distill import checkpoint
from pydit.errors import FormatError
from pydit.inference.pipeline import content_hash, load_pipeline, save_pipeline
from pydit.plan import PruningPlan

MODES = {"count": 1, "full": 2, "kill": 3}
TRAIN = ("--prompts", "demo", "--batch-size", "1")


@functools.cache
def pipeline(path, name):
    """A loaded pipeline; every forked process has a copy. ``name`` tells a teacher from a student of the same path."""
    pipe = load_pipeline(path, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def commands(folder):
    """command -> (what runs it, what prepares an earlier output); the output is ``folder/work/out``."""
    teacher, work = folder / "teacher", folder / "work"
    before, after, stats = folder / "before.json", folder / "after.json", folder / "stats.safetensors"
    out = str(work / "out")
    return {
        "plan": (["plan", "--show", after, "--out", out], ["plan", "--show", before, "--out", out]),
        "prune": (["prune", teacher, "--plan", after, "--out", out], ["prune", teacher, "--plan", before, "--out", out]),
        "save": (lambda: save_pipeline(pipeline(teacher, "teacher"), out), ["prune", teacher, "--plan", before, "--out", out]),
        "analyze": (["analyze", teacher, *TRAIN, "--batches", 4, "--save-every", 2, "--tokens", 4, "--out", out],
                    lambda: shutil.copy(stats, out)),
        "distill": (["distill", teacher, folder / "student", *TRAIN, "--steps", 2, "--save-every", 1, "--out", out],
                    ["prune", teacher, "--plan", before, "--out", out])}


def prepare(folder):
    """What the commands read: a pipeline of few blocks, two plans, a student."""
    from pydit.demo.teacher import build_untrained

    build_untrained(folder / "teacher", num_layers=3)
    PruningPlan.from_intervals(3, [(0, 1)]).save(folder / "before.json")
    PruningPlan.from_intervals(3, [(1, 2)]).save(folder / "after.json")
    (folder / "stats.safetensors").write_bytes(b"an earlier file of statistics")
    main(["prune", str(folder / "teacher"), "--plan", str(folder / "after.json"), "--out", str(folder / "student")])


def run(command):
    """(exit code, standard error) in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if callable(command):
            try:
                command()
                code = 0
            except OSError as error:
                code, _ = 2, print(error, file=err)
        else:
            code = main([str(part) for part in command])
    return code, err.getvalue()


def state(path):
    """A hash of a file or directory, None if there is none."""
    if not path.exists():
        return None
    return content_hash(path) if path.is_dir() else hash(path.read_bytes())


def checkpoint_problem(directory):
    """None, or why no checkpoint can be read although an index is there."""
    problems = []
    for name in (checkpoint.INDEX, checkpoint.PREVIOUS):
        if (directory / name).exists():
            try:
                checkpoint._read(directory, name, files.read_json(directory / name, what="x")["run"])
                return None
            except FormatError as error:
                problems.append(str(error))
    return problems[0] if problems else None


def attempt(shim, command, work, mode, at):
    """Run the command in a forked process; a dict of what came of it."""
    told = work.parent / "told.json"
    told.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            shim.disk_arm(os.fsencode(f"{work}/"), MODES[mode], at)
            code, err = run(command)
            changes = shim.disk_changes()
            shim.disk_arm(b"", 0, 0)
            told.write_text(json.dumps({"code": code, "err": err, "changes": changes}))
        except BaseException:
            shim.disk_arm(b"", 0, 0)
            told.write_text(json.dumps({"code": -1, "err": traceback.format_exc()}))
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    found = {"code": None, "err": ""} if os.WIFSIGNALED(status) else json.loads(told.read_text())
    return found | {"at": at, "killed": os.WIFSIGNALED(status)}


def drive(shim, folder, name, step):
    work, kept = folder / "work", folder / "kept"
    command, earlier = commands(folder)[name]
    for path in (work, kept):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    earlier() if callable(earlier) else run(earlier)
    shutil.copytree(work, kept, dirs_exist_ok=True)
    before = state(work / "out")
    whole = attempt(shim, command, work, "count", 0)
    assert whole["code"] == 0, whole
    after = state(work / "out")
    for mode, first in (("full", 1), ("kill", 1 + step // 2)):
        for at in range(first, whole["changes"] + 1, step):
            shutil.rmtree(work)
            shutil.copytree(kept, work)
            found = attempt(shim, command, work, mode, at)
            found["state"] = {before: "before", after: "after", None: "none"}.get(state(work / "out"), "other")
            found["left"] = sorted(path.name for path in work.iterdir() if path.name != "out")
            found["checkpoint"] = checkpoint_problem(work / "out.checkpoint")
            if found["left"] and name == "prune":  # the next run removes what a killed one left
                found["code after"] = attempt(shim, command, work, "count", 0)["code"]
                found["left after"] = sorted(path.name for path in work.iterdir() if path.name != "out")
            print(json.dumps(found | {"command": name, "mode": mode, "changes": whole["changes"]}), flush=True)


def load(path, arguments, transformer=True, shard=False):
    """In the place of the commands' own: every process would load the same pipelines again."""
    return pipeline(path, "teacher" if transformer else "frozen")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shim = ctypes.CDLL(None)
    shim.disk_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long]
    shim.disk_changes.restype = ctypes.c_long
    folder = Path(sys.argv[1])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(folder)
        for path in ("teacher", "student"):
            load(folder / path, None)
    for module in (pydit.cli.options, pydit.cli.model, pydit.cli.distill):
        module.load = load
    for job in sys.argv[2:]:
        name, _, step = job.partition(":")
        drive(shim, folder, name, int(step))
