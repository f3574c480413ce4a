"""The authors' checkpoint layouts, synthetic ones of the same names and shapes, against the formulas of their forward."""

import copy
import json

import pytest
import torch
from torch import nn

from pydit.errors import FormatError, UserError
from pydit.files import save_safetensors, write_json
from pydit.inference.published import load_published
from pydit.plan import PruningPlan
from tests.models import tiny
from tests.models.test_thinned import by_hand, run

WIDTH = 64


def checkpoint(path, depth, single=(), ffn=(), output=(), *, first=False):
    """Random weights under the authors' names; returns them."""
    model = tiny.transformer(depth)
    for index, block in enumerate(model.transformer_blocks):
        if index in single:
            del block.txt_mod, block.txt_mlp
            block.txt_proj = nn.Linear(WIDTH, WIDTH)
        if index in ffn:
            for stream in ("img",) if index in single else ("img", "txt"):
                modulation = getattr(block, f"{stream}_mod")
                modulation[1] = nn.Linear(WIDTH, 3 * WIDTH)
                delattr(block, f"{stream}_mlp")
                setattr(block, f"{stream}_ffn_proj", nn.Linear(WIDTH, WIDTH))
        if index in output:
            block.ehs_proj = nn.Linear(WIDTH, WIDTH)
    state = model.state_dict()
    save_safetensors(path / "diffusion_pytorch_model.safetensors", state)
    lists = {"single_stream_index": list(single), "ffn_proj_index": list(ffn), "ehs_proj_index": list(output)}
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    kept = {} if not single and not ffn else {"single_stream_index": list(single)} if first else lists
    write_json(path / "config.json", {"_class_name": "QwenImageTransformer2DModel", **config, **kept})
    return state


@pytest.mark.parametrize("depth, lists, first", [
    (5, {}, False),                                                              # 13B: a shorter stock model
    (6, {"single": (2, 3, 5), "ffn": (0, 5), "output": (3, 5)}, False),          # 10B
    (6, {"single": (2, 3, 4, 5), "output": (3, 5)}, False),                      # two regions side by side
    (5, {"single": (3, 4)}, True),                                               # 12B of the first release
])
def test_layouts(tmp_path, depth, lists, first):
    if depth == 6 and "ffn" not in lists:
        with pytest.raises(FormatError, match="expected indices that a plan can have"):
            checkpoint(tmp_path, depth, **lists)
            load_published(tmp_path)  # the second has no anchor of its own
        return
    state = checkpoint(tmp_path, depth, **lists, first=first)
    model = load_published(tmp_path)
    loaded = model.state_dict()
    for theirs, ours in (("img_ffn_proj", "img_ffn"), ("ehs_proj", "txt_out_proj")):
        for key in (key for key in state if theirs in key):
            assert torch.equal(loaded[key.replace(theirs, ours)], state[key])
    for key in (key for key in state if "txt_proj.weight" in key):
        assert torch.allclose(loaded[key], state[key] - (torch.eye(WIDTH) if first else 0), atol=1e-7)
    batch = tiny.batch()
    expected = by_hand(model, batch)
    assert torch.allclose(run(model, batch).double(), expected, atol=1e-4 * float(expected.abs().max()))
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "ours"), batch), run(model, batch))


def test_the_published_10b_is_the_preset(tmp_path):
    """By its configuration alone: 35 blocks with the published indices."""
    from pydit.inference.published import _fitting_plan

    indices = [(19, 23, 29, 30, 31, 32, 33, 34), (2, 33, 34), (19, 23, 34)]
    assert _fitting_plan(35, indices, None) == PruningPlan.preset("ppcl-qwen-image-10b")
    with pytest.raises(UserError, match=r"plan: expected the checkpoint's layout \(35 blocks"):
        _fitting_plan(35, indices, PruningPlan.preset("ppcl-qwen-image-12b"))


def test_a_given_plan_and_broken_files(tmp_path):
    checkpoint(tmp_path, 4, single=(3,), output=(3,))
    plan = PruningPlan("qwen-image", 6, [(0, 1), (3, 4)], text_linear=[(2, 4)])
    with pytest.raises(UserError, match="plan: expected the checkpoint's layout"):
        load_published(tmp_path, plan)
    plan = PruningPlan("qwen-image", 6, [(0, 2)], text_linear=[(4, 5)])
    assert load_published(tmp_path, plan).source == [[0, 1, 2], [3], [4], [5]]
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"single_stream_index": [9]}, "expected single_stream_index as blocks 0 to 3"),
                            ({"ehs_proj_index": [1]}, "expected ehs_proj_index among single_stream_index"),
                            ({"ffn_proj_index": [0]}, "expected weights that the configuration explains")):
        write_json(tmp_path / "config.json", {**copy.deepcopy(config), **change})
        with pytest.raises(FormatError, match=message):
            load_published(tmp_path)
