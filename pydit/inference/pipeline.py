"""Pipeline directories with a pruned transformer, readable by stock diffusers.

A depth-pruned transformer is a shorter transformer of the stock class, so it is stored as one: stock diffusers loads
and runs the directory without pydit. ``pydit_plan.json`` beside ``model_index.json`` keeps the plan and which teacher
blocks each remaining block stands for; with it :func:`load_pipeline` restores the pruned class. Thinned-out blocks have
no stock class: such a transformer is stored under its own, and diffusers loads it once ``pydit`` has been imported, or
by ``trust_remote_code=True`` where a file beside the weights imports it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydit.errors import FormatError, UserError
from pydit.files import (
    PICKLE_SUFFIXES,
    as_path,
    read_header,
    read_json,
    replace_directory,
    require_file_name,
    shard_names,
    write_error,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    import torch

PLAN_FILE = "pydit_plan.json"
FORMAT = "pydit-pruned-pipeline"
VERSION = 1


SHIM = "modeling_pydit"
_SHIM_TEXT = '''"""The class of this transformer, from the pydit package, for diffusers with trust_remote_code=True."""

try:
    from pydit import {name}
except ImportError as error:
    raise ImportError("transformer: expected the package pydit, which pruned this model, got an environment without "
                      f"it ({{error}}); pip install pydit") from None
'''


def save_pipeline(pipe, path: str | os.PathLike, *, remote_code: bool = False) -> Path:
    """Write a diffusers pipeline as a directory that stock diffusers loads, atomically.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Its transformer may be a pruned one (:func:`pydit.prune`) or a stock one.
    path : directory to create, or an earlier model directory to replace.
    remote_code : let ``DiffusionPipeline.from_pretrained(path, trust_remote_code=True)`` load it
        without ``import pydit`` before: a file beside the weights imports it, or says in one sentence that it is not
        installed. Plain ``from_pretrained(path)`` then no longer does; diffusers runs such a file only when told to.
        A stock transformer needs neither.

    Raises
    ------
    UserError
        ``pipe`` is no pipeline. ``path`` is a file, or a directory that holds something else than a model. Or a
        component would not come back as it is: offloading has emptied it, adapters sit in it, or its projections are
        fused.
    OSError
        The disk is full or not writable. Nothing half-written remains, and an earlier directory stays.
    """
    from safetensors import SafetensorError

    _need_diffusers()
    _require_savable(pipe)
    given = getattr(pipe, "transformer", None)
    student = getattr(given, "_orig_mod", given)  # of torch.compile
    pruned = hasattr(student, "plan") and hasattr(student, "to_stock")
    as_stock = pruned and student.plan.is_stock
    with replace_directory(path) as new:
        try:
            if as_stock:
                pipe.register_modules(transformer=student.to_stock())
            pipe.save_pretrained(new, safe_serialization=True)
        except Exception as error:  # tokenizers raises a failed write as no more than an Exception
            if isinstance(error, SafetensorError) or (type(error) is Exception and "os error" in str(error)):
                raise write_error(error, path) from None
            raise
        finally:
            if as_stock:
                pipe.register_modules(transformer=given)
        _forget_paths(new)
        if pruned and remote_code and not as_stock:
            use_remote_code(new, type(student).__name__)
        if pruned:
            write_plan(new, student.plan, student.init)
    return Path(path)


def _require_savable(pipe: Any) -> None:
    """UserError where what is written would be broken: diffusers writes it without a word, or fails in the middle."""
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}"
                        + ("; a model by itself has save_pretrained" if hasattr(pipe, "save_pretrained") else ""))
    for name, model in pipe.components.items():
        if not hasattr(model, "named_parameters"):
            continue
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(f"pipe: expected weights at hand, got {name}, which offloading has emptied; save before "
                            "offloading")
        if getattr(model, "peft_config", None):
            raise UserError(f"pipe: expected plain weights, got {name} with adapters, which a pipeline directory does "
                            "not hold; unload them, after fuse_lora to keep what they do, or save_lora_adapter them")
        if any(getattr(module, "fused_projections", False) for module in model.modules()):
            raise UserError(f"pipe: expected projections one by one, got {name} with fused ones, which a pipeline "
                            "directory does not hold; unfuse_qkv_projections before saving")


def write_plan(path: Path, plan, init: str) -> None:
    """What a pipeline directory says of its pruned transformer."""
    from pydit.models.pruned import entry_of

    write_json(path / PLAN_FILE, {"format": FORMAT, "version": VERSION, "source": list(map(list, plan.source)),
                                  **entry_of(plan, init)})


def use_remote_code(path: Path, name: str) -> None:
    """Let the transformer of a pipeline directory be found by a file beside its weights; ``name`` of its class."""
    write_text(path / "transformer" / f"{SHIM}.py", _SHIM_TEXT.format(name=name))
    index = read_json(path / "model_index.json", what="pipeline")
    write_json(path / "model_index.json", index | {"transformer": [SHIM, name]})


def load_pipeline(path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
                  shard: bool = False):
    """Load a pipeline directory; a transformer that pydit pruned comes back as the pruned class.

    Parameters
    ----------
    path : local directory written by :func:`save_pipeline` or by diffusers. Nothing is downloaded.
    dtype : of all weights; None leaves each library's default: float32, or for the text encoder what is stored.
    device : where the pipeline goes.
    shard : with several processes, each reads its part of the transformer alone, which comes back sharded (FSDP2).
        Every process must ask.

    Returns
    -------
    diffusers.DiffusionPipeline

    Raises
    ------
    FormatError
        The directory, a file in it or a tensor is missing, truncated, of another shape, or a pickle.
    UserError
        diffusers or transformers is not installed.
    """
    _need_diffusers()
    from diffusers import DiffusionPipeline

    path = as_path(path, what="pipeline")
    index = check_pipeline(path)

    models = _load_models(path, index, dtype, device if shard else None)
    if SHIM in (index.get("transformer") or ()):  # diffusers asks where the class is from, of a model passed to it too
        sys.modules.setdefault(SHIM, importlib.import_module("pydit"))
    try:
        pipe = DiffusionPipeline.from_pretrained(path, use_safetensors=True, local_files_only=True,
                                                 **_dtype_option(dtype), **models)
    except Exception as error:  # diffusers and transformers raise many kinds for a directory they cannot read
        raise FormatError(f"pipeline: expected a directory that diffusers can load, got {path}: "
                          f"{_line(error)}") from error
    if (path / PLAN_FILE).exists() and not hasattr(pipe.transformer, "plan"):
        pipe.register_modules(transformer=_restore(pipe.transformer, path / PLAN_FILE))
    return pipe.to(device)


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


def content_hash(path: str | os.PathLike) -> str:
    """A hash of every file of a directory, names included: two directories with one hash hold the same pipeline."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:32]


