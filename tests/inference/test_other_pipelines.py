"""Whole pipelines of FLUX.1 and SD3.5, from prompt to latents: pruned, saved, loaded, streamed, by us and by diffusers."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)

import pydit
from pydit.cli import main
from pydit.inference.streaming import prune_pipeline
from pydit.plan import PruningPlan
from tests.models import tiny

transformers = pytest.importorskip("transformers")
LETTERS = "abcdefghijklmnop"


def clip(width, projection):
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=8)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    words |= {letter + end: len(words) + n for n, (letter, end) in enumerate((a, b) for b in ("", "</w>") for a in LETTERS)}
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval(), transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=77)


def t5():
    torch.manual_seed(0)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return (transformers.T5EncoderModel(transformers.T5Config(vocab_size=40, d_model=24, d_kv=8, d_ff=16, num_layers=1,
                                                              num_heads=2)).eval(),
            transformers.T5Tokenizer(vocab=words, extra_ids=0))


def parts():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4, sample_size=16, shift_factor=0.1,
                        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3)
    return {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae.eval()}


def flux():
    (encoder, tokenizer), (encoder_2, tokenizer_2) = clip(16, False), t5()
    return FluxPipeline(transformer=tiny.flux(in_channels=16, guidance_embeds=True), text_encoder=encoder,
                        tokenizer=tokenizer, text_encoder_2=encoder_2, tokenizer_2=tokenizer_2, **parts())


def sd3():
    (encoder, tokenizer), (encoder_2, tokenizer_2), (encoder_3, tokenizer_3) = clip(8, True), clip(8, True), t5()
    return StableDiffusion3Pipeline(
        transformer=tiny.sd3(), text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2, text_encoder_3=encoder_3, tokenizer_3=tokenizer_3, **parts())


@pytest.fixture(scope="module", params=["flux.1", "sd3.5"])
def teacher(request, tmp_path_factory):
    """(family, directory of a stock pipeline)."""
    path = tmp_path_factory.mktemp("pipelines") / request.param
    {"flux.1": flux, "sd3.5": sd3}[request.param]().save_pretrained(path)
    return request.param, path


def draw(pipe):
    """Latents. Weights are copied first: those of a file lie wherever its header ends, and MKL's products depend, by a
    rounding, on how memory is aligned."""
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data.clone()
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe("abc d", num_inference_steps=2, height=8, width=8, max_sequence_length=16, output_type="latent",
                    generator=torch.Generator().manual_seed(1)).images


@pytest.mark.parametrize("kind", ["shorter", "linear FFN"])
def test_pruned_saved_and_loaded(teacher, kind, tmp_path):
    family, path = teacher
    depth = {"flux.1": 4, "sd3.5": 3}[family]
    plan = (PruningPlan.from_intervals(depth, [(0, 1)], family=family) if kind == "shorter" else
            PruningPlan(family, depth, linear_ffn=[1]))
    pipe = pydit.load_pipeline(path)
    stock = draw(pipe)
    assert torch.equal(stock, draw(DiffusionPipeline.from_pretrained(path)))
    if kind == "shorter":
        student = pydit.prune(pipe.transformer, plan)
    else:
        with pytest.warns(UserWarning, match="start as the identity"):
            student = pydit.prune(pipe.transformer, plan)
    pipe.register_modules(transformer=student)
    latents = draw(pipe)
    assert latents.isfinite().all() and not torch.equal(latents, stock)
    pydit.save_pipeline(pipe, tmp_path / "saved")
    assert torch.equal(draw(pydit.load_pipeline(tmp_path / "saved")), latents)
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(tmp_path / "saved")), latents)
    if kind == "shorter":
        assert main(["prune", str(path), "--plan", str(_saved(plan, tmp_path)), "--out", str(tmp_path / "streamed")]) == 0
    else:
        with pytest.warns(UserWarning, match="start as the identity"):
            prune_pipeline(path, plan, tmp_path / "streamed")
    assert torch.equal(draw(pydit.load_pipeline(tmp_path / "streamed")), latents)


def _saved(plan, folder):
    plan.save(folder / "plan.json")
    return folder / "plan.json"


def test_accelerated(teacher):
    _family, path = teacher
    pipe = pydit.load_pipeline(path)
    stock = draw(pipe)
    pydit.accelerate(pipe)
    torch.testing.assert_close(draw(pipe), stock, rtol=1e-3, atol=1e-3)
    assert {row["path"] for row in pydit.report(pipe)["model"]["blocks"]} == {"pydit"}
    assert torch.equal(draw(pydit.restore(pipe)), stock)
