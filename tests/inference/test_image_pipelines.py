"""Pipelines of FLUX.1 and SD3.5 that start from an image, or have a ControlNet: stock, accelerated, pruned, restored."""

import diffusers
import pytest
import torch
from PIL import Image

import pydit
from pydit.errors import UserError
from pydit.inference.streaming import prune_pipeline
from pydit.plan import PruningPlan
from tests.inference import test_other_pipelines as stock_pipelines
from tests.models import tiny

pytest.importorskip("transformers")


def flux(cls, transformer=None, **parts):
    found = {**stock_pipelines.flux().components, **parts}
    if transformer is not None:
        found["transformer"] = transformer
    return getattr(diffusers, cls)(**{name: part for name, part in found.items() if part is not None})


def sd3(cls, **parts):
    found = {**stock_pipelines.sd3().components, **parts}
    return getattr(diffusers, cls)(**{name: part for name, part in found.items() if part is not None})


def enlarged(controlnet):
    """A ControlNet whose outputs, zero as they are made, do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if "controlnet_" in name:
                parameter.normal_(std=0.3)
    return controlnet.eval()


def flux_controlnet():
    return enlarged(diffusers.FluxControlNetModel.from_transformer(
        tiny.flux(in_channels=16, guidance_embeds=True), attention_head_dim=32, num_attention_heads=2))


def sd3_controlnet():
    return enlarged(diffusers.SD3ControlNetModel.from_transformer(tiny.sd3(), num_layers=2,
                                                                   num_extra_conditioning_channels=0))


SIZE, TEXT = {"height": 16, "width": 16}, {"max_sequence_length": 16}
PICTURE = Image.linear_gradient("L").convert("RGB").resize((16, 16))
MASK = Image.linear_gradient("L").resize((16, 16)).point(lambda value: 255 * (value > 127))
KINDS = {  # how it is made, what it is called with beside the prompt, the family
    "flux image to image": (lambda: flux("FluxImg2ImgPipeline"), {"image": PICTURE, "strength": 0.9, **SIZE}, "flux.1"),
    "flux inpaint": (lambda: flux("FluxInpaintPipeline"),
                     {"image": PICTURE, "mask_image": MASK, "strength": 0.9, **SIZE}, "flux.1"),
    "flux fill": (lambda: flux("FluxFillPipeline", tiny.flux(in_channels=36, out_channels=16, guidance_embeds=True)),
                  {"image": PICTURE, "mask_image": MASK, **SIZE}, "flux.1"),
    "flux kontext": (lambda: flux("FluxKontextPipeline"),
                     {"image": PICTURE, "_auto_resize": False, "max_area": 256, **SIZE}, "flux.1"),
    "flux controlnet": (lambda: flux("FluxControlNetPipeline", controlnet=flux_controlnet(), image_encoder=None,
                                     feature_extractor=None),
                        {"control_image": PICTURE, "controlnet_conditioning_scale": 0.8, **SIZE}, "flux.1"),
    "sd3 image to image": (lambda: sd3("StableDiffusion3Img2ImgPipeline"), {"image": PICTURE, "strength": 0.9, **SIZE},
                           "sd3.5"),
    "sd3 controlnet": (lambda: sd3("StableDiffusion3ControlNetPipeline", controlnet=sd3_controlnet()),
                       {"control_image": PICTURE, "controlnet_conditioning_scale": 0.8, **SIZE}, "sd3.5"),
}


def draw(pipe, options):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(2)
    with torch.no_grad():
        return pipe(prompt="abc d", num_inference_steps=3, **options, **TEXT, output_type="latent",
                    generator=torch.Generator().manual_seed(1)).images


@pytest.mark.parametrize("kind", KINDS)
def test_accelerated_pruned_and_restored(kind):
    make, options, family = KINDS[kind]
    pipe = make()
    stock = draw(pipe, options)
    assert stock.isfinite().all()
    pydit.accelerate(pipe)
    fast = draw(pipe, options)
    torch.testing.assert_close(fast, stock, rtol=1e-3, atol=1e-3)
    assert not torch.equal(fast, stock)
    report = pydit.report(pipe)["model"]
    assert ("controlnets" in report) == ("controlnet" in kind)
    for part in (report, *report.get("controlnets", ())):
        assert {row["path"] for row in (*part["blocks"], *part["attention"])} == {"pydit"}
    assert torch.equal(draw(pydit.restore(pipe), options), stock)
    assert torch.equal(draw(pydit.accelerate(pipe, exact=True), options), stock)
    pydit.restore(pipe)
    plan = PruningPlan.from_intervals({"flux.1": 4, "sd3.5": 3}[family], [(0, 1)], family=family)
    pipe.register_modules(transformer=pydit.prune(pipe.transformer, plan))
    pruned = draw(pipe, options)
    assert pruned.isfinite().all() and not torch.allclose(pruned, stock)
    torch.testing.assert_close(draw(pydit.accelerate(pipe), options), pruned, rtol=1e-3, atol=1e-3)


def test_a_controlnet_beside_a_shorter_transformer_needs_the_plan(tmp_path):
    """Stock diffusers spreads its residuals over the blocks that are left."""
    make, options, family = KINDS["flux controlnet"]
    pipe, plan = make(), PruningPlan.from_intervals(4, [(0, 1)], family=family)
    pydit.save_pipeline(pipe, tmp_path / "teacher")
    pipe.register_modules(transformer=pydit.prune(pipe.transformer, plan))
    pruned, words = draw(pipe, options), "controlnet: its residuals belong to layers .* load it by pydit.load_pipeline"
    with pytest.warns(UserWarning, match=words):
        pydit.save_pipeline(pipe, tmp_path / "student")
    with pytest.warns(UserWarning, match=words):
        prune_pipeline(tmp_path / "teacher", plan, tmp_path / "streamed")
    for name in ("student", "streamed"):
        torch.testing.assert_close(draw(pydit.load_pipeline(tmp_path / name), options), pruned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flux controlnet", "sd3 controlnet"])
def test_several_controlnets_are_not_written(kind, tmp_path):
    """They have no config; diffusers finds that out in the middle."""
    pipe = KINDS[kind][0]()
    several = diffusers.FluxMultiControlNetModel if "flux" in kind else diffusers.SD3MultiControlNetModel
    pipe.register_modules(controlnet=several([pipe.controlnet, pipe.controlnet]))
    with pytest.raises(UserError, match="pipe: .* got controlnet of the class .*MultiControlNetModel.* each of its nets"):
        pydit.save_pipeline(pipe, tmp_path / "student")
    assert not list(tmp_path.iterdir())
