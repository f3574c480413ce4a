"""One or both of two processes are killed; two resume, bit for bit, also what one process had begun."""

import multiprocessing
import shutil
import signal
import time

import pytest
import torch

from pydit import files
from pydit.distill import activations, distill
from tests.distill import ranks, tiny
from tests.distill.test_distributed import numbers, require_equal_steps
from tests.distill.test_resume import Stop

pytestmark = pytest.mark.slow
ACTS = {"one_is_killed": [1], "all_are_killed": [0, 1], "go_on": []}  # and whom the parent kills


def _end(processes, out, killed):
    """Kill these processes where they wait, and wait for the rest to end by themselves."""
    deadline = time.monotonic() + 120
    first = killed[:1] if len(killed) > 1 else killed  # the others wait for it
    while not all((out / f"hanging-{rank}").exists() for rank in first):
        assert all(process.is_alive() for process in processes), "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for rank in killed:
        processes[rank].kill()
    for process in processes:
        process.join(max(1.0, deadline - time.monotonic()))
        assert process.exitcode is not None
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A directory with what two processes made of each run, in three lives.

    In the first one the process that is left has a batch of activations that the other one lacks.
    """
    out = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distill.ranks"])
    begun_by_one(out)
    shutil.copytree(out / "one-then-whole", out / "one-then-sharded")
    for act, killed in ACTS.items():
        processes = [context.Process(target=ranks.live, args=(act, rank, str(out))) for rank in range(2)]
        try:
            for process in processes:
                process.start()
            codes = _end(processes, out, killed)
        finally:
            for process in processes:
                process.kill()
        for rank in killed:
            assert codes[rank] == -signal.SIGKILL
            (out / f"hanging-{rank}").unlink(missing_ok=True)
        assert all(codes[rank] == (ranks.LOST if killed else 0) for rank in range(2) if rank not in killed)
        if act == "one_is_killed":
            mine, other = ([path.name for path in (out / "kept").glob(f"batch-*.{rank}-of-2.safetensors")]
                           for rank in range(2))
            assert (len(mine), len(other)) == (4, 3) and len(list((out / "kept").glob(".batch-*.part"))) == 1
        if act == "all_are_killed":
            assert (out / "sharded" / ".state-output-00000002.part").is_dir()
    return out


def begun_by_one(out):
    """A run of one process that stopped in its second phase."""
    def batches(start):
        for number, item in enumerate(ranks.three(start), start):
            if number == 7:
                raise Stop
            yield item
    with pytest.raises(Stop):
        distill(*tiny.make_pair(), batches, ranks.saved(ranks.STEPS, out, "one-then-whole"), progress=False)


@pytest.mark.parametrize("name, place", [("cached", ["layers", 3]), ("sharded", ["output", 1])])
def test_killed_processes_are_resumed_bit_for_bit(out, name, place):
    """One of two, while the teacher's activations are kept on disk; both, in the write of a sharded checkpoint."""
    found, expected = (files.read_json(out / f"{run}.json", what="test") for run in (name, f"{name}-whole"))
    assert found["resumed"] == place
    assert (found["losses"], found["norms"]) == (expected["losses"], expected["norms"])
    weights, whole = (files.load_safetensors(out / f"{run}.safetensors", what="test")[0] for run in (name, f"{name}-whole"))
    assert set(weights) == set(whole) and all(torch.equal(weights[key], tensor) for key, tensor in whole.items())
    if name == "cached":
        assert len(list((out / "kept").iterdir())) == 2 * 4 + 1 and (out / "kept" / activations.INDEX).is_file()
    assert not [path for path in (out / name).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["one-then-whole", "one-then-sharded"])
def test_what_one_began_two_go_on_with(out, name):
    """From a checkpoint in one file."""
    teacher, student = tiny.make_pair()
    result = distill(teacher, student, ranks.three, ranks.STEPS, progress=False)
    found = require_equal_steps(out, name, student, result)
    assert found["resumed"] == ["output", 1] and len(found["losses"]) == len(numbers(result)["losses"]) == 9
    assert (out / name / "state-done-00000000").is_dir() == (name == "one-then-sharded")
