"""Training the teacher: the fast forward is the stock one, runs resume exactly, the export is what trained."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline

from pydit import files
from pydit.demo import data, teacher, train_teacher, world
from pydit.demo.latents import LatentBasis
from pydit.demo.training_forward import TrainingForward
from pydit.distill.muon import Muon, orthogonalize
from pydit.errors import FormatError, UserError

TINY = train_teacher.Recipe(layers=1, heads=1, batch_size=4, warmup_steps=2)


@pytest.fixture(scope="module", autouse=True)
def small_basis():
    """Fit the latent basis on fewer images, and build the tokenizer once."""
    patch = pytest.MonkeyPatch()
    patch.setattr(LatentBasis, "fit", functools.cache(functools.partial(LatentBasis.fit, images=1024)))
    patch.setattr(teacher, "build_tokenizer", functools.cache(teacher.build_tokenizer))
    yield
    patch.undo()


def run_transformer(work, steps, recipe=TINY, save_seconds=1e9):
    train_teacher.train_transformer(work, train_teacher.Budget(steps, None), recipe, device="cpu",
                                    save_seconds=save_seconds, compile=False)


def run_vae(work, steps, save_seconds=1e9):
    train_teacher.train_vae(work, train_teacher.Budget(steps, None), device="cpu", save_seconds=save_seconds)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with a few steps of both stages."""
    work = tmp_path_factory.mktemp("work")
    run_transformer(work, 5)
    run_vae(work, 3)
    return work


