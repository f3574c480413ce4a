"""A list of student blocks that can run the teacher's layers instead, interval by interval."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from pydit.errors import UserError


class TeacherLayers:
    """Teacher layers by index, held by reference and outside any module tree.

    They are no parameters of the student: not saved, moved, trained or copied with it. A deep copy of the student
    shares them too.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self.layers = dict(layers)

    def __deepcopy__(self, memo: dict) -> TeacherLayers:
        return self


class RoutedBlocks(nn.ModuleList):
    """The student's blocks; iterating yields the blocks of the active route.

    Parameters, state dict, length and indexing are those of the student's blocks. A forward pass that loops over the
    list runs, for every interval that is not active, the teacher's own layers in place of the student's block.
    """

    def __init__(self, blocks: Iterable[nn.Module] | None = None, source: Iterable[tuple[int, ...]] = ()) -> None:
        super().__init__(blocks)
        self.source = tuple(tuple(layers) for layers in source)
        self.teacher = TeacherLayers({})
        self.inactive: frozenset[int] = frozenset()  # student blocks whose teacher layers run instead

    def __iter__(self) -> Iterator[nn.Module]:
        if not self.inactive:
            return super().__iter__()
        return iter(self.route())

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)  # nn.ModuleList's iterates, which would show the route

    def route(self) -> list[nn.Module]:
        """The modules that run, in order."""
        modules: list[nn.Module] = []
        for index, block in enumerate(self._modules.values()):
            if index not in self.inactive:
                modules.append(block)
                continue
            layers = [self.teacher.layers[layer] for layer in self.source[index]]
            _require_same_place(block, layers[0])
            modules.extend(layers)
        return modules


def _require_same_place(block: nn.Module, layer: nn.Module) -> None:
    """The teacher's layers are shared, so moving the student leaves them where the teacher is."""
    ours, theirs = next(block.parameters(), None), next(layer.parameters(), None)
    if ours is None or theirs is None:
        return
    if _place(ours) != _place(theirs):
        raise UserError(f"set_active: expected the teacher's layers on {_place(ours)} like the student, got "
                        f"{_place(theirs)}; they are shared with the teacher, so move the teacher too")


def _place(tensor: torch.Tensor) -> str:
    return f"{tensor.device}, {tensor.dtype}"
