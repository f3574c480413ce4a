"""What others address by teacher layer, put where a pruned model has that layer: LoRA weights, ControlNet residuals.

Block numbers of a pruned model are not those of its teacher. Adapters for the teacher loaded by number would land on
the wrong depth without a word, and a ControlNet's residuals would be spread over fewer blocks; both follow ``source``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pydit.models.routing import RoutedBlocks

_LEAF = re.compile(r"\.(lora[_.]\w+|lokr_\w+|alpha|diff|diff_b|weight|bias)(\.|$)")


def remap_lora(lists: Mapping[str, RoutedBlocks], state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Names of a LoRA for the teacher -> names for the student.

    A block that stands for several layers takes the adapter of the first, whose weights it began with.

    Parameters
    ----------
    lists : name of a list of blocks -> the student's, first list first.
    state : name -> anything; names may have any prefix.

    Returns
    -------
    (renamed, dropped) : what has a place, and the names of what has none: layers that were merged away, modules that
        the plan has removed.
    """
    pattern = re.compile(rf"(^|.*?\.)({'|'.join(lists)})\.(\d+)\.(.+)$")
    renamed, dropped = {}, []
    place = {name: {layers[0] - blocks.source[0][0]: index for index, layers in enumerate(blocks.source)}
             for name, blocks in lists.items() if len(blocks.source)}
    for key, value in state.items():
        match = pattern.match(key)
        if match is None:
            renamed[key] = value
            continue
        prefix, name, layer, rest = match.groups()
        index = place.get(name, {}).get(int(layer))
        if index is None or not _has(lists[name][index], _LEAF.split(rest, maxsplit=1)[0]):
            dropped.append(key)
        else:
            renamed[f"{prefix}{name}.{index}.{rest}"] = value
    return renamed, dropped


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
    return [added(layers) for layers in running]
