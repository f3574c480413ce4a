"""What a pipeline directory may hold, looked at before anything in it is loaded.

diffusers and transformers load pickles, import modules that a file names, fetch kernels and adapters that a
configuration names, and make as many layers as it announces. A directory that would have them do so is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydit.errors import FormatError
from pydit.files import PICKLE_SUFFIXES, as_path, read_header, read_json, require_file_name, shard_names

SHIM = "modeling_pydit"  # the file beside the weights through which diffusers finds a pruned class without this package


def check_pipeline(path: str | os.PathLike) -> dict[str, Any]:
    """Check a pipeline directory without loading weights, and return its ``model_index.json``.

    Every component must be there, its weights as safetensors files of the length their header announces.

    Raises
    ------
    FormatError
        Something is missing, truncated or a pickle; the message names the file.
    """
    path = as_path(path, what="pipeline")
    if not path.is_dir():
        got = "a file" if path.exists() else "a path that does not exist"
        raise FormatError(f"pipeline: expected a pipeline directory, got {got} ({path})")
    if not (path / "model_index.json").is_file():
        raise FormatError(f"pipeline: expected a directory with model_index.json, got one without it ({path})")
    index = read_json(path / "model_index.json", what="pipeline", strict=True)
    if not isinstance(index, dict):
        raise FormatError(f"pipeline: expected an object in {path / 'model_index.json'}, got {type(index).__name__}")
    if not isinstance(index.get("_class_name", ""), str):  # a list names a file of code
        raise FormatError(f"pipeline: expected the name of a class as _class_name in {path / 'model_index.json'}, got "
                          f"{str(index['_class_name'])[:200]}")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        folder = path / require_file_name(name, what="pipeline", where=path / "model_index.json")
        if not folder.is_dir():
            raise FormatError(f"pipeline: expected the component {name} in {folder}, got no such directory")
        if not _is_known_library(entry[0]):  # diffusers before 0.42 would import any module of this name
            raise FormatError(f"pipeline: expected {name} of diffusers, transformers or pydit in "
                              f"{path / 'model_index.json'}, got one of {str(entry[0])[:200]!r}")
        _check_component(folder, name)
    return index


def _check_component(folder: Path, name: str) -> None:
    files = [p for p in folder.iterdir() if p.is_file()]
    weights = [p for p in files if p.suffix == ".safetensors"]
    pickles = [p for p in files if p.suffix.lower() in PICKLE_SUFFIXES]
    if pickles and not weights:
        raise FormatError(f"pipeline: expected {name} as safetensors, got a pickle ({pickles[0]}); loading a pickle "
                          "runs code from whoever wrote it, so it is refused")
    most, where = ("", 0), folder / "config.json"  # layers that the configuration announces
    for file in files:
        if file.name.endswith(".safetensors.index.json"):
            for shard in shard_names(file, what="pipeline"):
                if not (folder / shard).is_file():
                    raise FormatError(f"pipeline: expected the weight file {folder / shard}, got no such file")
        elif file.suffix == ".json":
            data = read_json(file, what="pipeline")
            if file == where:
                if not isinstance(data, dict):
                    raise FormatError(f"pipeline: expected an object in {file}, got {type(data).__name__}")
                most = _deepest(data)
            if found := _from_the_hub(data):
                raise FormatError(f"pipeline: expected attention of the library itself in {file}, got {found!r}, which "
                                  "may be fetched from the hub")
            if found := _unknown_quantization(data):
                raise FormatError(f"pipeline: expected weights that are not quantized, or by one of "
                                  f"{', '.join(_QUANTIZED)}, in {file}, got {found}, whose kernels may be fetched from "
                                  "the hub and run")
    tensors = sum(len(read_header(file, what="pipeline")[0]) for file in weights)
    if (folder / "adapter_config.json").exists():  # transformers would load another model, which this names, under it
        raise FormatError(f"pipeline: expected the weights of {name} in {folder}, got an adapter of another model; "
                          "merge it into that model first")
    if weights and most[1] > max(1024, tensors):
        raise FormatError(f"pipeline: expected at most {max(1024, tensors)} as {most[0]} in {where}, beside {tensors} "
                          f"tensors, got {most[1]}")


def _is_known_library(library: Any) -> bool:
    """Whether components are taken from it: none is imported because a file names it."""
    if library in ("diffusers", "transformers", "pydit", SHIM):
        return True
    if not isinstance(library, str) or not library.isidentifier():
        return False
    import diffusers.pipelines

    return hasattr(diffusers.pipelines, library)


def _deepest(config: Any) -> tuple[str, int]:
    """(name, number) of the most layers that a configuration announces: so many are made before a tensor is read."""
    found, left = ("", 0), [("", config)]
    while left:
        name, value = left.pop()
        if isinstance(value, (dict, list)):
            left += value.items() if isinstance(value, dict) else ((name, part) for part in value)
        elif type(value) is int and value > found[1] and any(word in name for word in ("layers", "blocks", "depth")):
            found = name, value
    return found


_OWN = {"attn_implementation": ("eager", "sdpa"), "experts_implementation": ("eager", "batched_mm", "grouped_mm")}
# Methods whose code is in a package that is installed or not. Others take kernels from the hub when a model is loaded.
_QUANTIZED = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "torchao", "quanto")


def _unknown_quantization(data: Any) -> str | None:
    """The method of a configuration's ``quantization_config``, or of one inside it, unless it is a known one."""
    if isinstance(data, list):
        return next(filter(None, map(_unknown_quantization, data)), None)
    if not isinstance(data, dict):
        return None
    if data.get("quantization_config") is not None:
        config = data["quantization_config"]
        method = config.get("quant_method") if isinstance(config, dict) else None
        if isinstance(config, dict) and method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
            method = "bitsandbytes"  # as both libraries read such an entry
        if method not in _QUANTIZED:
            return repr(config if method is None else method)[:200]
    return next(filter(None, map(_unknown_quantization, data.values())), None)


def _from_the_hub(data: Any) -> str | None:
    """The attention that a configuration names, where transformers would look for it on the hub and run it.

    Neither library writes such an entry. Likewise kernels for experts.
    """
    if isinstance(data, list):
        return next(filter(None, map(_from_the_hub, data)), None)
    if not isinstance(data, dict):
        return None
    for key, value in data.items():
        names = value.values() if isinstance(value, dict) else [value]
        known = next((known for start, known in _OWN.items() if key.lstrip("_").startswith(start)), None)
        if known is not None:
            found = [name for name in names if isinstance(name, str) and name not in known]
            if found:
                return found[0][:200]
    return next(filter(None, map(_from_the_hub, data.values())), None)
