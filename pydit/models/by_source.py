"""Maps what is addressed by teacher layer, as are LoRA weights, ControlNet residuals and layers to skip, to the blocks
of a pruned model.

Block numbers of a pruned model are not those of its teacher. Loaded by number, the teacher's adapters would silently
land at the wrong depth, and a ControlNet's residuals would be spread over fewer blocks; both follow ``source`` instead.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pydit.errors import UserError
from pydit.models.routing import RoutedBlocks

_LEAF = re.compile(r"\.(lora[_.]\w+|lokr_\w+|alpha|diff|diff_b|weight|bias)(\.|$)")


def chosen_layer(layers: int, init: str) -> int:
    """Which layer of an interval of so many its block begins as a copy of; 0 where it is none of them alone."""
    return {"middle": (layers - 1) // 2, "last": layers - 1}.get(init, 0)


def init_weights(layers: int, init: str) -> list[float]:
    """The share that each layer of an interval has in what its block begins as: one of them all, or an average."""
    if init == "position-average":
        weights = range(layers, 0, -1)
    else:
        weights = [1 if init == "average" or k == chosen_layer(layers, init) else 0 for k in range(layers)]
    return [weight / sum(weights) for weight in weights]


def remap_lora(lists: Mapping[str, RoutedBlocks], state: Mapping[str, Any], *, init: str = "first",
               alphas: Mapping[str, Any] | None = None, made: dict[str, Any] | None = None
               ) -> tuple[dict[str, Any], list[str]]:
    """A LoRA for the teacher -> one for the student.

    A block that stands for several layers takes the adapter of the one whose weights it began with. Where it began as
    their average, which is linear in the weights, it takes the average of their adapters: B A of rank r from each make
    one of the sum of the ranks; adapters that are more than B A have no average and are left out. Of a linear layer
    that was narrowed, the adapter keeps the same rows or columns.

    Parameters
    ----------
    lists : name of a list of blocks -> the student's, first list first.
    state : name -> tensor; names may have any prefix.
    init : how the blocks of intervals began.
    alphas : name of a module, ``.alpha`` at its end -> number, of the same LoRA.
    made : where the alphas of averaged modules go, if there are any at all.

    Returns
    -------
    (renamed, dropped) : what has a place, and the names of what has none: layers that were merged away, modules that
        the plan has removed.
    """
    pattern = re.compile(rf"(^|.*?\.)({'|'.join(lists)})\.(\d+)\.(.+)$")
    renamed, dropped, alphas = {}, [], alphas or {}
    parts: dict[str, list[tuple[float, str]]] = {}  # what a new name is made of
    place = {name: {layer - blocks.source[0][0]: (index, share) for index, layers in enumerate(blocks.source)
                    for layer, share in zip(layers, init_weights(len(layers), init), strict=True)}
             for name, blocks in lists.items() if len(blocks.source)}
    matches = {key: pattern.match(key) for key in state}
    # Modules whose adapter is more than B A, with a magnitude (DoRA) or a bias: there is no average of these.
    beyond = {_module_of(match) for match in matches.values() if match and not match[4].endswith((*_PAIR, ".alpha"))}
    for key, value in state.items():
        match = matches[key]
        if match is None:
            renamed[key] = value
            continue
        prefix, name, layer, rest = match.groups()
        index, share = place.get(name, {}).get(int(layer), (None, 0))
        path = _LEAF.split(rest, maxsplit=1)[0]
        averaged = share < 1
        if not share or not _has(lists[name][index], path) or (averaged and (not rest.endswith(_PAIR)
                                                                             or _module_of(match) in beyond)):
            dropped.append(key)
            continue
        new = f"{prefix}{name}.{index}.{rest}"
        renamed[new] = _kept(lists[name][index], path, rest, value)
        parts.setdefault(new, []).append((share, key))
    for new in [new for new in parts if new.endswith(_PAIR[1]) and parts[new][0][0] < 1]:
        first = new.removesuffix(_PAIR[1]) + _PAIR[0]
        downs, ups = [], []
        for share, key in parts[new]:
            stem = key.removesuffix(_PAIR[1])
            rank = state[key].shape[1]
            scale = share * float(alphas.get(f"{stem}.alpha", rank)) / rank
            block, path, rest = _target(lists, pattern, new)
            ups.append(_kept(block, path, rest, state[key]) * scale)
            downs.append(_kept(block, path, rest.removesuffix(_PAIR[1]) + _PAIR[0], state[stem + _PAIR[0]]))
        renamed[first], renamed[new] = torch.cat(downs), torch.cat(ups, dim=1)
        if alphas:
            # The LoRA's own alpha: diffusers finds alphas that differ by the end of a name, and may take another's.
            rank = renamed[first].shape[0]
            alpha = float(alphas.get(f"{parts[new][0][1].removesuffix(_PAIR[1])}.alpha", rank)) or rank
            renamed[new] = renamed[new] * (rank / alpha)
            made[f"{new.removesuffix(_PAIR[1])}.alpha"] = alpha
    return renamed, dropped


def _module_of(match: re.Match) -> tuple[str, ...]:
    """The module of the teacher that an adapter's weight is for."""
    return (*match.groups()[:3], _LEAF.split(match[4], maxsplit=1)[0])


