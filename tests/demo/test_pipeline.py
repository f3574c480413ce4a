"""The stock pipeline samples what training optimises: its tokens, its sigmas, its steps, its batches."""

import copy
import itertools

import pytest
import torch
from diffusers import QwenImagePipeline

from pydit.demo import data, teacher, world
from pydit.errors import UserError
from pydit.inference.sampling import with_transformer

PROMPTS = ["a circle", "a red circle and a blue square"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return teacher.build_untrained(tmp_path_factory.mktemp("teacher") / "pipe", num_layers=2)


@pytest.fixture(scope="module")
def pipe(directory):
    pipe = QwenImagePipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count, seed=0):
    return torch.randn(count, 36, 4 * teacher.LATENT_CHANNELS, generator=torch.Generator().manual_seed(seed))


def test_words_have_distinct_tokens(pipe):
    token_of = {}
    for prompt in world.all_prompts():
        ids = pipe.tokenizer(prompt.text).input_ids
        for position, (word, token) in enumerate(zip(prompt.text.split(), ids, strict=True)):
            assert token_of.setdefault((word, position == 0), token) == token
    assert len(set(token_of.values())) == len(token_of)
    assert {word for word, _ in token_of} == set(world.VOCABULARY)


def test_scheduler_uses_the_sigmas_the_model_was_trained_for(pipe):
    seen = []
    pipe(prompt=PROMPTS[0], height=48, width=48, num_inference_steps=5, output_type="latent",
         callback_on_step_end=lambda _, index, timestep, kwargs: seen.append(float(timestep)) or {})
    assert seen == pytest.approx([1000, 800, 600, 400, 200])
    assert pipe.scheduler.sigmas.tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pipeline_is_euler_integration_of_the_velocity(pipe, guidance):
    steps, latents = 3, noise(2)
    result = pipe(prompt=PROMPTS, negative_prompt=["", ""], true_cfg_scale=guidance, height=48, width=48,
                  num_inference_steps=steps, latents=latents, output_type="latent").images
    embeds, mask = data.encode_prompts(pipe, PROMPTS)
    empty, _ = data.encode_prompts(pipe, ["", ""])
    x = latents.double()

    def velocity(sigma, embeds, mask):
        with torch.no_grad():
            return pipe.transformer(hidden_states=x.float(), timestep=torch.full((2,), sigma),
                                    encoder_hidden_states=embeds, encoder_hidden_states_mask=mask,
                                    img_shapes=[data.IMG_SHAPES] * 2, return_dict=False)[0].double()

    for step in range(steps):
        v = velocity(1 - step / steps, embeds, mask)
        if guidance > 1:
            free = velocity(1 - step / steps, empty, None)
            guided = free + guidance * (v - free)
            v = guided * v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        x = x - v / steps
    torch.testing.assert_close(result.double(), x, atol=1e-4, rtol=0)


def test_batches_resume_at_a_step_and_differ_between_steps_and_seeds(pipe):
    stream = data.make_batches(pipe, batch_size=4, seed=5)
    first, second = next(stream), next(stream)
    (batch, target) = next(data.make_batches(pipe, batch_size=4, seed=5, start_step=1))
    assert torch.equal(target, second[1])
    for name in ("hidden_states", "timestep", "encoder_hidden_states"):
        assert torch.equal(batch[name], second[0][name])
    assert not torch.equal(first[0]["hidden_states"], batch["hidden_states"])
    assert not torch.equal(next(data.make_batches(pipe, batch_size=4, seed=6))[1], first[1])


