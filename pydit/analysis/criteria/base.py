"""The two halves of a criterion, the scores between them, and the registry."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from pydit import files
from pydit.analysis.activations import ActivationStats
from pydit.arguments import as_integer, plain, shown
from pydit.errors import FormatError, UserError
from pydit.plan import MAX_LAYERS, PruningPlan

FORMAT = "pydit-scores"
_VERSION = "1"
_CRITERIA: dict[str, type] = {}
BLIND = ("random", "uniform")  # these look at nothing
DEAF = 10.0  # a plan's predicted error of the output, over the least possible, above which its criterion is overruled


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a criterion found, before any decision.

    Attributes
    ----------
    method : name of the criterion.
    family, num_layers : of the model.
    options : the options the scores depend on, JSON-able.
    matrices : name -> float64 tensor; what the names mean is the criterion's to say.
    starts : first layers of the runs of blocks of one class; no interval crosses into one.
    """

    method: str
    family: str
    num_layers: int
    options: dict[str, Any]
    matrices: dict[str, torch.Tensor]
    starts: tuple[int, ...] = (0,)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically."""
        files.save_safetensors(path, self.matrices, {
            "format": FORMAT, "version": _VERSION, "method": self.method, "family": self.family,
            "num_layers": str(self.num_layers), "options": json.dumps(self.options),
            "starts": " ".join(map(str, self.starts))})

    @classmethod
    def is_file(cls, path: str | os.PathLike) -> bool:
        """Whether a safetensors file says that it holds scores. Raises FormatError when it is no such file."""
        _, metadata = files.load_safetensors(path, what="stats", wanted=lambda name: False)
        return metadata.get("format") == FORMAT

    @classmethod
    def load(cls, path: str | os.PathLike) -> Scores:
        """Read a file written by :meth:`save`. Raises FormatError naming the file."""
        matrices, metadata = files.load_safetensors(path, what="scores")
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, _VERSION):
            raise FormatError(f"scores: expected {FORMAT} version {_VERSION} in {path}, "
                              f"got {metadata.get('format')!r} version {metadata.get('version')!r}")
        try:
            scores = cls(metadata["method"], metadata["family"], int(metadata["num_layers"]),
                         json.loads(metadata["options"]), matrices,
                         tuple(map(int, metadata.get("starts", "0").split())))
            scores._require_sound()
        except (KeyError, ValueError, RecursionError) as error:
            raise FormatError(f"scores: expected complete {FORMAT} in {path}, got a file that does not fit "
                              f"({error})") from None
        return scores

    def _require_sound(self) -> None:
        """Raise UserError where entries are missing, of another shape than the criterion reads, or not finite."""
        criterion, layers = _CRITERIA.get(self.method), self.num_layers
        if not 1 <= layers <= MAX_LAYERS:
            raise UserError(f"num_layers: expected 1 to {MAX_LAYERS}, got {layers}")
        if not isinstance(self.options, dict):
            raise UserError(f"options: expected an object, got {type(self.options).__name__}")
        if self.starts[:1] != (0,) or list(self.starts) != sorted({*self.starts} & {*range(layers)}):
            raise UserError(f"starts: expected layers from 0 on, below {layers}, got {list(self.starts)}")
        for name, matrix in self.matrices.items():
            if matrix.dtype != torch.float64 or not bool(torch.isfinite(matrix).all()):
                raise UserError(f"{name}: expected finite float64, got {matrix.dtype} {list(matrix.shape)}")
        for name, (needed, *sizes) in getattr(criterion, "matrices", {}).items():
            shape = [layers if size == "L" else size for size in sizes]
            matrix = self.matrices.get(name)
            if matrix is None and not needed:
                continue
            got = None if matrix is None else list(matrix.shape)
            if got is None or len(got) != len(shape) or not all(
                    one >= -size if size < 0 else one == size for one, size in zip(got, shape, strict=True)):
                expected = ", ".join(f"{-size} or more" if size < 0 else str(size) for size in shape)
                raise UserError(f"{name}: expected [{expected}], got {'none' if got is None else got}")


class Criterion(Protocol):
    """A dataclass of options that scores statistics and selects layers.

    A class attribute ``matrices`` says what a file of its scores holds: name -> (whether it must, then the sizes:
    "L" for the layers, a number, or minus the least number).
    """

    def score(self, stats: ActivationStats) -> Scores: ...

    def select(self, scores: Scores, target: float | int | None) -> PruningPlan: ...


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a criterion available as ``method=name``."""
    def add(criterion: type) -> type:
        _CRITERIA[name] = criterion
        return criterion
    return add