_PAIR = (".lora_A.weight", ".lora_B.weight")


def _target(lists: Mapping[str, RoutedBlocks], pattern: re.Pattern, new: str) -> tuple[nn.Module, str, str]:
    _, name, index, rest = pattern.match(new).groups()
    return lists[name][int(index)], _LEAF.split(rest, maxsplit=1)[0], rest


def _kept(block: nn.Module, path: str, rest: str, value: Any) -> Any:
    """The rows (of an up projection) or columns (of a down projection) that a narrowed linear layer still has."""
    up = bool(re.search(r"lora(_B|_up|\.up|_linear_layer\.up)\b", rest))
    module = block.get_submodule(path)
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if not isinstance(value, torch.Tensor) or value.ndim != 2 or not hasattr(module, "out_features"):
        return value
    if not up:
        kept = getattr(module, "pydit_kept", {}).get("columns")
        return value if kept is None or value.shape[1] == module.in_features else torch.cat(
            [value[:, start:stop] for start, stop in kept], dim=1)
    kept, rows = getattr(module, "pydit_kept", {}).get("rows"), module.out_features
    owner = block.get_submodule(path.rpartition(".")[0])
    if type(owner).__name__ == "AdaLayerNormContinuous" and len(value) == 3 * rows:
        kept = [(rows // 2, rows), (0, rows // 2)]  # of an interval that ends SD3: scale before shift, no more
    return value if kept is None or len(value) == rows else torch.cat([value[start:stop] for start, stop in kept])


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def warn_of_dropped(dropped: Sequence[str]) -> None:
    """One warning that names how many weights have no place, and the first."""
    if dropped:
        warnings.warn(f"{len(dropped)} LoRA weights have no place in the pruned model and are left out (the first: "
                      f"{dropped[0]}): their layers were merged into another, or their modules removed", UserWarning,
                      stacklevel=3)


def residuals_by_source(blocks: RoutedBlocks, samples: Sequence[torch.Tensor], *, rule: str) -> list[torch.Tensor]:
    """ControlNet residuals, one per block that runs: the sum of what the teacher would add after its layers.

    Parameters
    ----------
    samples : the ControlNet's outputs, fewer than the teacher's layers or as many.
    rule : how the family spreads n of them over L layers: ``"ceil"``, k // ceil(L / n); ``"repeat"``, k % n;
        ``"share"``, int(k / (L / n)).
    """
    total, n, first = sum(map(len, blocks.source)), len(samples), blocks.source[0][0]
    number = {"ceil": lambda k: k // math.ceil(total / n), "repeat": lambda k: k % n,
              "share": lambda k: int(k / (total / n))}[rule]

    def added(layers: Iterable[int]) -> torch.Tensor:
        found = [samples[number(layer - first)] for layer in layers]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    running: list[tuple[int, ...]] = []
    for index, layers in enumerate(blocks.source):
        running += [layers] if index not in blocks.inactive else [(layer,) for layer in layers]
    found = [added(layers) for layers in running]
    return _PerRunning(found, len(blocks)) if rule == "share" else found


class _PerRunning(list):
    """One residual per block that runs, under the length that makes a family's own spreading the identity.

    SD3's forward divides the number of its blocks, which is the student's, by this length and indexes by the block
    that runs, of which there are more where the teacher's layers are active.
    """

    def __init__(self, items: Iterable[torch.Tensor], blocks: int) -> None:
        super().__init__(items)
        self._blocks = blocks

    def __len__(self) -> int:
        return self._blocks


def skipped_by_source(blocks: RoutedBlocks, layers: Iterable[int]) -> list[int]:
    """Places, among the blocks that run, of those that stand for these layers of the teacher.

    Raises
    ------
    UserError
        A block that stands for other layers too, or at which a region of linear text begins or ends.
    """
    wanted, skipped = set(layers), []
    running = [(index, part) for index, source in enumerate(blocks.source)
               for part in ([(layer,) for layer in source] if index in blocks.inactive else [source])]
    for place, (index, part) in enumerate(running):
        listed = [layer for layer in part if layer in wanted]
        if not listed:
            continue
        if len(listed) < len(part):
            raise UserError(f"skip_layers: expected all layers that a block stands for, {list(part)}, or none of them, "
                            f"got {listed}")
        block = blocks[index]
        # In a region of linear text the text is two tensors, which later blocks would misread.
        if index not in blocks.inactive and (getattr(block, "hands_on", False)
                                             or getattr(getattr(block, "spec", None), "text_output", False)):
            raise UserError("skip_layers: expected no layer at which a region of linear text begins or ends, got "
                            f"{listed}; set_active without the region runs the teacher's layers there")
        skipped.append(place)
    return skipped
