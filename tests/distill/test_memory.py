"""A streamed teacher computes what a resident one does; 8-bit moments are chosen, refused and resumed."""

import dataclasses
import sys
import types

import pytest
import torch

from pydit import PruningPlan, UserError, prune
from pydit.distill import DistillConfig, distill, residence
from pydit.distill.optimizer import Optimizer
from tests.distill import tiny

CONFIG = DistillConfig(layers_steps=2, layers_lr=1e-3, output_steps=2, output_lr=1e-3, boundary_weight=0.1,
                       linear_weight=1.0, log_every=1)
PLAN = PruningPlan("qwen-image", 6, [(4, 5)], text_linear=[(1, 3)], linear_ffn=[2], linear_text_ffn=[0, 4])


def trained(**fields):
    teacher = tiny.make_teacher()
    with pytest.warns(UserWarning, match="identity"):
        student = prune(teacher, PLAN)
    before, storages = tiny.weights(teacher), [p.data_ptr() for p in teacher.parameters()]
    result = distill(teacher, student, tiny.stream, dataclasses.replace(CONFIG, **fields), progress=False)
    assert not tiny.changed(before, teacher) and storages == [p.data_ptr() for p in teacher.parameters()]
    return [row["loss"] for row in result.history], tiny.weights(student)


def test_a_streamed_teacher_is_the_teacher(monkeypatch):
    """Bit for bit, with text-linear blocks that call parts of the teacher's; two of its six blocks at a time."""
    made = []

    class Watched(residence.StreamedBlocks):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            self.fetched = []

        def _fetch(self, index):
            self.fetched.append(index)
            super()._fetch(index)

    monkeypatch.setattr(residence, "StreamedBlocks", Watched)
    (losses, weights), (expected, resident) = trained(teacher_memory="streamed"), trained()
    assert losses == expected and all(torch.equal(weights[name], resident[name]) for name in resident)
    (streamed,) = made
    assert streamed.most == residence.AHEAD + 1 == 2 and streamed.resident == {}
    assert streamed.fetched[:6] == [0, 1, 2, 3, 4, 5] and set(streamed.fetched) == set(range(6))
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in streamed.blocks)


def test_only_a_teacher_on_the_cpu_is_streamed():
    teacher, student = tiny.make_pair()
    with pytest.raises(UserError, match="teacher: expected it on the CPU, because teacher_memory is 'streamed', got me"):
        distill(teacher.to("meta"), student, tiny.stream, dataclasses.replace(CONFIG, teacher_memory="streamed"))


class AdamW8bit(torch.optim.AdamW):
    """Stands for a library's: its moments have names of their own."""

    def __init__(self, groups, lr, betas, eps):
        super().__init__(groups, lr=lr, betas=betas, eps=eps)

    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if state:
                state["exp_avg"], state["exp_avg_sq"] = state.pop("state1"), state.pop("state2")
        super().step()
        for state in self.state.values():
            state["state1"], state["state2"] = state.pop("exp_avg"), state.pop("exp_avg_sq")


def test_eight_bit_moments_need_a_library(monkeypatch):
    for name in ("bitsandbytes.optim", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="optimizer: expected bitsandbytes or torchao to be installed for 'adamw8bit'"):
        Optimizer({"g": {"w": torch.nn.Parameter(torch.ones(2, 2))}}, DistillConfig(optimizer="adamw8bit"))


@pytest.mark.parametrize("library", ["bitsandbytes.optim", "torchao.optim"])
def test_eight_bit_moments_are_the_librarys_and_resumed(monkeypatch, library):
    for name in ("bitsandbytes.optim", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(AdamW8bit=AdamW8bit) if name == library else None)
    config = DistillConfig(optimizer="adamw8bit", weight_decay=0.1)
    found = []
    for stop in (None, 2):
        parameter = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = Optimizer({"g": {"w": parameter}}, config)
        for step in range(4):
            if step == stop:
                state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
                assert {"state1/w", "state2/w"} < set(state)
                parameter = torch.nn.Parameter(torch.zeros(2, 2))
                optimizer = Optimizer({"g": {"w": parameter}}, config)
                optimizer.load_state(state, step)
            parameter.grad = torch.arange(4.0).view(2, 2) - step
            optimizer.step(1e-2, optimizer.gradient_norms())
        assert isinstance(optimizer._adamw, AdamW8bit)
        found.append(parameter.detach())
    assert torch.equal(*found)
