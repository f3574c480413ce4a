"""The demo's pipeline: template, tokens, data streams, the training forward, training that resumes."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pydit.demo import data, teacher, train_teacher, world
from pydit.demo.latents import LatentBasis
from pydit.errors import UserError


@pytest.fixture(scope="module")
def pipeline():
    tokenizer = teacher.build_tokenizer()
    pipe = teacher.assemble(teacher.build_transformer(2, 1), teacher.build_vae(),
                            teacher.build_text_encoder(len(tokenizer)), tokenizer)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipe.transformer.parameters():  # away from the special values of a fresh model
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return pipe


def test_template_prefix_is_what_the_stock_pipeline_drops(pipeline):
    prefix, suffix = pipeline.prompt_template_encode.split("{}")
    assert (prefix, suffix) == (teacher.PREFIX, teacher.SUFFIX)
    assert len(pipeline.tokenizer(prefix)["input_ids"]) == 34 == pipeline.prompt_template_encode_start_idx


def test_every_prompt_is_one_token_a_word_and_a_suffix(pipeline):
    for prompt in world.all_prompts():
        ids = pipeline.tokenizer(teacher.PREFIX + prompt.text + teacher.SUFFIX)["input_ids"]
        assert len(ids) == 34 + len(prompt.text.split()) + 1, prompt.text
    assert max(len(prompt.text.split()) for prompt in world.all_prompts()) + 1 == data.TEXT_TOKENS


def test_text_encoder_returns_the_normalised_embedding(pipeline):
    embeds, mask = data.encode_prompts(pipeline, ["a red digit 4", "three circles"])
    ids, table_mask = train_teacher.prompt_table()
    row = next(i for i, p in enumerate(world.all_prompts()) if p.text == "a red digit 4")
    embedding = pipeline.text_encoder.model.language_model.embed_tokens.weight
    expected = torch.nn.functional.rms_norm(embedding[ids[row, :5]], (teacher.TEXT_WIDTH,), eps=1e-6)
    torch.testing.assert_close(embeds[0], expected, rtol=1e-4, atol=1e-4)
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2] and int(table_mask[row].sum()) == 5


def test_pack_is_the_pipelines(pipeline):
    latents = torch.randn(2, 8, 12, 12)
    assert torch.equal(data.pack(latents), pipeline._pack_latents(latents[:, None], 2, 8, 12, 12))


def test_an_image_depends_on_its_prompt_and_seed_alone(pipeline):
    prompts, seeds = ["a circle", "three red circles", "a circle"], [0, 1, 2]
    together = data.generate(pipeline, prompts, seeds=seeds, steps=2, guidance=2.0, progress=False)
    alone = data.generate(pipeline, prompts[1:2], seeds=seeds[1:2], steps=2, guidance=2.0, progress=False)
    assert together[0].shape == (48, 48, 3) and together[0].dtype == np.uint8
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1  # float rounding differs with the batch
    assert np.abs(together[0].astype(int) - together[2]).max() > 1


def test_latent_basis_keeps_what_matters():
    basis = LatentBasis.fit(8, images=512)
    generator = torch.Generator().manual_seed(0)
    images = world.sample_images(world.sample_indices(32, split="train", generator=generator), generator)
    code = basis.encode(images)
    assert code.shape == (32, 8, 12, 12) and 0.3 < code.std() < 1.5
    gram = basis.directions.T @ basis.directions
    torch.testing.assert_close(gram, torch.eye(8), rtol=0, atol=1e-4)


def _train(work, steps, *extra):
    args = ["transformer", "--work", str(work), "--steps", str(steps), "--no-compile", "--layers", "1", "--heads", "1",
            "--batch-size", "8", "--constant-share", "0.999", *extra]
    assert train_teacher.main(args) == 0


def test_whole_training_path_writes_a_pipeline_that_stock_diffusers_loads(tmp_path):
    _train(tmp_path, 2)
    assert train_teacher.main(["vae", "--work", str(tmp_path), "--steps", "2"]) == 0
    assert train_teacher.main(["export", "--work", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    code = (f"import sys; sys.modules['pydit'] = None; from diffusers import DiffusionPipeline; "
            f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'out')!r}); print(pipe.dtype, type(pipe).__name__); "
            "print(pipe('a red circle', height=48, width=48, num_inference_steps=2, output_type='np').images.shape)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.float32 QwenImagePipeline" in result.stdout and "(1, 48, 48, 3)" in result.stdout


def test_bad_arguments(tmp_path, capsys):
    for arguments, message in ((["vae", "--work", str(tmp_path)], "--steps, --minutes: expected exactly one"),
                               (["export", "--work", str(tmp_path)], "--work: expected a safetensors file"),
                               (["transformer", "--work", str(tmp_path), "--steps", "1", "--optimizer", "sgd"],
                                "--optimizer: expected muon or adamw, got 'sgd'")):
        with pytest.raises(SystemExit) as stop:
            train_teacher.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_the_committed_teacher_is_small_and_stock():
    if not teacher.ASSETS.exists():
        pytest.skip("no teacher is committed yet")
    weights = sum(p.stat().st_size for p in teacher.ASSETS.rglob("*.safetensors"))
    assert weights <= 12_000_000
    pipe = teacher.load_teacher()
    assert type(pipe.transformer).__name__ == "QwenImageTransformer2DModel" and pipe.transformer.config.num_layers >= 12
    assert pipe.transformer.config.attention_head_dim == 32 and pipe.transformer.dtype == torch.float32


def test_generate_wants_a_seed_per_prompt(pipeline):
    with pytest.raises(UserError, match=r"seeds: expected one per prompt \(2\), got 1"):
        data.generate(pipeline, ["a circle", "a ring"], seeds=[0], steps=1, progress=False)


def test_training_goes_on_from_a_pipeline(tmp_path):
    """The weights of --start, and the committed teacher's VAE where the work directory has none."""
    from pydit.inference.pipeline import load_pipeline

    start = teacher.build_untrained(tmp_path / "start", num_layers=1, heads=1, seed=7)
    arguments = ["transformer", "--work", str(tmp_path / "work"), "--start", str(start), "--steps", "1", "--no-compile",
                 "--layers", "1", "--heads", "1", "--batch-size", "2", "--learning-rate", "0", "--muon-learning-rate", "0"]
    assert train_teacher.main(arguments) == 0
    assert train_teacher.main(["export", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    before, after = load_pipeline(start), load_pipeline(tmp_path / "out")
    train_teacher.round_to_grid(before.transformer)
    for a, b in ((before.transformer, after.transformer), (teacher.load_teacher().vae, after.vae)):
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(x.bfloat16(), y.bfloat16())
    with pytest.raises(SystemExit) as stop:
        train_teacher.main([*arguments[:2], str(tmp_path / "other"), *arguments[3:8], "--layers", "2"])
    assert stop.value.code == 2