def names() -> tuple[str, ...]:
    """The registered criteria."""
    return tuple(sorted(_CRITERIA))


def get_criterion(method: str, **options: Any) -> Criterion:
    """A criterion by name with its options.

    Raises
    ------
    UserError
        An unknown method or option, or an option value that the criterion refuses.
    """
    if not isinstance(method, str) or method not in _CRITERIA:
        raise UserError(f"method: expected one of {', '.join(names())}, got {shown(method)}")
    known = [field.name for field in dataclasses.fields(_CRITERIA[method])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"{unknown[0]}: no option of method {method!r}; expected one of {', '.join(known)}")
    for field in dataclasses.fields(_CRITERIA[method]):
        if field.name in options:
            _require_kind(field.name, options[field.name], field.default)
    return _CRITERIA[method](**{name: plain(value) for name, value in options.items()})


def _require_kind(name: str, value: Any, default: Any) -> None:
    """UserError for an option that is no number where the default is one; what numbers fit, the criterion knows."""
    whole = as_integer(value)
    number = whole is not None or (isinstance(value, float) and abs(value) <= 1e300)
    if type(default) is int and whole is None:
        raise UserError(f"{name}: expected a whole number, got {shown(value)}")
    if type(default) is int and abs(whole) >= 2**63:
        raise UserError(f"{name}: expected a whole number of less than 64 bits, got {value}")
    if type(default) is float and not (number and abs(value) <= 1e300):
        raise UserError(f"{name}: expected a number, got {shown(value)}")
    if default is None and not (number or value is None or isinstance(value, (list, tuple))):
        raise UserError(f"{name}: expected a number or None, got {shown(value)}")


def removal_target(target: float | int | None, num_layers: int) -> int | None:
    """Layers to remove: an int is that number, a float in (0, 1) a share of the layers, rounded up; None stays None."""
    if target is None:
        return None
    whole = as_integer(target)
    if whole is None and not isinstance(target, float):
        raise UserError(f"target: expected a number of layers or a share between 0 and 1, got {shown(target)}")
    if whole is None:
        if not 0 < target < 1:
            raise UserError("target: expected a share between 0 and 1 (or an integer number of layers), "
                            f"got {target!r}")
        share = float(target) * num_layers  # of numpy's kind too
        whole = int(share) + (share - int(share) > 1e-9)
    if num_layers < 2:
        raise UserError(f"target: expected none, because the model's one layer stays, got {target}")
    if not 1 <= whole < num_layers:
        raise UserError(f"target: expected 1 to {num_layers - 1} removed layers, got {whole}")
    return whole


def removed_layers(plan: PruningPlan) -> set[int]:
    """The layers of a plan that are not the first of their interval."""
    return {layer for start, end in plan.intervals for layer in range(start + 1, end + 1)}


def intervals_without(removed: Iterable[int], num_layers: int) -> list[tuple[int, int]]:
    """Every run of removed layers with the kept layer before it, which stands for them; layer 0 must be kept."""
    gone = set(removed)
    kept = [k for k in range(num_layers) if k not in gone]
    ends = [k - 1 for k in kept[1:]] + [num_layers - 1]
    return [(start, end) for start, end in zip(kept, ends, strict=True) if end > start]