@pytest.fixture
def model():
    """Two blocks whose norm weights are not one, so that leaving one out is seen."""
    model = teacher.build_transformer(num_layers=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(count=3, tokens=8):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(tokens) < torch.tensor([tokens, 3, 1])[:count, None]
    return (torch.randn(count, 36, 32, generator=generator), torch.rand(count, generator=generator),
            torch.randn(count, tokens, teacher.TEXT_WIDTH, generator=generator), mask)


def test_training_forward_equals_the_stock_forward_and_its_gradients(model):
    x, sigma, text, mask = batch()
    weight = torch.randn(3, 36, 32, generator=torch.Generator().manual_seed(2))

    def stock_forward(x, sigma, text, mask):
        return model(hidden_states=x, timestep=sigma, encoder_hidden_states=text,
                     encoder_hidden_states_mask=mask, img_shapes=[data.IMG_SHAPES] * 3, return_dict=False)[0]

    results = []
    for forward in (TrainingForward(model, [data.IMG_SHAPES], text_tokens=8, compile=False), stock_forward):
        model.zero_grad()
        out = forward(x, sigma, text, mask)
        (out * weight).sum().backward()
        results.append((out.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (fast, fast_gradients), (stock, stock_gradients) = results
    torch.testing.assert_close(fast, stock, atol=2e-5, rtol=1e-4)
    scale = max(g.abs().max() for g in stock_gradients.values() if g is not None)
    for name, gradient in stock_gradients.items():
        mine = fast_gradients[name]
        if gradient is None or mine is None:  # the last block's text output is unused
            assert all(g is None or not g.any() for g in (gradient, mine)), name
        else:
            torch.testing.assert_close(mine, gradient, atol=1e-5 * float(scale), rtol=1e-3,
                                       msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("run", [(True, False), (False, True), (False, False)])
def test_a_skipped_block_is_an_absent_one(model, run):
    x, sigma, text, mask = batch()
    with torch.no_grad():
        result = TrainingForward(model, [data.IMG_SHAPES], text_tokens=8, compile=False)(
            x, sigma, text, mask, torch.tensor(run))
        model.transformer_blocks = torch.nn.ModuleList(b for b, kept in zip(model.transformer_blocks, run, strict=True)
                                                       if kept)
        expected = model(hidden_states=x, timestep=sigma, encoder_hidden_states=text, encoder_hidden_states_mask=mask,
                         img_shapes=[data.IMG_SHAPES] * 3, return_dict=False)[0]
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)


def test_text_behind_the_mask_has_no_effect(model):
    x, sigma, text, mask = batch()
    forward = TrainingForward(model, [data.IMG_SHAPES], text_tokens=8, compile=False)
    with torch.no_grad():
        expected = forward(x, sigma, text, mask)
        changed = torch.where(mask[..., None], text, 100.0)
        torch.testing.assert_close(forward(x, sigma, changed, mask), expected, atol=1e-6, rtol=0)
        assert (forward(x, sigma, text + 1, mask) - expected).abs().max() > 1e-2


def test_student_text_is_what_the_pipeline_feeds_the_transformer(trained, tmp_path):
    pipe = QwenImagePipeline.from_pretrained(train_teacher.export(trained, tmp_path / "pipe"))
    tensors, _ = files.load_safetensors(trained / "transformer.safetensors", what="state")
    student = train_teacher.Student(TINY)
    student.load_state_dict({k.removeprefix("average."): v.bfloat16().float() for k, v in tensors.items()
                             if k.startswith("average.")})
    ids, mask = train_teacher.prompt_table()
    assert len(ids) == len(world.all_prompts()) + 1 and int(mask[-1].sum()) == 1
    for index in (0, 100, 700, len(ids) - 1):
        text = "" if index == len(ids) - 1 else world.all_prompts()[index].text
        embeds, _ = data.encode_prompts(pipe, [text])
        mine = student.text(ids[index][mask[index]])
        assert mine.shape == embeds[0].shape
        torch.testing.assert_close(mine, embeds[0], atol=1e-3, rtol=0)


def test_export_is_the_averaged_weights_in_bfloat16_and_loads_as_float32(trained, tmp_path):
    out = train_teacher.export(trained, tmp_path / "pipe")
    stored, _ = files.load_safetensors(out / "transformer/diffusion_pytorch_model.safetensors", what="export")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    state, _ = files.load_safetensors(trained / "transformer.safetensors", what="state")
    pipe = QwenImagePipeline.from_pretrained(out)
    for name, value in pipe.transformer.state_dict().items():
        assert value.dtype == torch.float32
        expected = state[f"average.transformer.{name}"]
        if value.ndim > 1:  # on a grid of its own, by design
            assert (value - expected).norm() <= 0.0145 * expected.norm(), name
        else:
            assert torch.equal(value, expected.bfloat16().float()), name
    assert {p.dtype for p in (*pipe.vae.parameters(), *pipe.text_encoder.parameters())} == {torch.float32}
    image, = data.generate(pipe, ["a circle"], seeds=[0], steps=2, progress=False)
    assert image.shape == (48, 48, 3)


def test_the_grid_is_the_coarsest_power_of_two_within_its_share():
    torch.manual_seed(0)
    layer = torch.nn.Linear(200, 300)
    torch.nn.init.normal_(layer.weight, std=0.3)
    before, bias = layer.weight.detach().double(), layer.bias.detach().clone()
    train_teacher.round_to_grid(layer, share=0.02)
    after = layer.weight.detach().double()
    step = after[after != 0].abs().min().item()
    assert float(torch.log2(torch.tensor(step))).is_integer() and torch.equal((after / step).round() * step, after)
    assert 0.01 * before.norm() < (after - before).norm() < 0.02 * before.norm() * 1.01
    assert torch.equal(layer.bias.detach(), bias)
    again = after.clone()
    train_teacher.round_to_grid(layer, share=0.02)
    assert torch.equal(layer.weight.detach().double(), again)
    zero = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(zero.weight)
    train_teacher.round_to_grid(zero)
    assert not zero.weight.any()


class Kill(Exception):
    """Stands for a kill in the middle of a run."""


@pytest.mark.parametrize("stage", ["transformer", "vae"])
def test_interrupted_run_ends_like_an_uninterrupted_one(stage, tmp_path, monkeypatch):
    run, steps = (run_transformer, 5) if stage == "transformer" else (run_vae, 3)
    run(tmp_path / "whole", steps)
    draws, sample = iter(range(100)), world.sample_images

    def killed(*args, **kwargs):
        if next(draws) == steps - 2:
            raise Kill
        return sample(*args, **kwargs)

    LatentBasis.fit(teacher.LATENT_CHANNELS)
    monkeypatch.setattr(world, "sample_images", killed)
    with pytest.raises(Kill):
        run(tmp_path / "parts", steps, save_seconds=0)
    monkeypatch.setattr(world, "sample_images", sample)
    assert files.read_json(tmp_path / "parts" / f"{stage}.json", what="state")["step"] == steps - 2
    run(tmp_path / "parts", steps)
    whole, parts = (files.load_safetensors(tmp_path / part / f"{stage}.safetensors", what="state")[0]
                    for part in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_finished_run_continues_with_a_larger_budget(trained, tmp_path):
    for name in ("transformer.safetensors", "transformer.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    run_transformer(tmp_path, 7)
    assert files.read_json(tmp_path / "transformer.json", what="state")["step"] == 7
    before, after = (files.load_safetensors(path / "transformer.safetensors", what="state")[0]
                     for path in (trained, tmp_path))
    assert not torch.equal(before["model.embedding"], after["model.embedding"])


def test_state_of_another_recipe_is_refused(trained):
    with pytest.raises(UserError, match="--work: expected a state of the same recipe"):
        run_transformer(trained, 9, dataclasses.replace(TINY, layers=2))


def test_truncated_state_is_refused_and_kept(trained, tmp_path):
    state = (trained / "transformer.safetensors").read_bytes()[:5000]
    (tmp_path / "transformer.safetensors").write_bytes(state)
    with pytest.raises(FormatError, match="--work: expected a complete safetensors file"):
        run_transformer(tmp_path, 9)
    assert (tmp_path / "transformer.safetensors").read_bytes() == state


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_steps_on_one_batch_reduce_its_loss(optimizer):
    recipe = dataclasses.replace(TINY, optimizer=optimizer)
    student = train_teacher.Student(recipe)
    forward = TrainingForward(student.transformer, [data.IMG_SHAPES], text_tokens=8, compile=False)
    matrices, others = train_teacher._groups(student, recipe)
    assert bool(matrices) == (optimizer == "muon")
    assert len(matrices) + len(others) == len(list(student.parameters()))
    optimizers = [torch.optim.AdamW(others, lr=2e-3), *([Muon(matrices)] if matrices else [])]
    x, sigma, _, mask = batch()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    losses = []
    for _ in range(30):
        loss = F.mse_loss(forward(x, sigma, student.text(torch.arange(24).view(3, 8)), mask), target)
        losses.append(loss.item())
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_muon_orthogonalises_every_matrix_of_a_batch():
    for shape in ((3, 12, 7), (3, 7, 12)):
        matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        result = orthogonalize(matrices).double()
        assert ((torch.linalg.svdvals(result) - 1).abs() < 0.4).all()
        left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
        # The iteration keeps the singular vectors: left^T result right is diagonal.
        core = left.mT @ result @ right.mT
        assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
        torch.testing.assert_close(orthogonalize(matrices[1:2])[0].double(), result[1], atol=1e-5, rtol=0)


def test_latent_code_is_the_leading_components_of_patches_in_the_vaes_layout():
    basis = LatentBasis.fit(teacher.LATENT_CHANNELS)
    generator = torch.Generator().manual_seed(7)
    images = world.sample_images(world.sample_indices(64, split="held_out", generator=generator), generator)
    code = basis.encode(images)
    assert code.shape == (64, 8, 12, 12)
    directions = basis.directions.double()
    torch.testing.assert_close(directions.T @ directions, torch.eye(8).double(), atol=1e-5, rtol=0)
    patch = images[5, :, 8:12, 16:20].reshape(-1).double()  # row 2, column 4 of the code
    expected = (patch - basis.mean.double()) @ directions / basis.scale.double()
    torch.testing.assert_close(code[5, :, 2, 4].double(), expected, atol=1e-5, rtol=0)
    decoded = torch.einsum("nzhw,z,pz->nhwp", code, basis.scale, basis.directions) + basis.mean
    tiles = images.view(64, 3, 12, 4, 12, 4).permute(0, 2, 4, 1, 3, 5).flatten(3)
    assert (decoded - tiles).square().mean() < 0.1 * (tiles - basis.mean).square().mean()


def test_sigmas_lie_between_zero_and_one_and_favour_the_middle():
    sigma = train_teacher.sample_sigmas(20_000, torch.Generator().manual_seed(0))
    assert sigma.min() > 0 and sigma.max() < 1
    middle = ((sigma > 0.3) & (sigma < 0.8)).float().mean()
    assert 0.6 < middle < 0.75  # uniform alone: 0.5
