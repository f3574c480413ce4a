"""Pipeline directories: exact reload, loaded by stock diffusers, refused in one sentence when broken, never half-written."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel

from pydit import files
from pydit.errors import FormatError, UserError
from pydit.inference.checks import check_pipeline
from pydit.inference.pipeline import PLAN_FILE, content_hash, load_pipeline, save_pipeline
from pydit.plan import PruningPlan
from pydit.pruning import prune
from tests.demo.pipelines import untrained
from tests.inference.test_ip_adapter import ip_adapter
from tests.models import tiny


def _inputs(transformer):
    generator = torch.Generator().manual_seed(3)
    config = transformer.config
    return {"hidden_states": torch.randn(2, 36, config.in_channels, generator=generator), "timestep": torch.tensor([0.3, 0.8]),
            "encoder_hidden_states": torch.randn(2, 5, config.joint_attention_dim, generator=generator),
            "encoder_hidden_states_mask": None, "img_shapes": [[(1, 6, 6)]] * 2}


@torch.no_grad()
def _output(transformer):
    return transformer(**_inputs(transformer)).sample


@pytest.fixture
def pruned():
    pipe = load_pipeline(untrained(), dtype=torch.float32)
    student = prune(pipe.transformer, PruningPlan.from_intervals(6, [(1, 2), (4, 5)]))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    pipe.register_modules(transformer=student)
    return pipe


def test_reload_is_exact_and_restores_the_pruned_class(pruned, tmp_path):
    before = _output(pruned.transformer)
    save_pipeline(pruned, tmp_path / "student")
    assert pruned.transformer.plan.intervals == ((1, 2), (4, 5))  # saving leaves the pipeline as it was
    loaded = load_pipeline(tmp_path / "student", dtype=torch.float32).transformer
    assert type(loaded) is type(pruned.transformer)
    assert loaded.plan == pruned.transformer.plan
    assert (loaded.source, loaded.replaced) == (pruned.transformer.source, pruned.transformer.replaced)
    assert (_output(loaded) - before).abs().max() == 0


def test_stock_diffusers_loads_it(pruned, tmp_path):
    save_pipeline(pruned, tmp_path / "student")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student", local_files_only=True)
    assert type(stock.transformer) is QwenImageTransformer2DModel and stock.transformer.config.num_layers == 4
    assert torch.equal(_output(stock.transformer), _output(pruned.transformer))
    assert "pydit" not in (tmp_path / "student" / "model_index.json").read_text()


def test_a_stock_pipeline_round_trips(tmp_path):
    pipe = load_pipeline(untrained(), dtype=torch.float32)
    save_pipeline(pipe, tmp_path / "copy")
    copy = load_pipeline(tmp_path / "copy", dtype=torch.float32)
    assert type(copy.transformer) is QwenImageTransformer2DModel and not (tmp_path / "copy" / PLAN_FILE).exists()
    assert torch.equal(_output(copy.transformer), _output(pipe.transformer))


def test_dtype_is_applied_to_every_model():
    pipe = load_pipeline(untrained(), dtype=torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def _copy(tmp_path):
    return shutil.copytree(untrained(), tmp_path / "broken")


def _truncate(file, by):
    file.write_bytes(file.read_bytes()[:-by])


def _to_pickle(path):
    for file in (path / "transformer").glob("*.safetensors"):
        file.unlink()
    (path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def _drop_tensor(path):
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, metadata = files.load_safetensors(file, what="test")
    tensors.pop("proj_out.bias")
    files.save_safetensors(file, tensors, metadata)


def _other_depth(path):
    plan = PruningPlan.from_intervals(60, [(3, 4)])
    files.write_json(path / PLAN_FILE, {"format": "pydit-pruned-pipeline", "version": 1, "plan": plan.to_dict(),
                                        "source": [list(layers) for layers in plan.source]})


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(("breakage", "message"), [
    (lambda p: shutil.rmtree(p), "expected a pipeline directory, got a path that does not exist"),
    (lambda p: (p / "model_index.json").unlink(), "expected a directory with model_index.json"),
    (lambda p: (p / "model_index.json").write_text("{"), "expected JSON"),
    (lambda p: (p / "model_index.json").write_text("[]"), "expected an object"),
    (lambda p: shutil.rmtree(p / "vae"), "expected the component vae"),
    (lambda p: _truncate(p / "transformer" / WEIGHTS, 100), "complete safetensors file, got a broken one"),
    (lambda p: (p / "vae" / WEIGHTS).write_bytes(b"\x00\x01"), "shorter than its header"),
    (lambda p: (p / "vae" / WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"notjson!"), "unreadable header"),
    (_to_pickle, "expected transformer as safetensors, got a pickle"),
    (_drop_tensor, "got 1 missing keys .first: proj_out.bias"),
    (lambda p: (p / "transformer" / "config.json").write_text("{"), "expected JSON"),
    (lambda p: (p / PLAN_FILE).write_text("{}"), "expected format pydit-pruned-pipeline, version 1"),
    (_other_depth, "expected a plan that leaves 6 blocks"),
])
def test_broken_directories_are_refused(tmp_path, breakage, message):
    path = _copy(tmp_path)
    breakage(path)
    with pytest.raises(FormatError, match=message) as caught:
        load_pipeline(path)
    assert str(caught.value).startswith("pipeline: ") and "\n" not in str(caught.value)


def test_a_weight_file_of_another_shape_is_refused(tmp_path):
    path = _copy(tmp_path)
    config = json.loads((path / "transformer" / "config.json").read_text())
    (path / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 5}))
    with pytest.raises(FormatError, match="unexpected keys"):
        load_pipeline(path)


def test_what_would_not_come_back_is_not_written(pruned, tmp_path):
    """Diffusers writes adapters' names into the weights, or fails where there are none."""
    model = pruned.transformer
    name = next(name for name, module in model.named_modules() if name.endswith("attn.to_q"))
    lora = {f"transformer.{name}.lora_{side}.weight": torch.ones(*shape) for side, shape in
            (("A", (2, model.get_submodule(name).in_features)), ("B", (model.get_submodule(name).out_features, 2)))}
    model.lora_layers = "student"
    model.load_lora_adapter(lora)
    with pytest.raises(UserError, match="pipe: expected plain weights, got transformer with adapters, .* unload them"):
        save_pipeline(pruned, tmp_path / "x")
    model.fuse_lora()
    model.unload_lora()
    expected = _output(model)
    save_pipeline(pruned, tmp_path / "fused")
    assert torch.equal(_output(load_pipeline(tmp_path / "fused").transformer), expected)
    model.transformer_blocks[0].attn.fused_projections = True
    with pytest.raises(UserError, match="got transformer with fused ones, .* unfuse_qkv_projections before saving"):
        save_pipeline(pruned, tmp_path / "x")
    model.transformer_blocks[0].attn.fused_projections = False
    model.proj_out.to("meta")
    with pytest.raises(UserError, match="pipe: expected weights at hand, got transformer, which offloading has emptied"):
        save_pipeline(pruned, tmp_path / "x")
    with pytest.raises(UserError, match="pipe: expected a diffusers pipeline, got PrunedQwen.*save_pretrained"):
        save_pipeline(model, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]


