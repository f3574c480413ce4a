"""What a phase learns from, batch by batch: seen freshly every step, or kept and gone through again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from pydit.distill.phases import Phase
from pydit.distill.stream import Batch, BatchStream


class Store(Protocol):
    """Where numbered observations are kept.

    held : how many, from number 0 on, are there already when a run begins.
    """

    held: int

    def require_same(self, number: int, batch: Batch) -> None:
        """Raise UserError unless observation ``number``, one of those held, was made of this batch."""

    def put(self, number: int, batch: Batch, observation: Any) -> None:
        """Keep an observation, which was made of ``batch``."""

    def get(self, number: int) -> Any:
        """An observation that is kept."""


class MemoryStore:
    """Keeps observations where they were made; they are gone with the process."""

    held = 0

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}

    def require_same(self, number: int, batch: Batch) -> None:
        pass

    def put(self, number: int, batch: Batch, observation: Any) -> None:
        self._kept[number] = observation

    def get(self, number: int) -> Any:
        return self._kept[number]


class Observations:
    """Numbered observations of the teacher.

    Without a cache, observation k is made of the k-th batch that the stream delivers. With a cache of ``size``, the
    first ``size`` are kept and step k >= size gets one of them again, every pass in an order of its own that depends
    on the number of the pass only. That spares the teacher's forward pass, the larger part of a layer step.

    Parameters
    ----------
    open_stream : from how many batches behind its place a resumed phase needs the stream, the stream.
    store : where observations are kept; what it holds already is not observed again.
    size : 0 is no cache.
    step : steps already taken. A resumed phase observes again what it kept and the store has lost; of what the store
        still has it draws the last batch again, to see that the stream is the same.
    """

    def __init__(self, phase: Phase, open_stream: Callable[[int], BatchStream], store: Store, size: int,
                 step: int) -> None:
        self._phase, self._store, self._size = phase, store, size
        kept = min(step, size)
        first = min(store.held, max(0, kept - 1))
        self._stream = open_stream(kept - first)
        for number in range(first, kept):
            self._first(number)

    def get(self, step: int) -> Any:
        """What step ``step`` (0, 1, ...) learns from; steps must be asked for in order."""
        if not self._size:
            return self._phase.observe(self._stream.next())
        number, position = divmod(step, self._size)
        if number == 0:
            return self._first(step)
        order = torch.randperm(self._size, generator=torch.Generator().manual_seed(number))
        return self._store.get(int(order[position]))

    def _first(self, number: int) -> Any:
        """An observation of the first pass, of the next batch of the stream."""
        batch = self._stream.next()
        if number < self._store.held:
            self._store.require_same(number, batch)
            return self._store.get(number)
        observation = self._phase.observe(batch)
        self._store.put(number, batch, observation)
        return observation