def test_pairs_are_one_state_with_and_without_its_prompt(pipe):
    single, (batch, target) = (next(data.make_batches(pipe, batch_size=3, seed=5, pairs=pairs)) for pairs in (False, True))
    for name in ("hidden_states", "timestep"):
        assert torch.equal(batch[name], single[0][name].repeat_interleave(2, dim=0))
    assert torch.equal(target, single[1].repeat_interleave(2, dim=0)) and len(batch["img_shapes"]) == 6
    mask, empty = batch["encoder_hidden_states_mask"], data.encode_prompts(pipe, [""])[0][0]
    for row, (embeds, told) in enumerate(zip(batch["encoder_hidden_states"], mask, strict=True)):
        single_mask = single[0]["encoder_hidden_states_mask"]
        length = single_mask[row // 2].sum() if single_mask is not None else single[0]["encoder_hidden_states"].shape[1]
        wanted = empty if row % 2 else single[0]["encoder_hidden_states"][row // 2, :length]
        assert told.sum() == len(wanted) and torch.equal(embeds[:len(wanted)], wanted)
    with pytest.raises(UserError, match="prompt_dropout: expected 0, because in pairs .*, got 0.1"):
        next(data.make_batches(pipe, batch_size=3, seed=5, pairs=True, prompt_dropout=0.1))


def test_batches_of_kept_images_repeat_images_but_not_noise(pipe):
    def take(count, start_step=0):
        return list(itertools.islice(
            data.make_batches(pipe, batch_size=4, seed=5, images=6, start_step=start_step), count))

    def clean(batch, target):  # x = (1 - s) clean + s noise, target = noise - clean
        return batch["hidden_states"] - batch["timestep"][:, None, None] * target

    def different(rows):
        same = (rows[:, None] - rows).abs().amax(-1) < 1e-4  # rounding of the mixture; images differ by 1e-2
        return len(same.unique(dim=0))

    items = take(12)
    assert different(torch.cat([clean(*item).flatten(1) for item in items])) == 6
    assert different(torch.cat([(item[1] + clean(*item)).flatten(1) for item in items])) == 48
    (batch, target), = take(1, start_step=7)
    assert torch.equal(target, items[7][1]) and torch.equal(batch["hidden_states"], items[7][0]["hidden_states"])
    assert torch.equal(batch["encoder_hidden_states"], items[7][0]["encoder_hidden_states"])


@pytest.mark.parametrize("batch_size, pairs", [(64, False), (8, True)])
def test_states_that_a_model_draws_are_those_of_its_own_guided_sampling(pipe, batch_size, pairs):
    """Every state of every image once, each with its prompt, by the pipeline's own steps; the pipeline stays as it is."""
    student, before = copy.deepcopy(pipe.transformer), pipe.transformer
    with torch.no_grad():
        student.proj_out.weight.mul_(0.5)
    stream = data.make_batches(pipe, batch_size=batch_size, seed=5, pairs=pairs, drawn_by=student)
    items = list(itertools.islice(stream, data.DRAWN * data.STEPS // batch_size))
    assert all(target is None for _, target in items) and pipe.transformer is before and not student._forward_pre_hooks
    rows = [(float(batch["timestep"][i]), batch["hidden_states"][i]) for batch, _ in items
            for i in range(0, len(batch["timestep"]), 1 + pairs)]
    sigmas = sorted({sigma for sigma, _ in rows}, reverse=True)
    assert sigmas == pytest.approx([1 - step / data.STEPS for step in range(data.STEPS)], abs=1e-6)
    assert len(torch.stack([state for _, state in rows]).flatten(1).unique(dim=0)) == len(rows)
    if pairs:
        assert all(torch.equal(batch["hidden_states"][::2], batch["hidden_states"][1::2]) for batch, _ in items)
    # One image drawn anew, from a state of noise with the text beside it, meets states that are all there.
    own = with_transformer(pipe, student)
    batch, row = next((batch, row) for batch, _ in items for row in range(0, len(batch["timestep"]), 1 + pairs)
                      if float(batch["timestep"][row]) == sigmas[0])
    noise, text, mask = (batch[name] for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask"))
    noise, text = noise[row], text[row] if mask is None else text[row, :int(mask[row].sum())]
    seen = []
    own.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["hidden_states"][0].clone()),
                                              with_kwargs=True)
    own(prompt_embeds=text[None], negative_prompt="", latents=noise[None], true_cfg_scale=data.GUIDANCE, height=48, width=48,
        num_inference_steps=data.STEPS, output_type="latent")
    for state in seen[::2]:
        assert any((state - other).abs().max() < 1e-4 for _, other in rows), "a state of that image is missing"


def test_states_that_a_model_draws_follow_its_weights_and_resume(pipe):
    student, options = copy.deepcopy(pipe.transformer), {"batch_size": 16, "seed": 5}
    first = [batch["hidden_states"] for batch, _ in
             itertools.islice(data.make_batches(pipe, drawn_by=student, **options), 40)]
    resumed = next(data.make_batches(pipe, drawn_by=student, start_step=38, **options))[0]["hidden_states"]
    assert torch.equal(resumed, first[38])
    assert not torch.equal(next(data.make_batches(pipe, drawn_by=student, batch_size=16, seed=6))[0]["hidden_states"], first[0])
    stream = data.make_batches(pipe, drawn_by=student, **options)
    next(stream)
    with torch.no_grad():
        student.proj_out.weight.mul_(0.5)
    later = [batch["hidden_states"] for batch, _ in itertools.islice(stream, 39)]
    assert torch.equal(later[0], first[1]) and torch.equal(later[34], first[35]) and not torch.equal(later[35], first[36])
    with pytest.raises(UserError, match="images: expected None, because drawn_by draws its own, got 8"):
        next(data.make_batches(pipe, drawn_by=student, images=8, **options))
    with pytest.raises(UserError, match="weights: expected None, because the prompts are given"):
        next(data.make_batches(pipe, [world.all_prompts()[0]], weights=(1.0,) * 7, **options))


def test_weights_choose_the_categories(pipe):
    weights = [0.0] * len(world.CATEGORIES)
    weights[-1] = 1.0
    asked = []

    def sample(indices, generator):
        asked.extend(indices.tolist())
        return torch.zeros(len(indices), 3, 48, 48)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "sample_images", sample)
        next(data.make_batches(pipe, batch_size=32, seed=0, weights=weights))
    assert {world.all_prompts()[i].category for i in asked} == {world.CATEGORIES[-1]}


def test_a_batch_is_noised_latents_with_its_velocity(pipe, monkeypatch):
    prompt = world.parse("three red circles")
    images = world.sample_images([prompt] * 64, torch.Generator().manual_seed(0))
    asked = []
    monkeypatch.setattr(world, "sample_images", lambda indices, *_, **__: asked.append(indices) or images)
    batch, target = next(data.make_batches(pipe, [prompt], batch_size=64, seed=1))
    assert [world.all_prompts()[i] for i in asked[0]] == [prompt] * 64
    sigma = batch["timestep"]
    assert sigma.min() > 0 and sigma.max() < 1 and 0.35 < sigma.mean() < 0.65
    with torch.no_grad():
        latents = pipe.vae.encode(images[:, :, None]).latent_dist.mean
    clean = pipe._pack_latents(latents, 64, 8, 12, 12)
    drawn = target + clean
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    noised = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * drawn
    torch.testing.assert_close(batch["hidden_states"], noised, atol=1e-5, rtol=0)
    embeds, _ = data.encode_prompts(pipe, [prompt.text])
    assert torch.equal(batch["encoder_hidden_states"], embeds.expand(64, -1, -1))
    assert batch["encoder_hidden_states_mask"] is None
    with torch.no_grad():
        assert pipe.transformer(**batch, return_dict=False)[0].shape == target.shape


def test_batches_mask_the_padding_of_shorter_prompts(pipe):
    prompts = [world.parse(text) for text in PROMPTS]
    batch, _ = next(data.make_batches(pipe, prompts, batch_size=16, seed=3))
    embeds, mask = data.encode_prompts(pipe, PROMPTS)
    rows = {tuple(row.tolist()) for row in batch["encoder_hidden_states_mask"]}
    assert rows == {tuple(row.tolist()) for row in mask}
    for row, kept in zip(batch["encoder_hidden_states"], batch["encoder_hidden_states_mask"], strict=True):
        assert torch.equal(row, embeds[int(kept.all())])