@pytest.mark.parametrize("pruned", [False, True])
def test_what_flux_cannot_hold_is_not_written(pruned, tmp_path):
    from diffusers import FluxPipeline

    def make():
        model = prune(tiny.flux(), PruningPlan("flux.1", 4, linear_ffn=[1])) if pruned else tiny.flux()
        nothing = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        return FluxPipeline(**nothing, transformer=model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adapted, widened = make(), make()
    ip_adapter(adapted.transformer)
    with pytest.raises(UserError, match="pipe: expected attention without an IP-adapter, .* unload_ip_adapter before"):
        save_pipeline(adapted, tmp_path / "x")
    widened.transformer.x_embedder = torch.nn.Linear(8, 64)  # as a Control LoRA, unloaded, leaves it
    with pytest.raises(UserError, match="transformer: expected an x_embedder of the 4 channels .* got 8, as a Control"):
        save_pipeline(widened, tmp_path / "x")
    if not pruned:
        with pytest.raises(UserError, match="transformer: expected an x_embedder of the 4 channels"):
            prune(widened.transformer, PruningPlan("flux.1", 4, [(0, 1)]))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("call", "name"), [
    (lambda: load_pipeline(3), "pipeline"), (lambda: PruningPlan.load(3), "plan"),
    (lambda: PruningPlan("qwen-image", 3).save(3), "out")])
def test_what_is_no_path_is_refused(call, name):
    with pytest.raises(UserError, match=f"{name}: expected a path, got int"):
        call()


