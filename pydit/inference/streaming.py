"""Pruning a pipeline directory without loading it: block by block, shard by shard, in bounded memory.

What :func:`pydit.prune` does in memory, for the initialisations that need no forward pass. A block at a time is read,
initialised, thinned out and written; the result is the same to the last bit.
"""

from __future__ import annotations

import inspect
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pydit.errors import FormatError, UserError
from pydit.families import FAMILIES
from pydit.files import read_json, replace_directory, require_apart, write_json
from pydit.inference.checks import check_pipeline
from pydit.inference.pipeline import PLAN_FILE, use_remote_code, write_plan
from pydit.models import ModelAdapter, get_adapter
from pydit.models.pruned import entry_of
from pydit.plan import PruningPlan
from pydit.pruning import INITS, initial_block, weighted_mean
from pydit.weights import SafetensorsReader, SafetensorsWriter

WEIGHTS = "diffusion_pytorch_model"


def prune_pipeline(path: str | Path, plan: PruningPlan, out: str | Path, *, init: str = "first",
                   shard_bytes: int = 1 << 30, dtype: torch.dtype | None = None, remote_code: bool = False,
                   progress: Callable[[Iterable, int, str], Iterable] | None = None) -> Path:
    """Prune the transformer of a pipeline directory into another directory, atomically.

    Memory: the layers that one block is initialised from (one, or for an average all of its interval) and two shards.

    Parameters
    ----------
    path : pipeline directory with safetensors, sharded or not; everything but the transformer is copied as it is.
    plan : for its family and depth. init : as for :func:`pydit.prune`, without ``"probe"``.
    shard_bytes : most bytes of a file of weights that is written. dtype : of the transformer's weights; None: as they
        are stored. remote_code : see :func:`save_pipeline`.
    progress : wraps the blocks as they are written; it is called with them, their number and the word for one.

    Raises
    ------
    UserError
        An init that needs batches, a plan that does not fit, weights that are quantized, or ``out`` at ``path``.
    FormatError
        A directory that is broken, or weights that its configuration does not explain.

    Warns
    -----
    UserWarning
        The plan has linear maps, which start as the identity here.
    """
    path = Path(path)
    if init not in INITS or init == "probe":
        raise UserError(f"init: expected one of {', '.join(INITS[:-1])} without loading the model, got {init!r}")
    check_pipeline(path)
    require_apart(out, path)
    folder = path / "transformer"
    config = read_json(folder / "config.json", what="pipeline", strict=True)
    adapter = _adapter_of(config, folder)
    if config.get("quantization_config") is not None:
        raise UserError(f"transformer: expected plain weights, got quantized ones in {folder}; prune before quantizing")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    full = {**_defaults(adapter), **settings}
    family = FAMILIES[adapter.family]
    plan.require_teacher(family.name, family.depth(family.require(full)))
    plan.full_config(full)
    if any(spec.has_maps for spec in plan.blocks):
        warnings.warn("the linear maps of the plan start as the identity, because there are no batches to fit them to",
                      UserWarning, stacklevel=2)
    reader = SafetensorsReader(folder, WEIGHTS, what="pipeline")
    _require_weights(adapter, config, reader, folder)
    kind = adapter.stock_class() if plan.is_stock else adapter.pruned_class()
    student = settings | adapter.student_config(full, plan)
    if not plan.is_stock:
        student["pydit"] = entry_of(plan, init)
    with replace_directory(out) as new:
        _copy_others(path, new)
        (new / "transformer").mkdir()
        write_json(new / "transformer" / "config.json", {
            "_class_name": kind.__name__, "_diffusers_version": config.get("_diffusers_version"), **student})
        index = read_json(new / "model_index.json", what="pipeline")
        index["transformer"] = ["diffusers" if plan.is_stock else "pydit", kind.__name__]
        write_json(new / "model_index.json", index)
        if remote_code and not plan.is_stock:
            use_remote_code(new, kind.__name__)
        writer = SafetensorsWriter(new / "transformer", WEIGHTS, shard_bytes=shard_bytes)
        for key, tensor in _student_tensors(adapter, reader, plan, full, init, progress):
            writer.add(key, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
        writer.close()
        write_plan(new, plan, init)
    return Path(out)


def _adapter_of(config: dict[str, Any], folder: Path) -> ModelAdapter:
    for family in FAMILIES.values():
        if family.class_name == config.get("_class_name"):
            return get_adapter(family.name)
    raise UserError(f"transformer: expected {', '.join(f.class_name for f in FAMILIES.values())}, got "
                    f"{config.get('_class_name')!r} ({folder})")


def _copy_others(path: Path, new: Path) -> None:
    """Every file but the transformer's; the first that cannot be written ends it (shutil.copytree would go on)."""
    for where, folders, names in os.walk(path, followlinks=True):
        if Path(where) == path:
            folders[:] = [name for name in folders if name != "transformer"]
            names = [name for name in names if name != PLAN_FILE]
        into = new / Path(where).relative_to(path)
        into.mkdir(exist_ok=True)
        for name in names:
            shutil.copy2(Path(where) / name, into / name)


def _require_weights(adapter: ModelAdapter, config: dict[str, Any], reader: SafetensorsReader, folder: Path) -> None:
    """Every tensor of the configuration must be stored, in its shape, and no other: what is written must load."""
    try:
        with torch.device("meta"):
            kind = adapter.stock_class()
            known = inspect.signature(kind.__init__).parameters
            model = kind(**{name: value for name, value in config.items() if name in known})
    except Exception as error:  # diffusers raises many kinds for values that it cannot build a model from
        raise FormatError(f"pipeline: expected a configuration that diffusers can build, got {folder / 'config.json'}: "
                          f"{' '.join(str(error).split())[:200]}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: reader.shape(name) for name in reader.keys()}  # noqa: SIM118
    problems = {
        "missing": set(expected) - set(stored), "unexpected": set(stored) - set(expected),
        "wrongly shaped": {name for name in set(stored) & set(expected) if stored[name] != expected[name]},
        "integer": {name for name in stored if not reader.dtype(name).is_floating_point}}
    for problem, names in problems.items():
        if names:
            raise FormatError(f"pipeline: expected weights that match the config in {folder}, got {len(names)} "
                              f"{problem} tensors (first: {min(names)})")


def _defaults(adapter: ModelAdapter) -> dict[str, Any]:
    """What diffusers takes where a configuration has no entry."""
    parameters = inspect.signature(adapter.stock_class().__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _student_tensors(adapter: ModelAdapter, reader: SafetensorsReader, plan: PruningPlan, config: dict[str, Any],
                     init: str, progress: Callable | None) -> Iterable[tuple[str, torch.Tensor]]:
    lengths = dict(zip(adapter.block_lists, FAMILIES[adapter.family].segments(config), strict=True))
    starts = {name: sum(list(lengths.values())[:place]) for place, name in enumerate(lengths)}
    prefixes = {starts[name] + number: f"{name}.{number}." for name in lengths for number in range(lengths[name])}
    of_layer: dict[int, list[str]] = {layer: [] for layer in prefixes}
    for key in reader.keys():  # noqa: SIM118
        name, _, rest = key.partition(".")
        if name not in lengths:
            yield key, reader[key]
            continue
        of_layer[starts[name] + int(rest.partition(".")[0])].append(key)
    places = iter([f"{name}.{number}" for name, length in zip(
        adapter.block_lists, adapter.segments_of(plan, config | adapter.student_config(config, plan)), strict=True)
        for number in range(length)])
    for spec in plan.blocks if progress is None else progress(plan.blocks, len(plan.blocks), "block"):
        place = next(places)
        block = _initial(adapter, reader, config, [(prefixes[k], of_layer[k]) for k in spec.source], init)
        block = block if spec.is_stock else adapter.new_block(block, spec)
        for key, tensor in block.state_dict().items():
            yield f"{place}.{key}", tensor


def _initial(adapter: ModelAdapter, reader: SafetensorsReader, config: dict[str, Any],
             layers: list[tuple[str, list[str]]], init: str) -> nn.Module:
    """As :func:`pydit.pruning.initial_block`; ``layers``: (prefix, keys) of each."""
    if "average" in init and len(layers) > 1:
        shapes = [{key.removeprefix(prefix): reader.shape(key) for key in keys} for prefix, keys in layers]
        if all(found == shapes[0] for found in shapes):  # one tensor of all layers at a time
            state = {name: weighted_mean([reader[prefix + name] for prefix, _ in layers], init) for name in shapes[0]}
            return _layer(adapter, config, state, layers[0][0])
    return initial_block(adapter, _Layers(lambda prefix, keys: _layer(
        adapter, config, {key.removeprefix(prefix): reader[key] for key in keys}, prefix), layers), init)


class _Layers(Sequence):
    """Layers that are read when they are asked for; the last two are kept."""

    def __init__(self, read: Callable[[str, list[str]], nn.Module], places: list[tuple[str, list[str]]]) -> None:
        self._read, self._places, self._kept = read, places, {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> nn.Module:
        index = range(len(self._places))[index]
        if index not in self._kept:
            self._kept = dict(list(self._kept.items())[-1:])
            self._kept[index] = self._read(*self._places[index])
        return self._kept[index]


def _layer(adapter: ModelAdapter, config: dict[str, Any], state: dict[str, torch.Tensor], prefix: str) -> nn.Module:
    with torch.device("meta"):
        layer = adapter.stock_block(config, state)
    try:
        layer.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise FormatError(f"pipeline: expected weights that fit {type(layer).__name__} under {prefix}, got others: "
                          f"{' '.join(str(error).split())[:200]}") from None
    return layer
