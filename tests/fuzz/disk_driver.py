"""Runs one command over and over in forked processes; each meets a full disk or a kill at another change of the disk.

Started with ``disk.c`` preloaded: ``python -m tests.fuzz.disk_driver FOLDER COMMAND:SHARE[:FIRST] ...``; SHARE: one in so
many changes, and one of every kind; 1: all; FIRST: only from this change on, to go on with a run that was broken off. One
JSON line per run tells how it ended and what lay in the output then: what was
there before, what the command writes, or something else. What did not end well is run once more, to see that it then does.
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
from PIL import Image

import pydit.cli.demo
import pydit.cli.distill
import pydit.cli.model
import pydit.cli.options
import pydit.reporting.analysis_page
from pydit import files
from pydit.cli import main
from pydit.data import build_cache
from pydit.data.cache import read_index
from pydit.distill import checkpoint
from pydit.errors import FormatError
from pydit.inference.pipeline import content_hash, load_pipeline, save_pipeline
from pydit.plan import PruningPlan

IN_PLACE = ("images", "generate")  # directories that grow file by file, in their place
RESUMED = ("eval", "generate")  # run again with --resume, whether they say so or not
MODES = {"count": 1, "again": 1, "full": 2, "kill": 3}
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
    before, after, further = folder / "before.json", folder / "after.json", folder / "further.json"
    stats, measured = folder / "stats.safetensors", folder / "measured.safetensors"
    out = str(work / "out")
    return {
        "plan": (["plan", "--show", after, "--out", out], ["plan", "--show", before, "--out", out]),
        "prune": (["prune", teacher, "--plan", after, "--out", out], ["prune", teacher, "--plan", before, "--out", out]),
        "save": (lambda: save_pipeline(pipeline(teacher, "teacher"), out), ["prune", teacher, "--plan", before, "--out", out]),
        "analyze": (["analyze", teacher, *TRAIN, "--batches", 4, "--save-every", 2, "--tokens", 4, "--out", out],
                    lambda: shutil.copy(stats, out)),
        "distill": (["distill", teacher, folder / "student", *TRAIN, "--steps", 2, "--save-every", 1, "--out", out],
                    ["prune", teacher, "--plan", before, "--out", out]),
        "then": (["distill", teacher, folder / "student", *TRAIN, "--steps", 1, "--then", f"{further}:1:1", "--save-every", 1,
                  "--out", out], ["prune", teacher, "--plan", before, "--out", out]),
        "report": (["plan", measured, "--report", out], lambda: Path(out).write_text("<!doctype html>an earlier page")),
        "eval": (["eval", teacher, "--prompts", 7, "--batch", 4, "--steps", 1, "--out", out],
                 lambda: Path(out).write_text('{"format": "pydit-eval"}')),
        "generate": (["generate", teacher, "a red circle", "a blue ring", "--steps", 1, "--dataset", "--out", out],
                     lambda: None),
        "images": (lambda: build_cache(pipeline(teacher, "teacher"), folder / "images", out, resolution=48, shard_size=2,
                                       progress=False), lambda: None)}


def prepare(folder):
    """What the commands read: a pipeline of few blocks, two plans, a student."""
    from pydit.demo.teacher import build_untrained

    build_untrained(folder / "teacher", num_layers=3)
    PruningPlan.from_intervals(3, [(0, 1)]).save(folder / "before.json")
    PruningPlan.from_intervals(3, [(1, 2)]).save(folder / "after.json")
    PruningPlan.from_intervals(3, [(0, 2)]).save(folder / "further.json")
    (folder / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (48, 48), (80 * number, 0, 0)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a red circle")
    files.save_safetensors(folder / "stats.safetensors", {}, {"format": "pydit-activation-stats"})
    for command in (["prune", folder / "teacher", "--plan", folder / "after.json", "--out", folder / "student"],
                    ["analyze", folder / "teacher", *TRAIN, "--batches", 4, "--tokens", 8,
                     "--out", folder / "measured.safetensors"],
                    ["plan", folder / "measured.safetensors", "--report", folder / "report.html"]):
        assert run(command)[0] == 0


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
    """A hash of what a file or directory holds, None if there is none."""
    if not path.exists() or path.is_dir():
        return content_hash(path) if path.exists() else None
    if path.read_bytes()[:1] == b"{":  # the verdicts of an evaluation, but for how long it took
        return hash(json.dumps(files.read_json(path, what="output") | {"seconds": 0}))
    try:
        tensors, metadata = files.load_safetensors(path, what="output")  # whose order in the file is left to chance
    except FormatError:
        return hash(path.read_bytes())
    return hash((*sorted(metadata.items()), *((name, tensors[name].numpy().tobytes()) for name in sorted(tensors))))


def unfinished(directory, whole):
    """Whether the next run finishes it: ``whole`` images (name -> content) as far as they go, or a cache's shards."""
    if whole:
        return all(path.name.endswith(".part") if path.is_dir() else path.read_bytes() == whole.get(path.name)
                   for path in directory.iterdir())
    cache = directory
    if not (cache / "index.json").exists():
        return files.is_unused(cache)
    return not read_index(cache)["complete"] or bool(list(cache.glob("shard-*.json")))


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