def test_a_compiled_transformer_is_saved_as_itself(pruned, tmp_path):
    student = pruned.transformer
    expected = _output(student)
    pruned.register_modules(transformer=torch.compile(student, backend="eager"))
    save_pipeline(pruned, tmp_path / "stock")
    assert pruned.transformer._orig_mod is student
    assert torch.equal(_output(load_pipeline(tmp_path / "stock").transformer), expected)
    with pytest.warns(UserWarning, match="start as the identity"):
        thinned = prune(load_pipeline(untrained()).transformer, PruningPlan("qwen-image", 6, linear_ffn=[1]))
    pruned.register_modules(transformer=torch.compile(thinned, backend="eager"))
    save_pipeline(pruned, tmp_path / "thinned", remote_code=True)
    assert torch.equal(_output(load_pipeline(tmp_path / "thinned").transformer), _output(thinned))


def test_content_hash_sees_names_and_bytes(tmp_path):
    path = _copy(tmp_path)
    assert content_hash(path) == content_hash(untrained())
    (path / "vae" / "config.json").write_text((path / "vae" / "config.json").read_text() + "\n")
    assert content_hash(path) != content_hash(untrained())


def test_check_reads_no_weights(tmp_path):
    path = _copy(tmp_path)
    assert check_pipeline(path)["_class_name"] == "QwenImagePipeline"


def test_a_full_disk_leaves_the_old_directory(pruned, tmp_path, monkeypatch):
    save_pipeline(pruned, tmp_path / "student")
    before = content_hash(tmp_path / "student")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_pipeline(pruned, tmp_path / "student")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["student"] and content_hash(tmp_path / "student") == before
    assert type(pruned.transformer).__name__.startswith("Pruned")


def test_safetensors_own_error_becomes_an_os_error(pruned, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(pruned), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_pipeline(pruned, tmp_path / "student")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_foreign_directory_is_not_replaced(pruned, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    with pytest.raises(UserError, match="out: expected a new path"):
        save_pipeline(pruned, tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"x"


@pytest.fixture(scope="module")
def thinned(tmp_path_factory):
    """Directories of one pipeline whose transformer no stock class carries: plain, with a shim; and its output."""
    path = tmp_path_factory.mktemp("thinned")
    pipe = load_pipeline(untrained(), dtype=torch.float32)
    with pytest.warns(UserWarning, match="start as the identity"):
        pipe.register_modules(transformer=prune(pipe.transformer, PruningPlan(
            "qwen-image", 6, [(1, 2)], text_linear=[(3, 5)], linear_ffn=[0])))
    save_pipeline(pipe, path / "plain")
    save_pipeline(pipe, path / "shim", remote_code=True)
    depth = prune(load_pipeline(untrained(), dtype=torch.float32).transformer, PruningPlan.from_intervals(6, [(1, 2)]))
    pipe.register_modules(transformer=depth)
    save_pipeline(pipe, path / "depth")
    return path


def test_by_diffusers_in_a_process_of_its_own(thinned):
    """Where pydit is not installed, then with the shim, which imports it, then with pydit imported."""
    script = """
import sys
import warnings
from diffusers import DiffusionPipeline

def load(name, **options):
    try:
        model = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}", local_files_only=True, **options).transformer
        print(name, type(model).__name__, getattr(getattr(model, "plan", None), "linear_ffn", ""))
    except Exception as error:
        print(name, " ".join(str(error).split()))

sys.modules["pydit"] = None
load("depth")
load("plain")
load("shim")
load("shim", trust_remote_code=True)
del sys.modules["pydit"]
load("shim", trust_remote_code=True)
load("plain")
"""
    done = subprocess.run([sys.executable, "-c", script, str(thinned)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].strip() == "depth QwenImageTransformer2DModel"
    # Newer versions of diffusers ask first; 0.39 imports what the pipeline names, which sys.modules forbids here.
    assert re.match("plain .*(pydit is not one of the libraries|import of pydit halted)", lines[1])
    assert "Pass `trust_remote_code=True`" in lines[2]
    assert "transformer: expected the package pydit, which pruned this model, got an environment without it" in lines[3]
    assert lines[4:] == [f"{name} PrunedQwenImageTransformer2DModel (0,)" for name in ("shim", "plain")]


def test_both_reload_to_the_last_bit(thinned):
    models = [load_pipeline(thinned / name, dtype=torch.float32).transformer for name in ("plain", "shim")]
    assert torch.equal(_output(models[0]), _output(models[1])) and models[0].plan == models[1].plan
    import pydit

    assert type(models[0]) is pydit.PrunedQwenImageTransformer2DModel
