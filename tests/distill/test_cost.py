"""The estimate against what a tiny run really holds and computes."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pydit
from pydit import PruningPlan, UserError
from pydit.cli import main
from pydit.distill import DistillConfig, distill
from pydit.distill.cost import estimate
from pydit.distill.optimizer import Optimizer
from tests.models import tiny

PLAN = PruningPlan("qwen-image", 8, [(1, 2), (4, 6)])
SETTINGS = DistillConfig(layers_steps=1, layers_lr=1e-4, output_steps=0)


def batches(start):
    while True:
        yield tiny.batch(images=2, seed=start, masked=False)
        start += 1


def of(settings, plan=PLAN, **options):
    return estimate(plan, dict(tiny.transformer(8).config), settings, batch_size=2, element_bytes=4, image_tokens=16,
                    text_tokens=7, **options)


@pytest.mark.parametrize("settings", [SETTINGS, dataclasses.replace(SETTINGS, layers_steps=0, output_steps=1)])
def test_work_is_that_of_a_step(settings):
    """A backward pass leaves out what needs no gradient (a block's input), so the estimate is a little more."""
    teacher = tiny.transformer(8)
    student = pydit.prune(teacher, PLAN)
    settings = dataclasses.replace(settings, output_trainable="all")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        distill(teacher, student, batches, settings, progress=False)
    counted = counter.get_total_flops()
    assert counted <= 1.02 * sum(of(settings).flops.values()) and sum(of(settings).flops.values()) <= 1.25 * counted


def test_memory_of_weights_and_optimiser():
    teacher = tiny.transformer(8)
    student = pydit.prune(teacher, PLAN)
    memory = of(SETTINGS).memory
    assert memory["teacher's weights"] == 4 * sum(p.numel() for p in teacher.parameters())
    assert memory["student's weights"] == 4 * sum(p.numel() for p in student.parameters())
    trained = {name: p for block in (1, 3) for name, p in student.transformer_blocks[block].named_parameters(str(block))}
    optimizer = Optimizer({"all": trained}, SETTINGS)
    for p in trained.values():
        p.grad = torch.zeros_like(p)
    held = sum(p.grad.numel() for p in trained.values())
    optimizer.step(1e-4, optimizer.gradient_norms())
    masters = {name for name, _ in trained.items()}
    held += sum(t.numel() for name, t in optimizer.state().items() if name.removeprefix("weight/") not in masters)
    item = next(value for name, value in memory.items() if name.startswith("gradients"))
    assert item == 4 * held


def test_half_precision_has_masters_and_no_average_costs_none():
    full, half = of(SETTINGS), estimate(PLAN, dict(tiny.transformer(8).config), SETTINGS)
    trained = [next(v for k, v in found.memory.items() if k.startswith("gradients")) for found in (full, half)]
    assert trained[1] / trained[0] == 18 / 16
    bare = of(dataclasses.replace(SETTINGS, ema=0.0))
    assert next(v for k, v in bare.memory.items() if k.startswith("gradients")) == trained[0] * 12 / 16


def test_published_size_and_command_line(capfd):
    found = estimate(PruningPlan.preset("ppcl-qwen-image-12b"), None, DistillConfig(layers_steps=6000))
    assert found.memory["teacher's weights"] == 2 * 20_430_401_088
    assert "13 trained" not in found.describe() and "4,417,806,848 trained parameters" in found.describe()
    assert main(["distill", "qwen-image", "ppcl-qwen-image-12b", "--steps", "6000", "--dtype", "bfloat16",
                 "--estimate"]) == 0
    assert "predicted at 40 % of an H200's peak, not measured" in capfd.readouterr().out
    with pytest.raises(UserError, match="expected num_layers 8 as in the plan, got 60"):
        estimate(PLAN, None, SETTINGS)
    assert main(["distill", "qwen-image", "nothing", "--estimate"]) == 2
    assert "preset: expected one of" in capfd.readouterr().err
