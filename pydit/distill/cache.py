"""What a phase learns from, batch by batch: seen freshly every step, or kept and gone through again."""

from __future__ import annotations

from typing import Any

import torch

from pydit.distill.phases import Phase
from pydit.distill.stream import BatchStream


class Observations:
    """Numbered observations of the teacher.

    Without a cache, observation k is made of the k-th batch that the stream delivers. With a cache of ``size``, the
    first ``size`` are kept and step k >= size gets one of them again, every pass in an order of its own that depends
    on the number of the pass only. That spares the teacher's forward pass, the larger part of a layer step.

    Parameters
    ----------
    size : 0 is no cache.
    step : steps already taken; a resumed phase observes again what its cache held (``stream`` must stand there).
    """

    def __init__(self, phase: Phase, stream: BatchStream, size: int, step: int) -> None:
        self._phase, self._stream, self._size = phase, stream, size
        self._kept = [phase.observe(stream.next()) for _ in range(min(step, size))]

    def get(self, step: int) -> Any:
        """What step ``step`` (0, 1, ...) learns from; steps must be asked for in order."""
        number, position = divmod(step, self._size) if self._size else (0, step)
        if number == 0:
            observation = self._phase.observe(self._stream.next())
            if self._size:
                self._kept.append(observation)
            return observation
        order = torch.randperm(self._size, generator=torch.Generator().manual_seed(number))
        return self._kept[int(order[position])]
