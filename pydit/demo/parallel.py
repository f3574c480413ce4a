"""The demo's distillation in several processes, each with its own batches and gradients averaged.

The demo's matrices are too small for a second thread to pay on a CPU; a second process nearly doubles the rate. The
main process is rank 0. ``python -m pydit.demo.parallel JOB.json RANK`` is one of the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pydit.demo import data
from pydit.distill import DistillConfig, DistillResult, distill
from pydit.errors import UserError
from pydit.files import read_json, write_json
from pydit.inference.pipeline import load_pipeline
from pydit.plan import PruningPlan
from pydit.pruning import prune

_STARTUP = timedelta(minutes=5)  # a process that has not come by then has died


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(pipe, student, config: DistillConfig, *, folder: Path, work: Path, workers: int,
          batches: dict[str, Any]) -> DistillResult:
    """Distil ``pipe.transformer`` into ``student`` in ``workers`` processes; 1 trains in this process as it is.

    Parameters
    ----------
    pipe : the teacher's pipeline, loaded from ``folder``. student : pruned from its transformer.
    work : directory for the job's description, the processes' meeting point and their logs.
    batches : ``batch_size`` (of each process), ``seed`` and whatever else make_batches takes; ``on_policy`` lets the
        student draw the states.

    Raises
    ------
    UserError
        A process died; the message names its log.
    """
    if workers == 1:
        return _distill(pipe, student, config, batches, rank=0)
    work.mkdir(parents=True, exist_ok=True)
    threads = max(1, available_cores() // workers)
    meeting = work / "meeting"
    meeting.unlink(missing_ok=True)  # of an interrupted run
    job = work / "job.json"
    write_json(job, {"folder": str(folder), "plan": student.plan.to_dict(), "config": _plain(config),
                     "threads": threads, "meeting": str(meeting.resolve()), "workers": workers, "batches": batches})
    processes: dict[int, subprocess.Popen] = {}
    try:
        for rank in range(1, workers):
            with open(work / f"worker{rank}.log", "w") as log:
                processes[rank] = subprocess.Popen([sys.executable, "-m", "pydit.demo.parallel", str(job), str(rank)],
                                                   stdout=log, stderr=log)
        with _joined(meeting, 0, workers, threads):
            result = _distill(pipe, student, config, batches, rank=0)
        for process in processes.values():
            process.wait(timeout=60)
        return result
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        dead = {rank: code for rank, process in processes.items() if (code := _ended(process)) not in (None, 0)}
        if isinstance(error, UserError) or not dead:
            raise
        rank, code = next(iter(dead.items()))
        raise UserError(f"distill: expected {workers} processes to train together, process {rank} ended with code "
                        f"{code}; its output is in {work / f'worker{rank}.log'}") from error
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
        meeting.unlink(missing_ok=True)


def _ended(process: subprocess.Popen) -> int | None:
    """The exit code, given a moment: the connection breaks before the process has gone."""
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return None


def _distill(pipe, student, config: DistillConfig, batches: dict[str, Any], *, rank: int) -> DistillResult:
    own = {**batches, "seed": batches["seed"] + 1000 * rank}
    if own.pop("on_policy", False):
        own["drawn_by"] = student
    return distill(pipe.transformer, student, lambda start: data.make_batches(pipe, start_step=start, **own), config)


@contextmanager
def _joined(meeting: Path, rank: int, workers: int, threads: int) -> Iterator[None]:
    """A member of the process group, with ``threads`` threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=meeting.resolve().as_uri(), rank=rank, world_size=workers,
                            timeout=_STARTUP)
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(before)


def _plain(config: DistillConfig) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def main(arguments: list[str]) -> int:
    """One of the processes that are not the main one."""
    job, rank = read_json(Path(arguments[0]), what="job"), int(arguments[1])
    torch.set_num_threads(job["threads"])
    pipe = load_pipeline(Path(job["folder"]), dtype=torch.float32)
    student = prune(pipe.transformer, PruningPlan.from_dict(job["plan"]))  # the main process sends its weights
    config = DistillConfig(**job["config"])
    with _joined(Path(job["meeting"]), rank, job["workers"], job["threads"]):
        _distill(pipe, student, config, job["batches"], rank=rank)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
