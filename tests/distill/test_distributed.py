"""Two processes on half a batch each take the steps of one process on the whole batch."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydit import files
from pydit.distill import DistillConfig, distill
from tests.distill import tiny

CONFIG = DistillConfig(layers_steps=2, layers_lr=1e-3, output_steps=None, output_lr=1e-3, max_minutes=1e-9, log_every=1)
STEPS = dataclasses.replace(CONFIG, output_steps=2, max_minutes=None)

PROGRAM = """
import sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from pydit import files
from pydit.distill import distill
from tests.distill import tiny
from tests.distill.test_distributed import CONFIG, STEPS, part

port, rank, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
teacher, student = tiny.make_pair()
if rank:  # starts elsewhere; the main process's weights win
    with torch.no_grad():
        student.transformer_blocks[1].img_mlp.net[2].weight += 1
result = distill(teacher, student, part(slice(rank, rank + 1)), STEPS, progress=False)
spent = distill(teacher, student, part(slice(0, 1)), CONFIG, progress=False)
assert spent.steps == {"layers": 0, "output": 0}
files.save_safetensors(f"{out}/{rank}.safetensors", tiny.weights(student))
files.write_json(f"{out}/{rank}.json", [row["loss"] for row in result.history])
dist.destroy_process_group()
"""


def part(rows):
    """The stream with only some rows of every batch."""
    def batches(start):
        for batch, target in tiny.stream(start, padding=False):
            cut = {name: value[rows] if isinstance(value, (torch.Tensor, list)) else value
                   for name, value in batch.items()}
            yield cut, target[rows]
    return batches


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(rank), str(tmp_path)], env=environment,
                                  cwd=root) for rank in range(2)]
    try:
        assert [process.wait(timeout=180) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    teacher, student = tiny.make_pair()
    history = distill(teacher, student, part(slice(0, 2)), STEPS, progress=False).history
    (first, _), (second, _) = (files.load_safetensors(tmp_path / f"{rank}.safetensors", what="weights")
                               for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # AdamW turns a gradient near 0 into a step of +-lr by its sign, so compare with the distance travelled.
    start = tiny.weights(tiny.make_pair()[1])
    moved = torch.cat([(p.detach() - start[name]).flatten() for name, p in student.named_parameters()]).norm()
    apart = torch.cat([(p.detach() - first[name]).flatten() for name, p in student.named_parameters()]).norm()
    assert apart < 0.01 * moved
    for rank in range(2):
        losses = files.read_json(tmp_path / f"{rank}.json", what="losses")
        torch.testing.assert_close(torch.tensor(losses), torch.tensor([row["loss"] for row in history]))
