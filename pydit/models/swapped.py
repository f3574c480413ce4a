"""Blocks that :func:`pydit.accelerate` has swapped, as they were made."""

from __future__ import annotations

from torch import nn


def as_made(block: nn.Module) -> nn.Module:
    """Give a copy of a block its own class, and its attention the processors that were there; returns the block."""
    from pydit.models import attention, exact, fused_blocks

    made = {form: stock for forms in (fused_blocks.FUSED, exact.BLOCKS) for stock, form in forms.items()}
    if type(block) not in made:
        return block
    block.__class__ = made[type(block)]
    for name in ("_pydit_target", "_pydit_exact"):
        block.__dict__.pop(name, None)
    exact_processors = {form: stock for stock, form in exact.PROCESSORS.items()}
    for module in block.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, attention.Replacing) and processor.stock is not None:
            module.processor = processor.stock
        elif type(processor) in exact_processors:
            stock = exact_processors[type(processor)]
            module.processor = stock.__new__(stock)
            module.processor.__dict__.update({k: v for k, v in processor.__dict__.items() if k != "exact"})
    return block
