"""Processes of tests, forked from a server that has imported everything: once for a worker's tests, not for each process."""

import multiprocessing

import torch


def context():
    """Of multiprocessing. The server has what the heaviest of them need."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.distill.ranks", "tests.distill.crash", "tests.inference.test_parallel"])
    return made


def together(target, count, *args, seconds=300):
    """``target(rank, *args)`` in so many processes at once, each with one thread; all must end well, and in time."""
    processes = [context().Process(target=_alone, args=(target, rank, *args)) for rank in range(count)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
            assert process.exitcode == 0, f"{process.name}: {process.exitcode}; standard error has its traceback"
    finally:
        for process in processes:  # the others wait for one that failed
            process.kill()


def _alone(target, *args):
    torch.set_num_threads(1)
    target(*args)
