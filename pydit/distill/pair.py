"""Teacher and student of a run: do they belong together, and how both are set up and left."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from pydit.distill import distributed
from pydit.distill.config import DistillConfig
from pydit.errors import UserError
from pydit.inference import schedule


def require_pair(teacher: nn.Module, student: nn.Module, config: DistillConfig) -> None:
    """Raise UserError when ``student`` is not a pruned model of ``teacher`` that ``config`` can train."""
    if not hasattr(student, "plan") or not hasattr(student, "replaced"):
        raise UserError(f"student: expected a model made by pydit.prune, got {type(student).__name__}")
    if not student.replaced:
        raise UserError("student: expected a plan that replaces at least one block, got one that replaces nothing")
    student.plan.require_match(teacher)
    for name, model in (("teacher", teacher), ("student", student)):
        if schedule.is_baked(model):
            raise UserError(f"{name}: expected one with its modulation weights, got a baked schedule; pydit.restore it "
                            "before distilling")
        if getattr(model, "is_cache_enabled", False):
            raise UserError(f"{name}: expected a model that computes every block, got one with a block cache; "
                            "disable_cache before distilling")
    if getattr(student, "peft_config", None):
        raise UserError("student: expected plain weights, got a model with LoRA layers; fuse or unload them first")
    unknown = {tuple(pair) for pair in config.intervals or ()} - {entry[1:] for entry in student.replaced}
    if unknown:
        raise UserError(f"intervals: expected some of {[entry[1:] for entry in student.replaced]}, "
                        f"got {sorted(unknown)}")
    ours, theirs = next(student.parameters()), next(teacher.parameters())
    if config.teacher_memory == "streamed":
        if theirs.device.type != "cpu":
            raise UserError("teacher: expected it on the CPU, because teacher_memory is 'streamed', "
                            f"got {theirs.device}")
        if ours.dtype != theirs.dtype:
            raise UserError(f"student: expected the teacher's dtype {theirs.dtype}, got {ours.dtype}")
    elif (ours.device, ours.dtype) != (theirs.device, theirs.dtype):
        raise UserError(f"student: expected the teacher's device and dtype ({theirs.device}, {theirs.dtype}), "
                        f"got {ours.device}, {ours.dtype}")
    if ours.dtype == torch.float16:
        warnings.warn("student: gradients in float16 below 6e-8 are 0, as the loss is not scaled; bfloat16 and float32 "
                      "keep them", UserWarning, stacklevel=4)
    if config.output_steps != 0 and config.output_trainable == "all":
        shared = {distributed.local(p).data_ptr() for p in teacher.parameters()} - {0}  # 0: a part without rows
        for name, p in student.named_parameters():
            if distributed.local(p).data_ptr() in shared:
                raise UserError("student: expected weights of its own, because output_trainable is 'all', "
                                f"got {name} shared with the teacher")


@contextmanager
def prepared(teacher: nn.Module, student: nn.Module, config: DistillConfig) -> Iterator[None]:
    """Freeze both models, route the student through its own blocks, and put everything back afterwards."""
    parameters = [(p, p.requires_grad) for model in (teacher, student) for p in model.parameters()]
    modes = [(module, module.training) for model in (teacher, student) for module in model.modules()]
    active, checkpointing = list(student.active), student.is_gradient_checkpointing
    try:
        teacher.eval().requires_grad_(False)
        student.train().requires_grad_(False)
        student.set_active(student.plan.units)
        if config.gradient_checkpointing and not checkpointing:
            student.enable_gradient_checkpointing()
        with torch.enable_grad():
            yield
    finally:
        for p, flag in parameters:
            p.requires_grad_(flag)
        for p in student.parameters():
            p.grad = None
        for module, mode in modes:
            module.training = mode
        student.set_active(active)
        if config.gradient_checkpointing and not checkpointing:
            student.disable_gradient_checkpointing()


@torch.no_grad()
def merge(student: nn.Module, parts: Mapping[tuple[int, int], nn.Module]) -> nn.Module:
    """Put blocks that were trained apart (``DistillConfig.intervals``) into one student, in place; returns it.

    Parameters
    ----------
    student : made by ``pydit.prune``.
    parts : (first layer, last layer) of a block -> a student of the same plan in which it was trained.

    Raises
    ------
    UserError
        A student that is not pruned, parts that are no such mapping, a part of another plan or whose blocks began as
        others, or a pair that the plan does not have.
    """
    if not hasattr(student, "replaced"):
        raise UserError(f"student: expected a model made by pydit.prune, got {type(student).__name__}")
    if not isinstance(parts, Mapping):
        raise UserError(f"parts: expected a dict of (first layer, last layer) and student, got {type(parts).__name__}")
    place = {entry[1:]: entry[0] for entry in student.replaced}
    for pair, part in parts.items():
        if tuple(pair) not in place:
            raise UserError(f"parts: expected some of {sorted(place)}, got {tuple(pair)}")
        if getattr(part, "plan", None) != student.plan:
            raise UserError(f"parts: expected students of the same plan, got another for {tuple(pair)}")
        if part.init != student.init:
            raise UserError(f"parts: expected students whose blocks began as {student.init!r}, got {part.init!r} for "
                            f"{tuple(pair)}")
    for pair, part in parts.items():
        index = place[tuple(pair)]
        student.own_blocks[index].load_state_dict(part.own_blocks[index].state_dict())
    return student


def trained_apart(student: nn.Module, untrained: Mapping[str, torch.Tensor], part: nn.Module) -> list[tuple[int, int]]:
    """(first layer, last layer) of the blocks of ``part`` that differ from an untrained student's weights.

    Raises
    ------
    UserError
        A part of another plan, or with other weights outside the blocks that the plan replaces.
    """
    if getattr(part, "plan", None) != student.plan:
        raise UserError("merge: expected students of one plan, got another")
    if part.init != student.init:
        raise UserError(f"merge: expected students whose blocks began as {student.init!r}, got {part.init!r}")
    block_of = {id(p): entry[1:] for entry in part.replaced for p in part.own_blocks[entry[0]].parameters()}
    found = set()
    for name, p in part.named_parameters():
        if torch.equal(p, untrained[name]):
            continue
        if id(p) not in block_of:
            raise UserError(f"merge: expected weights outside the new blocks to be the student's, got {name} changed, "
                            "which a part trained with --intervals does not do")
        found.add(block_of[id(p)])
    return sorted(found)


def digest(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A fingerprint that tells models apart without reading all weights: names, shapes and eight values of each.

    dtype : in which the values are looked at, so that a model has one fingerprint whichever it was loaded in; None
        tells models of different dtypes apart too.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        first = distributed.whole(p.detach())
        values = first.flatten()[:8].to(dtype).double().tolist()
        digest.update(f"{name} {tuple(p.shape)} {dtype or p.dtype} {values}\n".encode())
    return digest.hexdigest()
