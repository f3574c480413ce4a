"""The batches of a run as one numbered stream that a resumed run can enter anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from pydit.errors import UserError
from pydit.models.adapter import STREAMS, ModelAdapter

Batches = Iterable[Any] | Callable[[int], Iterator[Any]]


class Batch(NamedTuple):
    """What one process trains on in a step.

    inputs : forward arguments. target : the true velocity, or None.
    weights : by stream, what makes the mean over this process's tokens its part of the mean over those of all
        processes, which is what the average over processes then is; None is 1.
    """

    inputs: dict[str, Any]
    target: torch.Tensor | None
    weights: dict[str, float] | None = None


class Drawn:
    """An iterator that can be gone through once, and how many items it has given: a later stage steps over the rest."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self.drawn = items, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        self.drawn += 1
        return item


class BatchStream:
    """Batches from number ``start`` on, on a device, with their targets.

    Parameters
    ----------
    batches
        An iterable, or a function ``start -> iterator`` that begins at batch ``start``. A resumed run asks the
        function for its place and steps over the batches of an iterable one by one. An iterable that is not an
        iterator (a list, say) starts over at its end. An item is a dict of forward arguments or a pair
        ``(dict, target)``.
    start : number of the first batch to deliver.
    part : (number of this process, processes) that share every batch row by row; None: a batch is this process's own.
    together : rows that belong to one process, as the pairs of ``DistillConfig.guidance`` do.
    model : one of those that the batches are for; None looks at none of their arguments.

    Attributes
    ----------
    delivered : int
        Number of the next batch.
    """

    def __init__(self, batches: Batches, start: int, adapter: ModelAdapter, device: torch.device,
                 part: tuple[int, int] | None = None, together: int = 1, model: nn.Module | None = None) -> None:
        self._adapter, self._device, self._part, self._together = adapter, device, part, together
        self.delivered, self._model = start, model
        self._again = None
        if callable(batches):
            self._iterator = iter(batches(start))
            return
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
            raise UserError("batches: expected an iterable of batches or a function start -> iterator, "
                            f"got {type(batches).__name__}")
        self._iterator = iter(batches)
        self._again = None if self._iterator is batches else batches
        for number in range(getattr(batches, "drawn", 0), start):
            self._advance(number)

    def next(self) -> Batch:
        """The next batch; UserError when there is none."""
        item = self._advance(self.delivered)
        target = None
        if isinstance(item, (tuple, list)) and len(item) == 2:
            item, target = item
        if not isinstance(item, Mapping) or not (target is None or isinstance(target, torch.Tensor)):
            raise UserError("batches: expected dicts of forward arguments or (dict, tensor) pairs, "
                            f"got {_describe(item, target)} as batch {self.delivered}")
        batch = {name: value for name, value in item.items() if name != "return_dict"}
        if self._model is not None:
            self._adapter.require_inputs(self._model, batch, f"batch {self.delivered}")
        self.delivered += 1
        weights = None
        if self._part is not None:
            batch, target, weights = self._own_rows(batch, target)
        batch = {name: self._place(value) for name, value in batch.items()}
        return Batch(self._without_padding(batch), self._place(target), weights)

    def _own_rows(self, batch: dict[str, Any], target: torch.Tensor | None) -> Batch:
        """This process's rows. One that gets none takes the first with weight 0: it has a part in every collective."""
        number, processes = self._part
        rows, together = len(batch[self._adapter.block_io.image]), self._together
        if rows % together:  # on every process, so that none waits for the others
            raise UserError("batches: expected an even number of rows, pairs of one state with a prompt and with the "
                            f"negative prompt, because guidance is set, got {rows} rows")
        units = rows // together
        own = slice(number * units // processes * together, (number + 1) * units // processes * together)
        count = own.stop - own.start
        weights = dict.fromkeys(STREAMS, count * processes / rows)
        mask = self._adapter.text_mask(batch)
        if mask is not None:
            weights["text"] = int(mask[own].sum()) * processes / max(1, int(mask.sum()))
        if not count:
            own = slice(0, together)
        # Positions of tokens (FLUX.1) are common to all rows.
        cut = {name: value[own] if _length(value) == rows and not name.endswith("_ids") else value
               for name, value in batch.items()}
        return Batch(cut, None if target is None else target[own], weights)

    def _advance(self, number: int) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            if self._again is not None:
                self._iterator = iter(self._again)
                for item in self._iterator:
                    return item
            raise UserError(f"batches: expected more than {number} batches, got {number}") from None

    def _place(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def _without_padding(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Zero the padded text tokens: attention weighs them by 0, and 0 * NaN would be NaN."""
        mask, name = self._adapter.text_mask(batch), self._adapter.block_io.text
        text = batch.get(name)
        if mask is not None and isinstance(text, torch.Tensor) and mask.shape == text.shape[:2]:
            batch[name] = text.where(mask.to(torch.bool).unsqueeze(-1), text.new_zeros(()))
        return batch


def _length(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, list) else None


def _describe(item: Any, target: Any) -> str:
    if isinstance(item, Mapping):
        return f"a dict with a {type(target).__name__}"
    return f"an item of type {type(item).__name__}"
