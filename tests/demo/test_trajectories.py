"""The teacher's samples as training data: what is recorded is what the pipeline did."""

import itertools

import pytest
import torch
from diffusers import QwenImagePipeline

from pydit.demo import teacher, trajectories, world

STEPS, GUIDANCE = 3, 2.5


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return QwenImagePipeline.from_pretrained(teacher.build_untrained(tmp_path_factory.mktemp("teacher") / "pipe",
                                                                     num_layers=2))


@pytest.fixture(scope="module")
def recorded(pipe):
    return trajectories.record(pipe, 5, seed=3, steps=STEPS, guidance=GUIDANCE, batch_size=4, progress=False)


def test_a_trajectory_is_that_of_the_sampler(pipe, recorded):
    """Each state follows from the one before and the recorded velocities, guided and rescaled as the pipeline does."""
    states, told = recorded["states"].double(), recorded["velocities"].double()
    assert states.shape == (5, STEPS, 36, pipe.transformer.config.in_channels)
    assert told.shape == (5, STEPS, 2, *states.shape[2:])
    assert recorded["timesteps"].tolist() == pytest.approx([1.0, 2 / 3, 1 / 3])
    v = told[:, :, 1] + GUIDANCE * (told[:, :, 0] - told[:, :, 1])
    v *= told[:, :, 0].norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(states[:, 1:], states[:, :-1] - v[:, :-1] / STEPS, atol=1e-4, rtol=0)
    assert all(world.all_prompts()[index].category in world.CATEGORIES for index in recorded["prompts"].tolist())


def test_batches_are_pairs_with_what_the_teacher_says(pipe, recorded):
    batch, target = next(trajectories.make_batches(pipe, recorded, batch_size=6, seed=1))
    assert torch.equal(batch["hidden_states"][0::2], batch["hidden_states"][1::2])
    assert torch.equal(batch["timestep"][0::2], batch["timestep"][1::2])
    with torch.no_grad():
        velocity = pipe.transformer(**batch, return_dict=False)[0]
    torch.testing.assert_close(velocity, target, atol=2e-4, rtol=1e-3)
    assert not torch.equal(target[0::2], target[1::2])  # one of a pair has no prompt


def test_the_stream_resumes_at_a_step(pipe, recorded):
    items = list(itertools.islice(trajectories.make_batches(pipe, recorded, batch_size=4, seed=5), 3))
    batch, target = next(trajectories.make_batches(pipe, recorded, batch_size=4, seed=5, start_step=2))
    assert torch.equal(target, items[2][1]) and not torch.equal(target, items[1][1])
    assert torch.equal(batch["encoder_hidden_states"], items[2][0]["encoder_hidden_states"])
