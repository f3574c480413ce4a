"""Whole pipelines of Qwen-Image that edit images or take them apart: stock, accelerated, baked, pruned, saved, loaded.

Their sizes are fixed to a million pixels; here images of 32 x 48 stand for those.
"""

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
)
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)
from PIL import Image

import pydit
from pydit.cli import main
from pydit.inference.pipeline import load_pipeline
from pydit.plan import PruningPlan
from tests.demo.pipelines import untrained
from tests.models import tiny

KINDS = {"edit": (QwenImageEditPipeline, {}), "edit plus": (QwenImageEditPlusPipeline, {"zero_cond_t": True}),
         "layered": (QwenImageLayeredPipeline, {"use_layer3d_rope": True, "use_additional_t_cond": True})}
STEPS = 3


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_layered):
        size = (48, 32, None) if module is pipeline_qwenimage_edit else (48, 32)
        monkeypatch.setattr(module, "calculate_dimensions", lambda *_, size=size: size)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 32 * 48)


def make(kind):
    cls, config = KINDS[kind]
    parts = load_pipeline(untrained(), dtype=torch.float32).components
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, latents_mean=[0.0] * 4,
                                 temperal_downsample=[False, True], latents_std=[1.0] * 4)
    width = parts["text_encoder"].config.get_text_config().hidden_size
    return cls(scheduler=parts["scheduler"], vae=vae.eval(), text_encoder=parts["text_encoder"],
               tokenizer=parts["tokenizer"], processor=parts["tokenizer"],  # the real one needs torchvision
               transformer=tiny.transformer(4, joint_attention_dim=width, **config))


def draw(pipe):
    """Latents with guidance. Weights are copied first, as in test_other_pipelines."""
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(3)
    width = pipe.transformer.config.joint_attention_dim
    image = Image.linear_gradient("L").convert("RGB").resize((48, 32))
    options = {"layers": 2, "resolution": 640} if isinstance(pipe, QwenImageLayeredPipeline) else {"height": 32, "width": 32}
    if isinstance(pipe, QwenImageEditPlusPipeline):
        image = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    texts = {f"{sign}prompt_embeds{end}": torch.randn(1, length, width, generator=generator) if not end else
             (torch.arange(length) < kept)[None].long()
             for sign, length, kept in (("", 7, 7), ("negative_", 5, 3)) for end in ("", "_mask")}
    pipe.set_progress_bar_config(disable=True)
    latents = []

    def keep(_pipe, _step, _time, tensors):
        latents.append(tensors["latents"])
        return tensors

    with torch.no_grad():  # "latent" fails in QwenImageLayeredPipeline of diffusers 0.42
        pipe(image=image, prompt="a" if isinstance(pipe, QwenImageLayeredPipeline) else None, **texts, **options,
             num_inference_steps=STEPS, true_cfg_scale=3.0, output_type="pt", callback_on_step_end=keep,
             generator=torch.Generator().manual_seed(1))
    return latents[-1]


def paths(pipe, kind):
    return {row["path"] for row in pydit.report(pipe)["model"][kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_and_baked(kind):
    pipe = make(kind)
    stock, times = draw(pipe), pipe.scheduler.timesteps / 1000
    assert stock.isfinite().all() and len(times) == STEPS
    pydit.accelerate(pipe)
    fast = draw(pipe)
    torch.testing.assert_close(fast, stock, rtol=1e-3, atol=1e-3)
    assert not torch.equal(fast, stock) and paths(pipe, "blocks") == paths(pipe, "attention") == {"pydit"}
    pydit.bake_schedule(pipe, times)
    assert torch.equal(draw(pipe), fast) and paths(pipe, "modulation") == {"table"}
    assert torch.equal(draw(pydit.restore(pipe)), stock)
    pydit.bake_schedule(pipe, times[:1], on_miss="extend")
    assert torch.equal(draw(pipe), stock)
    pydit.restore(pipe)
    assert torch.equal(draw(pydit.accelerate(pipe, exact=True)), stock)


@pytest.mark.parametrize("plan", [PruningPlan.from_intervals(4, [(1, 2)]),
                                  PruningPlan("qwen-image", 4, text_linear=[(1, 2)], linear_ffn=[0])],
                         ids=["shorter", "thinned"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*start as the identity")
def test_pruned_saved_and_loaded(kind, plan, tmp_path):
    pipe = make(kind)
    pipe.save_pretrained(tmp_path / "teacher")
    stock = draw(pipe)
    pipe.register_modules(transformer=pydit.prune(pipe.transformer, plan))
    latents, times = draw(pipe), pipe.scheduler.timesteps / 1000
    assert latents.isfinite().all() and not torch.allclose(latents, stock)
    pydit.save_pipeline(pipe, tmp_path / "student")
    loaded = [pydit.load_pipeline(tmp_path / "student"), DiffusionPipeline.from_pretrained(tmp_path / "student")]
    plan.save(tmp_path / "plan.json")
    assert main(["prune", str(tmp_path / "teacher"), "--plan", str(tmp_path / "plan.json"), "--out",
                 str(tmp_path / "streamed")]) == 0
    loaded.append(pydit.load_pipeline(tmp_path / "streamed"))
    for other in loaded:
        assert type(other) is KINDS[kind][0] and torch.equal(draw(other), latents)
    student = loaded[0]
    pydit.bake_schedule(pydit.accelerate(student), times)
    torch.testing.assert_close(draw(student), latents, rtol=1e-3, atol=1e-3)
    assert paths(student, "blocks") == {"pydit"} and paths(student, "modulation") == {"table"}
    assert torch.equal(draw(pydit.restore(student)), latents)
