"""Two processes take the steps of one: on batches of their own, on rows of common ones, whole and sharded, resumed."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pydit import files
from pydit.distill import DistillConfig, checkpoint, distill, distributed, full_weights
from tests import processes
from tests.distill import tiny

CONFIG = DistillConfig(layers_steps=2, layers_lr=1e-3, output_steps=None, output_lr=1e-3, max_minutes=1e-9, log_every=1)
STEPS = dataclasses.replace(CONFIG, output_steps=2, max_minutes=None, output_trainable="all", boundary_weight=0.1,
                            flow_weight=0.1)
NEIGHBOURS = ((1, 2), (3, 4))  # as in published plans: blocks that follow one another run alone, then in their model
RUNS = {  # name -> settings; all of them split batches of three rows with padded text, one row to two
    "whole": {},
    "student": {"shard": "student", "muon_lr": 0.01, "gradient_checkpointing": True},
    "all": {"shard": "all", "magnitude": 0.1},
}


class Stop(Exception):
    pass


def part(rows):
    """The stream with only some rows of every batch."""
    def batches(start):
        for batch, target in tiny.stream(start, padding=False):
            cut = {name: value[rows] if isinstance(value, (torch.Tensor, list)) else value
                   for name, value in batch.items()}
            yield cut, target[rows]
    return batches


def three(start=0):
    return tiny.stream(start, size=3)


def stopping(at):
    def batches(start):
        for number, item in enumerate(three(start), start):
            if number == at:
                raise Stop
            yield item
    return batches


def copies(out):
    """What is left by a run that stopped: as it is, with its last checkpoint damaged, and with a write cut off."""
    run = Path(out) / "run"
    assert json.loads((run / checkpoint.INDEX).read_text())["tensors"] == "state-output-00000001"
    for name in ("one", "damaged"):
        shutil.copytree(run, Path(out) / name)
    shard = next((Path(out) / "damaged" / "state-output-00000001").iterdir())
    data = bytearray(shard.read_bytes())
    data[-100] ^= 4
    shard.write_bytes(data)
    half = run / ".state-output-00000002.part"
    half.mkdir()
    (half / shard.name).write_bytes(b"\x10" * 500)


def numbers(result):
    return {"losses": [row["loss"] for row in result.history], "norms": [row["gradient_norm"] for row in result.history],
            "resumed": result.resumed_from}


def program(rank, out, port):
    """What one of two processes runs, as torchrun would start it."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_RUN_ID="none")
    assert distributed.start("cpu") == "cpu" and (distributed.world_size(), distributed.rank()) == (2, rank)

    def pair():
        teacher, student = tiny.make_pair(NEIGHBOURS)
        if rank:  # starts elsewhere; the main process's weights win
            with torch.no_grad():
                student.transformer_blocks[1].img_mlp.net[2].weight += 1
        return teacher, student

    def keep(name, result, student):
        weights = full_weights(student)
        assert bool(weights) == (rank == 0)
        if rank == 0:
            files.save_safetensors(f"{out}/{name}.safetensors", weights)
            files.write_json(f"{out}/{name}.json", numbers(result))

    teacher, student = pair()
    keep("own", distill(teacher, student, part(slice(rank, rank + 1)), STEPS, progress=False), student)
    spent = distill(teacher, student, part(slice(0, 1)), CONFIG, progress=False)
    assert spent.steps == {"layers": 0, "output": 0}
    for name, fields in RUNS.items():
        config = dataclasses.replace(STEPS, split_batches=True, **fields)
        if name == "all":
            config = dataclasses.replace(config, checkpoint_dir=f"{out}/run", save_every=1)
            with contextlib.suppress(Stop):
                distill(*pair(), stopping(3), config, progress=False)
            dist.barrier()
            if rank == 0:
                copies(out)
            dist.barrier()
            config = dataclasses.replace(config, resume=True)
        teacher, student = pair()
        result = distill(teacher, student, three, config, progress=False)
        keep(name, result, student)
        sharded = [type(p).__name__ == "DTensor" for p in student.parameters()]
        assert all(sharded) if "shard" in fields else not any(sharded)
        assert type(next(teacher.parameters())).__name__ == ("DTensor" if name == "all" else "Parameter")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with what two processes made of each run."""
    out = tmp_path_factory.mktemp("two")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes.together(program, 2, str(out), port)
    return out


def require_equal_steps(out, name, student, result):
    """Losses and norms equal within rounding, and weights: AdamW makes a step of +-lr of a gradient near 0 by its sign,
    so those are compared with the distance travelled."""
    found = files.read_json(out / f"{name}.json", what="numbers")
    expected = numbers(result)
    for key in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), rtol=1e-4, atol=1e-6)
    weights, _ = files.load_safetensors(out / f"{name}.safetensors", what="weights")
    start = tiny.weights(tiny.make_pair(NEIGHBOURS)[1])
    moved = torch.cat([(p.detach() - start[key]).flatten() for key, p in student.named_parameters()]).norm()
    apart = torch.cat([(p.detach() - weights[key]).flatten() for key, p in student.named_parameters()]).norm()
    assert apart < 0.01 * moved
    return found


@pytest.mark.slow
def test_batches_of_their_own(two):
    teacher, student = tiny.make_pair(NEIGHBOURS)
    result = distill(teacher, student, part(slice(0, 2)), STEPS, progress=False)
    require_equal_steps(two, "own", student, result)


@pytest.mark.parametrize("name", RUNS)
def test_rows_of_common_batches_whole_and_sharded(two, name):
    """The run "all" was also stopped after a step of the second phase and resumed by two processes."""
    teacher, student = tiny.make_pair(NEIGHBOURS)
    fields = {key: value for key, value in RUNS[name].items() if key != "shard"}
    result = distill(teacher, student, three, dataclasses.replace(STEPS, split_batches=True, **fields), progress=False)
    found = require_equal_steps(two, name, student, result)
    assert found["resumed"] == (["output", 1] if name == "all" else None)


def test_what_two_saved_one_resumes(two):
    config = dataclasses.replace(STEPS, split_batches=True, magnitude=0.1, checkpoint_dir=two / "one", save_every=1,
                                 resume=True)
    teacher, student = tiny.make_pair(NEIGHBOURS)
    result = distill(teacher, student, three, config, progress=False)
    assert result.resumed_from == ("output", 1)
    found = require_equal_steps(two, "all", student, result)
    assert len(found["losses"]) == len(result.history) == 4
    assert (two / "one" / "state-done-00000000.safetensors").is_file()  # one process has no shards to write


def test_damaged_shards_are_passed_over(two):
    """And what a killed write left is removed by the next one that is whole."""
    config = dataclasses.replace(STEPS, split_batches=True, magnitude=0.1, checkpoint_dir=two / "damaged", resume=True)
    with pytest.warns(UserWarning, match="its checksum is another.*going on from the checkpoint before, step 0 of"):
        result = distill(*tiny.make_pair(NEIGHBOURS), three, config, progress=False)
    assert result.resumed_from == ("output", 0)
    assert not list((two / "run").glob(".*")) and (two / "run" / "state-done-00000000").is_dir()
