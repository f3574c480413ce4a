"""Checkpoints in the layout of PPCL's authors (OPPO-Mente-Lab: 10B, 12B, 13B), as this package's pruned models.

Their configuration numbers blocks of the pruned model: ``single_stream_index`` (linear text), ``ffn_proj_index``
(linear FFN), ``ehs_proj_index`` (text output); their modules are ``txt_proj``, ``img_ffn_proj``, ``txt_ffn_proj`` and
``ehs_proj``.
A file without the last two lists is of the first release, whose text map has no residual: ``t = P m`` and not
``m + P m``; its weight loses the identity here. 13B is a shorter stock model, which stock diffusers loads too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pydit.errors import FormatError, UserError
from pydit.files import read_json
from pydit.models.pruned import entry_of
from pydit.plan import PruningPlan
from pydit.presets import PRESETS
from pydit.weights import SafetensorsReader

_NAMES = {"img_ffn_proj": "img_ffn", "txt_ffn_proj": "txt_ffn", "ehs_proj": "txt_out_proj", "txt_proj": "txt_proj"}
_LISTS = ("single_stream_index", "ffn_proj_index", "ehs_proj_index")


def load_published(path: str | Path, plan: PruningPlan | None = None, *, name: str = "diffusion_pytorch_model") -> Any:
    """A transformer directory in the authors' layout as a :class:`pydit.PrunedQwenImageTransformer2DModel`.

    Parameters
    ----------
    path : directory with ``config.json`` and safetensors, sharded or not. name : of the weights.
    plan : which teacher layers each block stands for, which the files do not say. None: the preset of that layout, or
        else a plan of the stored depth, whose layers are the model's own: it runs the same, and LoRA and ControlNet of
        the teacher do not know their layers.

    Raises
    ------
    FormatError
        A broken file, indices that no plan has, or weights that the configuration does not explain.
    UserError
        A plan of another layout.
    """
    from pydit.models import get_adapter

    path = Path(path)
    config = read_json(path / "config.json", what="checkpoint")
    if not isinstance(config, dict) or not isinstance(config.get("num_layers"), int):
        raise FormatError(f"checkpoint: expected a transformer's configuration in {path / 'config.json'}")
    lists = [_indices(config, key) for key in _LISTS]
    found = _fitting_plan(config["num_layers"], lists, plan)
    first = "single_stream_index" in config and not set(_LISTS[1:]) & set(config)
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in _LISTS}
    with torch.device("meta"):
        model = get_adapter("qwen-image").pruned_class()(**{**settings, "pydit": entry_of(found, "first")})
    # Rotary tables are no weights, and there are none on the meta device.
    model.pos_embed = get_adapter("qwen-image").stock_class()(**{**settings, "num_layers": 0}).pos_embed
    reader = SafetensorsReader(path, name, what="checkpoint")
    state = {}
    for key in reader.keys():  # noqa: SIM118
        parts = [_NAMES.get(part, part) for part in key.split(".")]
        state[".".join(parts)] = reader[key]
    for key in [key for key in state if key.endswith("txt_proj.weight")] if first else ():
        state[key] = state[key] - torch.eye(len(state[key]), dtype=state[key].dtype)
    for key, value in model.state_dict().items():  # a region that ends without a map of the text output: the identity
        if ".txt_out_proj." in key and key not in state:
            state[key] = torch.zeros(value.shape, dtype=next(iter(state.values())).dtype)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise FormatError(f"checkpoint: expected weights that the configuration explains in {path}, got others: "
                          f"{' '.join(str(error).split())[:300]}") from None
    return model.eval()


def _indices(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key) or ()
    if not isinstance(value, (list, tuple)) or not all(type(index) is int and 0 <= index < config["num_layers"]
                                                      for index in value):
        raise FormatError(f"checkpoint: expected {key} as blocks 0 to {config['num_layers'] - 1}, got {value!r}")
    return tuple(sorted(value))


def _fitting_plan(depth: int, lists: list[tuple[int, ...]], plan: PruningPlan | None) -> PruningPlan:
    single, ffn, output = lists
    if set(output) - set(single):
        raise FormatError(f"checkpoint: expected ehs_proj_index among single_stream_index, got {list(output)}")

    def fits(candidate: PruningPlan) -> bool:
        blocks = candidate.blocks
        ends = {index for index, spec in enumerate(blocks) if spec.text_output}
        return (len(blocks) == depth and candidate.dead_tensors and set(output) <= ends
                and tuple(index for index, spec in enumerate(blocks) if spec.text == "linear") == single
                and tuple(index for index, spec in enumerate(blocks) if spec.ffn == "linear") == ffn)

    if plan is not None:
        if not fits(plan):
            raise UserError(f"plan: expected the checkpoint's layout ({depth} blocks, linear text in {list(single)}, "
                            f"linear FFNs in {list(ffn)}, text outputs in {list(output)}), got another")
        return plan
    if single or ffn:
        for preset in PRESETS:
            if PRESETS[preset][0] == "qwen-image" and fits(candidate := PruningPlan.preset(preset)):
                return candidate
    regions, start = [], None
    for index in range(depth + 1):
        inside = index in single
        if inside and start is None:
            start = index - 1
        if start is not None and (not inside or index in output):
            regions.append((start, index if inside else index - 1))
            start = None
    try:
        made = PruningPlan("qwen-image", depth, text_linear=regions, linear_ffn=ffn)
    except UserError as error:
        raise FormatError(f"checkpoint: expected indices that a plan can have, got {[list(one) for one in lists]}: "
                          f"{error}") from None
    if not fits(made):
        raise FormatError(f"checkpoint: expected indices that a plan can have, got {[list(one) for one in lists]}")
    return made
