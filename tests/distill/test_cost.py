"""The estimate against what a tiny run really holds and computes."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pydit
from pydit import PruningPlan, UserError
from pydit.cli import main
from pydit.distill import DistillConfig, Stage, distill
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


PPCL = PruningPlan.preset("ppcl-qwen-image-12b")
BLOCK, OTHER = 339_831_296, 40_523_328  # parameters of Qwen-Image's blocks and of the rest, by hand
ACTIVATIONS = (6889 + 512) * 3072 * 2  # of a sample at one boundary, in bfloat16
FORWARD = 2 * (12 * 7401 + 12) * 3072**2 + 4 * 7401**2 * 3072  # FLOPs of a block: 12 d^2 a token, 6 d^2 a modulation
BOUNDARIES = 19  # starts and ends of the published intervals, of which seven fall together


def items(**fields):
    """(device items, host items, disk, seconds of the layer phase) of a run on the published sizes, a batch of 8."""
    options = {name: fields.pop(name) for name in ("processes",) if name in fields}
    found = estimate(PPCL, None, DistillConfig(**{"layers_steps": 6000, **fields}), batch_size=8, **options)
    assert f"{sum(found.memory.values()) / 1e9:.1f} GB" in found.describe()
    return found.memory, list(found.host.values()), list(found.disk.values()), found.seconds["layers"]


def one(memory, start):
    return next(size for name, size in memory.items() if name.startswith(start))


def test_published_size_by_hand():
    memory, host, disk, seconds = items()
    assert memory["teacher's weights"] == 2 * (60 * BLOCK + OTHER) and memory["student's weights"] == 2 * (
        35 * BLOCK + OTHER)
    # In bfloat16: gradient, master, two moments, average. The step's gradients in float32 outweigh the activations.
    assert one(memory, "gradients, optimiser, average") == (2 + 4 + 8 + 4) * 13 * BLOCK
    assert memory["gradients in float32 while the optimiser steps"] == 4 * 13 * BLOCK > 34 * 8 * ACTIVATIONS
    assert memory["teacher's activations at the boundaries of one batch"] == 8 * BOUNDARIES * ACTIVATIONS
    assert (host, disk) == ([], []) and len([size for size in memory.values() if size]) == 5
    assert seconds == pytest.approx(6000 * 8 * (58 + 3 * 13) * FORWARD / (0.4 * 989e12), rel=1e-12)


def test_sharded_streamed_eight_bit_and_kept_by_hand():
    memory, _, _, seconds = items(shard="all", processes=8)
    assert memory["teacher's weights, sharded over 8"] == 2 * (60 * BLOCK + OTHER) // 8
    assert memory["student's weights, sharded over 8"] == 2 * (35 * BLOCK + OTHER) // 8
    assert one(memory, "gradients, optimiser, average") == 18 * 13 * BLOCK // 8
    assert memory["blocks gathered from all processes"] == 3 * 2 * BLOCK
    assert memory["gradients in float32 while the optimiser steps"] == 4 * 13 * BLOCK // 8
    assert items(shard="all", processes=16)[0]["activations for the backward pass"] == 34 * ACTIVATIONS
    assert seconds == pytest.approx(items()[3] / 8, rel=1e-12)
    memory, *_ = items(shard="student", processes=8)
    assert memory["teacher's weights"] == 2 * (60 * BLOCK + OTHER)
    memory, host, _, _ = items(teacher_memory="streamed")
    assert memory["teacher's weights"] == 2 * (2 * BLOCK + OTHER) and host == [2 * 60 * BLOCK]
    memory, *_ = items(optimizer="adamw8bit")
    assert one(memory, "gradients, optimiser, average") == (2 + 4 + 2 + 4) * 13 * BLOCK + 8 * 13 * BLOCK // 256
    memory, _, disk, seconds = items(cache_batches=500)
    assert memory["teacher's activations of 500 batches, kept"] == 500 * 8 * BOUNDARIES * ACTIVATIONS and disk == []
    kept = items(cache_batches=500, cache_dir="d")
    assert kept[2] == [500 * 8 * BOUNDARIES * ACTIVATIONS] and sum(kept[0].values()) == sum(items()[0].values())
    assert kept[3] == seconds == pytest.approx(8 * (500 * 58 + 6000 * 3 * 13) * FORWARD / (0.4 * 989e12), rel=1e-12)
    memory, _, disk, _ = items(cache_batches=500, cache_dir="d", output_steps=9, output_cache_batches=20)
    assert one(memory, "inputs and teacher's outputs of 20") == 20 * 8 * (6889 * 2 * 64 + 512 * 3584) * 2
    # One block alone has one input and one target; the teacher's layers 0 to 24 run for them.
    memory, _, disk, seconds = items(cache_batches=500, cache_dir="d", intervals=((15, 24),))
    assert one(memory, "gradients, optimiser, average") == 18 * BLOCK and disk == [500 * 8 * 2 * ACTIVATIONS]
    assert seconds == pytest.approx(8 * (500 * 25 + 6000 * 3) * FORWARD / (0.4 * 989e12), rel=1e-12)


def test_a_schedule_is_the_sum_of_its_stages():
    later = dataclasses.replace(PLAN, intervals=[(1, 3), (4, 6)])
    alone = dataclasses.replace(SETTINGS, layers_steps=5, cache_batches=2, cache_dir="d")
    both = of(dataclasses.replace(alone, schedule=(Stage(later, 5),)))
    first, second = of(alone), of(alone, plan=later)
    assert both.seconds["layers"] == first.seconds["layers"] + second.seconds["layers"] > first.seconds["layers"]
    assert sum(both.disk.values()) == sum(first.disk.values()) + sum(second.disk.values())
    assert both.memory == max(first.memory, second.memory, key=lambda memory: sum(memory.values()))


def test_text_linear_blocks_need_their_anchors():
    """Their teacher's modulated text comes from the anchor's own boundaries: 1 and 2 for blocks 2 and 3, beside 3, 4."""
    plan = PruningPlan("qwen-image", 8, text_linear=[(1, 3)])
    memory = of(SETTINGS, plan=plan).memory["teacher's activations at the boundaries of one batch"]
    assert memory == 4 * 2 * (16 + 7) * 4 * dict(tiny.transformer(8).config)["attention_head_dim"] * dict(
        tiny.transformer(8).config)["num_attention_heads"]


def test_published_size_and_command_line(capfd):
    found = estimate(PruningPlan.preset("ppcl-qwen-image-12b"), None, DistillConfig(layers_steps=6000))
    assert found.memory["teacher's weights"] == 2 * 20_430_401_088
    assert "13 trained" not in found.describe() and "4,417,806,848 trained parameters" in found.describe()
    assert main(["distill", "qwen-image", "ppcl-qwen-image-12b", "--steps", "6000", "--dtype", "bfloat16",
                 "--estimate"]) == 0
    assert "predicted at 40 % of an H200's peak, not measured" in capfd.readouterr().out
    assert main(["distill", "qwen-image", "ppcl-qwen-image-12b", "--steps", "6000", "--dtype", "bfloat16", "--batch-size",
                 "8", "--estimate", "--cache-batches", "500", "--cache-dir", "nowhere", "--json"]) == 0
    assert list(json.loads(capfd.readouterr().out)["disk_bytes"].values()) == [500 * 8 * BOUNDARIES * ACTIVATIONS]
    with pytest.raises(UserError, match="expected num_layers 8 as in the plan, got 60"):
        estimate(PLAN, None, SETTINGS)
    assert main(["distill", "qwen-image", "nothing", "--estimate"]) == 2
    assert "student: expected the directory of a pruned pipeline, a plan file or a preset (ppcl-" in capfd.readouterr().err
