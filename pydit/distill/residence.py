"""Where the teacher's blocks are while it runs: all on the device, or there one after the other.

A streamed teacher stays in host memory (page-locked for a GPU). Before a block runs its weights are copied to the
device, those of the block after it meanwhile by a stream of its own, and dropped behind it. The copies are exact, so
what the teacher computes is too; its memory on the device is that of ``AHEAD + 1`` blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from pydit.distill.config import DistillConfig
from pydit.models.adapter import ModelAdapter

AHEAD = 1  # blocks that are fetched before they run


class StreamedBlocks:
    """Streams blocks to a device for as long as it is entered.

    Parameters
    ----------
    blocks : in the order in which a forward runs them, in host memory; frozen.
    device : where they run.

    Attributes
    ----------
    resident : the blocks that are on the device now. most : the most that ever were.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks, self.device = list(blocks), device
        self.resident: dict[int, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self.most = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: dict[int, torch.cuda.Event] = {}
        self._handles: list = []

    def __enter__(self) -> StreamedBlocks:
        for index, block in enumerate(self.blocks):
            if self._stream is not None:
                for p in block.parameters():
                    p.data = p.data.pin_memory()
            block.streamed = self, index
            self._handles += [
                block.register_forward_pre_hook(lambda module, args, index=index: self.enter(index)),
                block.register_forward_hook(lambda module, args, output, index=index: self.leave(index))]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for index in list(self.resident):
            self.leave(index)
        for block in self.blocks:
            del block.streamed

    def enter(self, index: int) -> None:
        """Have a block on the device, and the next one on its way."""
        for other in [k for k in self.resident if not index <= k <= index + AHEAD]:
            self.leave(other)  # fetched for a forward that ended before it
        for k in range(index, min(index + AHEAD + 1, len(self.blocks))):
            if k not in self.resident:
                self._fetch(k)
        if (ready := self._ready.get(index)) is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)

    def leave(self, index: int) -> None:
        """Drop a block from the device."""
        for parameter, home in self.resident.pop(index, ()):
            if self._stream is not None:
                parameter.data.record_stream(torch.cuda.current_stream(self.device))
            parameter.data = home
        self._ready.pop(index, None)

    def _fetch(self, index: int) -> None:
        homes = [(p, p.data) for p in self.blocks[index].parameters()]
        if self._stream is None:
            for p, home in homes:
                p.data = home.to(self.device, copy=True)
        else:
            with torch.cuda.stream(self._stream):
                for p, home in homes:
                    p.data = home.to(self.device, non_blocking=True)
                self._ready[index] = self._stream.record_event()
        self.resident[index] = homes
        self.most = max(self.most, len(self.resident))


@contextmanager
def teacher_blocks(teacher: nn.Module, adapter: ModelAdapter, config: DistillConfig, device: torch.device
                   ) -> Iterator[None]:
    """Stream the teacher's blocks to ``device`` inside, if ``config`` says so; what else it has is there meanwhile."""
    if config.teacher_memory == "resident":
        yield
        return
    others = [child for name, child in teacher.named_children() if name not in adapter.block_lists]
    try:
        for child in others:
            child.to(device)
        with StreamedBlocks(adapter.blocks(teacher), device):
            yield
    finally:
        for child in others:
            child.to("cpu")


@contextmanager
def called_in_parts(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Have blocks of the teacher, streamed or sharded, whole on the device while their parts are called."""
    with ExitStack() as stack:
        for block in blocks:
            if hasattr(block, "streamed"):
                streamed, index = block.streamed
                streamed.enter(index)
                stack.callback(streamed.leave, index)
            elif hasattr(block, "unshard"):
                block.unshard()
                stack.callback(block.reshard)
        yield
