"""Pruning on disk: equal to pruning in memory, to the last bit, for every init; in bounded memory; whole or nothing."""

import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from pydit import files, weights
from pydit.errors import FormatError, UserError
from pydit.inference.pipeline import PLAN_FILE
from pydit.inference.streaming import WEIGHTS, prune_pipeline
from pydit.models import get_adapter
from pydit.plan import PruningPlan
from pydit.pruning import prune
from tests.models import tiny

MODELS = {"qwen-image": lambda: tiny.transformer(8),
          "flux.1": lambda: tiny.flux(num_layers=4, num_single_layers=5),
          "sd3.5": lambda: tiny.sd3(num_layers=7, dual_attention_layers=(0, 1, 2))}
PLANS = [
    ("qwen-image", {"intervals": [(1, 3), (5, 6)]}, "position-average"),
    ("qwen-image", {"intervals": [(1, 3), (5, 6)]}, "last"),
    ("qwen-image", {"intervals": [(1, 3)], "text_linear": [(4, 7)], "linear_ffn": [0],
                    "linear_text_ffn": [1], "dead_tensors": False}, "middle"),
    ("flux.1", {"intervals": [(0, 1), (5, 7)], "linear_ffn": [5], "single_stream": (2, 3)}, "average"),
    ("sd3.5", {"intervals": [(0, 1), (4, 6)], "affine": [3]}, "first"),
    ("sd3.5", {"intervals": [(4, 6)]}, "average"),
]


def directory(path, model, shard="5GB"):
    """A pipeline directory with nothing but a transformer in it, of which pruning reads no more."""
    model.save_pretrained(path / "transformer", max_shard_size=shard)
    files.write_json(path / "model_index.json", {"_class_name": "Pipeline", "scheduler": [None, None],
                                                 "transformer": ["diffusers", type(model).__name__]})
    return path


@pytest.mark.parametrize("family, fields, init", PLANS)
def test_equal_to_pruning_in_memory(tmp_path, family, fields, init):
    model = MODELS[family]()
    plan = PruningPlan(family, get_adapter(model).num_layers(model), **fields)
    path = directory(tmp_path / "teacher", model, shard="200KB")
    assert len(list((path / "transformer").glob("*.safetensors"))) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = prune(model, plan, init=init)
        prune_pipeline(path, plan, tmp_path / "out", init=init, shard_bytes=300_000)
    folder = tmp_path / "out" / "transformer"
    kind = get_adapter(model).stock_class() if plan.is_stock else type(expected)
    loaded, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert tiny.same(expected.state_dict(), loaded.state_dict())
    if not plan.is_stock:
        assert loaded.plan == plan and loaded.init == init
    data = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    assert data["source"] == expected.source and data.get("init", "first") == init
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers" if plan.is_stock else "pydit", kind.__name__]


def test_bounded_memory(tmp_path):
    """A transformer of 320 MB, pruned where 320 MB of data fit beside the libraries only if it is never whole."""
    path = tmp_path / "big"
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 20, "attention_head_dim": 32,
              "num_attention_heads": 11, "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12)}
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config)
    model = model.to(torch.float32).to_empty(device="cpu")
    size = sum(p.numel() * 4 for p in model.parameters())
    directory(path, model, shard="100MB")
    del model
    assert size > 350e6
    PruningPlan.from_intervals(20, [(2, 9), (11, 14)]).save(tmp_path / "plan.json")
    script = textwrap.dedent(f"""
        import resource
        from pydit.inference.streaming import prune_pipeline
        from pydit.models import get_adapter
        from pydit.plan import PruningPlan
        get_adapter("qwen-image")  # the libraries are loaded before the limit is set
        import safetensors.torch
        used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
        limit = used + {size // 2}
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            bytearray({size})
            raise SystemExit("the limit does not hold")
        except MemoryError:
            pass
        plan = PruningPlan.load({str(tmp_path / "plan.json")!r})
        prune_pipeline({str(path)!r}, plan, {str(tmp_path / "out")!r}, init="average", shard_bytes=20_000_000)
        """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reader = weights.SafetensorsReader(tmp_path / "out" / "transformer", WEIGHTS, what="test")
    assert sum(1 for key in reader.keys() if key.endswith("attn.to_q.weight")) == 10  # noqa: SIM118


def test_refusals_leave_nothing_behind(tmp_path):
    path = directory(tmp_path / "teacher", tiny.transformer(4), shard="200KB")
    plan = PruningPlan.from_intervals(4, [(1, 2)])
    before = sorted(tmp_path.iterdir())
    for arguments, error, message in (
            ((path, plan, tmp_path / "out", {"init": "probe"}), UserError, "init: expected one of first, middle, last, average"),
            ((path, PruningPlan("flux.1", 4), tmp_path / "out", {}), UserError, "plan: expected a plan for qwen-image"),
            ((path, PruningPlan.from_intervals(5, [(1, 2)]), tmp_path / "out", {}), UserError, "the model's 4 layers, got one for 5"),
            ((path, plan, path, {}), UserError, "out: expected a directory apart from"),
            ((path, plan, path / "transformer", {}), UserError, "out: expected a directory apart from"),
            ((tmp_path, plan, tmp_path / "out", {}), FormatError, "expected a directory with model_index.json")):
        *given, options = arguments
        with pytest.raises(error, match=message):
            prune_pipeline(*given, **options)
    config = json.loads((path / "transformer" / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes_4bit"}}
    files.write_json(path / "transformer" / "config.json", quantized)
    with pytest.raises(UserError, match="transformer: expected plain weights, got quantized ones in .*; prune before"):
        prune_pipeline(path, plan, tmp_path / "out")
    files.write_json(path / "transformer" / "config.json", config | {"num_layers": 3})
    with pytest.raises(FormatError, match="expected weights that match the config in .* unexpected tensors"):
        prune_pipeline(path, PruningPlan.from_intervals(3, [(1, 2)]), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
