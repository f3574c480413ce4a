"""Two processes read a transformer in shards: the one that is loaded whole, to the last bit, and never whole in memory."""

import multiprocessing
import shutil
import warnings

import pytest
import torch

from pydit import files, prune
from pydit.errors import FormatError
from pydit.inference.pipeline import _dtype_option, load_pipeline, save_pipeline
from pydit.models import get_adapter
from pydit.plan import PruningPlan
from tests.demo.pipelines import untrained
from tests.distill import ranks
from tests.inference.test_streaming import directory
from tests.models import tiny as models

DTYPES = {"teacher": torch.bfloat16, "shorter": torch.float32, "thinned": torch.float32}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Pipelines, and what two processes read of them."""
    out = tmp_path_factory.mktemp("sharded")
    shutil.copytree(untrained(), out / "teacher")
    for name, fields in (("shorter", {}), ("thinned", {"text_linear": [(3, 5)], "linear_ffn": [0], "affine": []})):
        pipe = load_pipeline(untrained(), dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            pipe.register_modules(transformer=prune(pipe.transformer, PruningPlan("qwen-image", 6, [(1, 2)], **fields)))
        save_pipeline(pipe, out / name)
    shutil.copytree(out / "teacher", out / "broken")
    config = files.read_json(out / "broken" / "transformer" / "config.json", what="test")
    files.write_json(out / "broken" / "transformer" / "config.json", config | {"num_layers": 7})
    directory(out / "flux.1", models.flux(num_layers=2, num_single_layers=2))
    directory(out / "sd3.5", models.sd3(num_layers=3, dual_attention_layers=(0,)))
    big(out / "big")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distill.ranks"])
    processes = [context.Process(target=ranks.live, args=("load_in_shards", rank, str(out))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    return out


def big(path):
    """A transformer of 350 MB."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=20, attention_head_dim=32, num_attention_heads=11,
            joint_attention_dim=24, axes_dims_rope=(8, 12, 12))
    directory(path, model.to(torch.float32).to_empty(device="cpu"), shard="100MB")


@pytest.mark.slow
@pytest.mark.parametrize("name", DTYPES)
def test_the_shards_are_those_of_the_whole_model(out, name):
    whole = load_pipeline(out / name, dtype=DTYPES[name]).transformer
    found, _ = files.load_safetensors(out / f"{name}.safetensors", what="test")
    velocity = found.pop("velocity")
    expected = dict(whole.named_parameters())
    assert set(found) == set(expected) and all(torch.equal(found[key], p) for key, p in expected.items())
    assert torch.equal(velocity, ranks.velocity(whole, DTYPES[name]))
    seen = [files.read_json(out / f"{name}-{rank}.json", what="test") for rank in range(2)]
    stored = sum(reader.numel() * 4 for reader in expected.values())  # the files hold float32
    rows = sum(4 * p[:1].numel() for p in expected.values())  # of an odd number, one process has one more
    assert sum(one["read"] for one in seen) == stored and all(one["read"] <= (stored + rows) / 2 for one in seen)
    assert all(one["class"] == type(whole).__name__ and one["sharded"] for one in seen)
    assert seen[0]["plan"] == (whole.plan.to_dict() if hasattr(whole, "plan") else None)


@pytest.mark.parametrize("family", ["flux.1", "sd3.5"])
def test_other_families_with_their_buffers(out, family):
    kind = get_adapter(family).stock_class()
    expected = kind.from_pretrained(out / family / "transformer", **_dtype_option(torch.bfloat16)).state_dict()
    found, _ = files.load_safetensors(out / f"{family}.safetensors", what="test")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_whole_model_does_not_fit(out):
    """Under a limit on data memory of three quarters of the model, beside what the process has already."""
    for rank in range(2):
        seen = files.read_json(out / f"big-{rank}.json", what="test")
        assert seen == {"loaded": True, "whole": False}


def test_weights_that_the_configuration_does_not_explain(out):
    message = files.read_json(out / "broken-1.json", what="test")
    with pytest.raises(FormatError, match="expected weights that match the config in .*broken.transformer, got"):
        raise FormatError(message)
    with pytest.raises(FormatError, match="expected weights that match the config in .*broken.transformer, got"):
        load_pipeline(out / "broken")


def test_rows_of_a_file(tmp_path):
    tensors = {"a": torch.arange(12, dtype=torch.bfloat16).view(4, 3), "b": torch.ones(5)}
    files.save_safetensors(tmp_path / "w.safetensors", tensors)
    reader = files.SafetensorsReader(tmp_path, "w", what="test")
    for start, stop in ((0, 4), (1, 3), (3, 4), (2, 2)):
        assert torch.equal(reader.rows("a", start, stop), tensors["a"][start:stop])
    assert torch.equal(reader.rows("b", 1, 3), tensors["b"][1:3]) and torch.equal(reader["b"], tensors["b"])
