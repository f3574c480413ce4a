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
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydit.errors import FormatError, UserError
from pydit.files import as_path, read_json, replace_directory, write_error, write_json, write_text
from pydit.inference.checks import SHIM, check_pipeline

if TYPE_CHECKING:
    import torch

PLAN_FILE = "pydit_plan.json"
FORMAT = "pydit-pruned-pipeline"
VERSION = 1
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
        component would not come back as it is: offloading has emptied it, adapters sit in it, its projections are
        fused, or it is several ControlNets as one.
    OSError
        The disk is full or not writable. Nothing half-written remains, and an earlier directory stays.

    Warns
    -----
    UserWarning
        A ControlNet beside a depth-pruned transformer, whose layers stock diffusers would not find for its residuals.
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
    from diffusers import DiffusionPipeline, ModelMixin

    from pydit.models.flux_lora import require_config

    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}"
                        + ("; a model by itself has save_pretrained" if hasattr(pipe, "save_pretrained") else ""))
    for name, model in pipe.components.items():
        if not hasattr(model, "named_parameters"):
            continue
        if isinstance(model, ModelMixin) and not hasattr(model, "config"):
            raise UserError(f"pipe: expected models that diffusers can write and load, got {name} of the class "
                            f"{type(model).__name__}, which has no config"
                            + ("; save each of its nets by itself" if hasattr(model, "nets") else ""))
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(f"pipe: expected weights at hand, got {name}, which offloading has emptied; save before "
                            "offloading")
        if getattr(model, "peft_config", None):
            raise UserError(f"pipe: expected plain weights, got {name} with adapters, which a pipeline directory does "
                            "not hold; unload them, after fuse_lora to keep what they do, or save_lora_adapter them")
        if any("IPAdapter" in type(p).__name__ for p in getattr(model, "attn_processors", {}).values()):
            raise UserError("pipe: expected attention without an IP-adapter, which a pipeline directory does not hold, "
                            f"got {name} with one; unload_ip_adapter before saving")
        if type(model).__name__.endswith("FluxTransformer2DModel"):
            require_config(model)
        if any(getattr(module, "fused_projections", False) for module in model.modules()):
            raise UserError(f"pipe: expected projections one by one, got {name} with fused ones, which a pipeline "
                            "directory does not hold; unfuse_qkv_projections before saving")


def write_plan(path: Path, plan, init: str) -> None:
    """What a pipeline directory says of its pruned transformer; a warning where stock diffusers would err."""
    from pydit.models.pruned import entry_of

    if plan.is_stock and plan.intervals and "controlnet" in read_json(path / "model_index.json", what="pipeline"):
        warnings.warn("controlnet: its residuals belong to layers of the teacher, which stock diffusers, reading this "
                      "directory, does not know; load it by pydit.load_pipeline, which puts them there", UserWarning,
                      stacklevel=3)
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

    data = read_json(file, what="pipeline", strict=True)
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