def _forget_paths(path: Path) -> None:
    """Remove where on this machine the parts were loaded from, which diffusers writes into its JSON files."""
    for file in (path / "model_index.json", *path.glob("*/config.json")):
        data = read_json(file, what="pipeline")
        if data.pop("_name_or_path", None) is not None:
            write_json(file, data)


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


def _load_models(path: Path, index: dict[str, Any], dtype: torch.dtype | None, sharded_to: Any) -> dict[str, Any]:
    """The diffusers models of a pipeline, every tensor accounted for: diffusers itself only warns of missing ones.

    ``sharded_to`` : a device for the transformer's shards, or None.
    """
    import diffusers

    from pydit.distill import distributed
    from pydit.inference.sharded import load_sharded

    models = {}
    for name, entry in index.items():
        library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        kind = getattr(diffusers, class_name, None) if library == "diffusers" else _pruned_class(library, class_name)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
            continue
        if name == "transformer" and sharded_to is not None and distributed.world_size() > 1:
            models[name] = load_sharded(path / name, kind, dtype=dtype, device=sharded_to)
            continue
        try:
            model, report = kind.from_pretrained(path, subfolder=name, use_safetensors=True, local_files_only=True,
                                                 output_loading_info=True, **_dtype_option(dtype))
        except Exception as error:  # see load_pipeline
            raise FormatError(f"pipeline: expected a model that diffusers can load, got {path / name}: "
                              f"{_line(error)}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report.get(problem):
                first = sorted(map(str, report[problem]))[0]
                raise FormatError(f"pipeline: expected weights that match the config in {path / name}, got "
                                  f"{len(report[problem])} {problem.replace('_', ' ')} (first: {first})")
        models[name] = model
    return models


def _pruned_class(library: Any, class_name: Any) -> type | None:
    """One of this package's own model classes by its entry in a model index."""
    from pydit.families import FAMILIES
    from pydit.models import get_adapter

    for family in FAMILIES if library in ("pydit", SHIM) else ():
        kind = get_adapter(family).pruned_class()
        if kind.__name__ == class_name:
            return kind
    return None


def _restore(transformer, file: Path):
    """The stock transformer as the pruned class, with its plan."""
    import torch

    from pydit.models import get_adapter
    from pydit.models.pruned import entry_of
    from pydit.plan import PruningPlan, family_of

    data = read_json(file, what="pipeline")
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise FormatError(f"pipeline: expected format {FORMAT}, version {VERSION} in {file}, got something else")
    try:
        plan, source = PruningPlan.from_dict(data["plan"]), data["source"]
        depth = len(source)
    except (KeyError, TypeError) as error:
        raise FormatError(f"pipeline: expected a plan and its source map in {file}, got {error!r}") from None
    family = family_of(transformer).name
    if plan.family != family or not plan.is_stock:
        raise FormatError(f"pipeline: expected a {family} plan with intervals alone for the stored transformer, got "
                          f"one for {plan.family} ({file})")
    adapter = get_adapter(family)
    blocks = adapter.blocks(transformer)
    if depth != len(blocks):
        raise FormatError(f"pipeline: expected a plan that leaves {len(blocks)} blocks, as the "
                          f"stored transformer has, got one that leaves {depth} ({file})")
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        student = adapter.pruned_class()(**config, pydit=entry_of(plan, data.get("init", "first")))
    for name, module in transformer.named_children():
        setattr(student, name, module)
    student.install(plan, blocks)
    return student.train(transformer.training)


def _dtype_option(dtype: torch.dtype | None) -> dict[str, Any]:
    """The dtype argument of from_pretrained, whose name diffusers changed in 0.42."""
    import diffusers

    if dtype is None:
        return {}
    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}


def _need_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise UserError(f"diffusers: expected for pipelines, got an environment without it ({error}); "
                        "pip install diffusers") from None


def _line(error: Exception) -> str:
    """An error of another library on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