def attempt(shim, command, work, mode, at=0):
    """Run the command in a forked process; a dict of what came of it, with the changes it made if it ended."""
    told = work.parent / "told.json"
    told.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            shim.disk_arm(os.fsencode(f"{work}/"), MODES[mode], at)
            code, err = run(command)
            found = {"code": code, "err": err, "bytes": shim.disk_bytes(), "changes": [
                shim.disk_name(number).decode() for number in range(1, shim.disk_changes() + 1)]}
            shim.disk_arm(b"", 0, 0)
            told.write_text(json.dumps(found))
        except BaseException:
            shim.disk_arm(b"", 0, 0)
            told.write_text(json.dumps({"code": -1, "err": traceback.format_exc(), "changes": []}))
        finally:
            os._exit(0)
    _, status = os.waitpid(process, 0)
    found = {"code": None, "err": "", "changes": []} if os.WIFSIGNALED(status) else json.loads(told.read_text())
    return found | {"at": at, "mode": mode, "killed": os.WIFSIGNALED(status)}


def sample(changes, share):
    """(mode, number of a change), one in ``share`` of all that there are, the middle one of every kind among them."""
    places = {number for number in range(1 + share // 2, len(changes) + 1, share)}
    for kind in set(changes) if share > 1 else ():
        numbers = [number for number, name in enumerate(changes, 1) if name == kind]
        places.add(numbers[len(numbers) // 2])
    return [(mode, number) for i, number in enumerate(sorted(places)) for mode in ("full", "kill")
            if share == 1 or i % 2 == (mode == "kill")]


def drive(shim, folder, name, share, first=1):
    work, kept = folder / "work", folder / "kept"
    command, earlier = commands(folder)[name]
    for path in (work, kept):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    earlier() if callable(earlier) else run(earlier)
    shutil.copytree(work, kept, dirs_exist_ok=True)
    before = state(work / "out")
    whole = attempt(shim, command, work, "count")
    after = state(work / "out")
    states = {after: "after", before: "before"}
    images = {path.name: path.read_bytes() for path in work.glob("out/*.*")} if name == "generate" else None

    def tell(found):
        found["state"] = states.get(state(work / "out"), "other")
        if name in IN_PLACE and found["state"] == "other" and unfinished(work / "out", images):
            found["state"] = "unfinished"
        found["left"] = sorted(path.name for path in (*work.iterdir(), *work.glob("out/.*.part")) if path.name != "out")
        print(json.dumps(found | {"command": name}), flush=True)

    size = sum(path.stat().st_size for path in [work / "out", *work.rglob("out/**/*")] if path.is_file())
    tell(whole | {"size": size})
    for mode, at in sample(whole["changes"], share):
        if at < first:
            continue
        shutil.rmtree(work)
        shutil.copytree(kept, work)
        found = attempt(shim, command, work, mode, at)
        tell(found | {"checkpoint": checkpoint_problem(work / "out.checkpoint")})
        if found["code"] != 0:  # with room, and nobody who kills it
            again = attempt(shim, [*command, "--resume"] if name in RESUMED else command, work, "again")
            if "--resume" in again["err"] and again["code"] == 2:
                again = attempt(shim, [*command, "--resume"], work, "again")
            tell(again | {"after": mode, "at": at})


def load(path, arguments, transformer=True, shard=False):
    """In the place of the commands' own: every process would load the same pipelines again."""
    return pipeline(path, "teacher" if transformer else "frozen")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shim = ctypes.CDLL(None)
    shim.disk_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long]
    shim.disk_changes.restype = shim.disk_bytes.restype = ctypes.c_long
    shim.disk_name.restype, shim.disk_name.argtypes = ctypes.c_char_p, [ctypes.c_long]
    folder = Path(sys.argv[1])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(folder)
        for path in ("teacher", "student"):
            load(folder / path, None)
    for module in (pydit.cli.options, pydit.cli.model, pydit.cli.distill, pydit.cli.demo):
        module.load = load
    pydit.reporting.analysis_page._png = lambda figure: b"drawn in a second, in memory"
    for job in sys.argv[2:]:
        name, *numbers = job.split(":")
        drive(shim, folder, name, *map(int, numbers))
