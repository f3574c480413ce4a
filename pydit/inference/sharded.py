"""A transformer read in shards: each process reads its rows of every weight, and never holds the model.

The model is made without memory for its parameters, divided as :func:`pydit.distill.distributed.shard` divides it, and
then filled from the safetensors files. What comes out is what loading it whole and sharding it would have given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pydit.distill import distributed
from pydit.errors import FormatError
from pydit.inference.streaming import WEIGHTS
from pydit.models import get_adapter
from pydit.weights import SafetensorsReader


def load_sharded(folder: str | Path, kind: type[nn.Module], *, dtype: torch.dtype | None,
                 device: str | torch.device) -> Any:
    """Load a transformer with its parameters sharded over all processes; every process calls it.

    Parameters
    ----------
    folder : with the configuration and the weights. kind : its diffusers class, or a pruned one of this package.
    dtype : of what is stored; None is float32. device : of this process.

    Raises
    ------
    FormatError
        Weights that the configuration does not explain, or broken ones.
    """
    folder, dtype = Path(folder), dtype or torch.float32
    reader = SafetensorsReader(folder, WEIGHTS, what="pipeline")
    try:
        with _parameters_on_meta(), _default_dtype(dtype):  # buffers are made, as from_pretrained makes them
            model = kind.from_config(kind.load_config(folder)).eval()
    except Exception as error:  # diffusers raises many kinds for a configuration it cannot read
        raise FormatError(f"pipeline: expected a model that diffusers can load, got {folder}: "
                          f"{' '.join(str(error).split())[:300] or type(error).__name__}") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: reader.shape(key) for key in reader.keys()}  # noqa: SIM118
    wrong = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
    if wrong:
        raise FormatError(f"pipeline: expected weights that match the config in {folder}, got {len(wrong)} missing, "
                          f"unexpected or mismatched keys (first: {wrong[0]})")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in shapes and tensor.is_floating_point():  # not what a forward is computed from in float32
            tensor.data = tensor.data.to(dtype)
    distributed.shard(model, get_adapter(model), device=torch.device(device))
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            rows = _own_rows(tensor)
            part = distributed.local(tensor)
            if part.numel():
                part.copy_(reader[key] if rows is None else reader.rows(key, *rows))
    return model


def _own_rows(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Of a parameter that is cut along its first dimension, this process's part; None: all of it."""
    if not isinstance(tensor, DTensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], offset[0] + shape[0]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; their buffers and other tensors are real."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
