"""Recorded batches are what the transformer was fed; streams can be entered anywhere; images are named and whole."""

import itertools

import pytest
import torch
from PIL import Image

from pydit.demo import data
from pydit.errors import FormatError, UserError
from pydit.inference import sampling
from pydit.inference.pipeline import load_pipeline
from tests.demo.pipelines import untrained


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline(untrained(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_recorded_batches_replay_the_trajectory(pipe):
    """A step of the sampler is latents += (next sigma - sigma) * velocity, so each batch follows from the one before."""
    batches = list(sampling.record_batches(pipe, ["a red circle"], steps=3, seed=0, height=48, width=48))
    assert len(batches) == 3 and not any("return_dict" in batch for batch in batches)
    sigmas = [float(batch["timestep"]) for batch in batches]
    assert sigmas == sorted(sigmas, reverse=True)
    with torch.no_grad():
        for now, after in itertools.pairwise(batches):
            velocity = pipe.transformer(**now).sample
            expected = now["hidden_states"] + (after["timestep"] - now["timestep"])[:, None, None] * velocity
            assert torch.allclose(after["hidden_states"], expected, atol=1e-4)
    assert not pipe.transformer._forward_pre_hooks


def test_the_hook_goes_even_when_drawing_fails(pipe):
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        list(sampling.record_batches(pipe, [None], steps=1, seed=0, height=48, width=48))
    assert not pipe.transformer._forward_pre_hooks


def test_a_stream_can_be_entered_anywhere(pipe):
    arguments = {"steps": 2, "seed": 1, "size": 48}
    whole = list(itertools.islice(sampling.endless_batches(pipe, ["a circle", "a ring"], **arguments), 7))
    later = list(itertools.islice(sampling.endless_batches(pipe, ["a circle", "a ring"], start=3, **arguments), 4))
    for ours, theirs in zip(whole[3:], later, strict=True):
        assert torch.equal(ours["hidden_states"], theirs["hidden_states"])
    assert not torch.equal(whole[0]["hidden_states"], whole[4]["hidden_states"])  # the second round has other noise


def test_an_image_depends_on_prompt_and_seed_only(pipe):
    def draw(prompts, seeds):
        return [image.tobytes() for image in sampling.generate(pipe, prompts, seeds=seeds, steps=2, guidance=1.0, height=48,
                                                               width=48)]

    first, second = draw(["a circle", "a ring"], [0, 1])
    assert draw(["a ring"], [1]) == [second] and draw(["a ring"], [2]) != [second] and first != second


def test_guidance_needs_a_pipeline_that_has_it():
    class Plain:
        def __call__(self, prompt, num_inference_steps, output_type, generator):
            raise AssertionError("not reached")

    with pytest.raises(UserError, match="guidance: expected 1, because Plain has no guidance, got 3"):
        list(sampling.generate(Plain(), ["x"], seeds=[0], steps=1, guidance=3.0))


def test_images_are_named_and_whole(tmp_path, monkeypatch):
    images = [Image.new("RGB", (4, 4))] * 2
    paths = list(sampling.save_images(images, ["A red / circle!", "日本"], [3, 4], tmp_path / "out"))
    assert [p.name for p in paths] == ["000-a-red-circle-seed3.png", "001-image-seed4.png"]

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        list(sampling.save_images(images, ["x", "y"], [0, 1], tmp_path / "full"))
    assert not list((tmp_path / "full").iterdir())


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text(" a cat \n\na dog\n", encoding="utf-8")
    assert sampling.read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]
    (tmp_path / "p.txt").write_bytes("a cat\u2028 and\x0c another\r\na dog\ra fox".encode())  # of three systems, as open() does
    assert sampling.read_prompts(tmp_path / "p.txt") == ["a cat\u2028 and\x0c another", "a dog", "a fox"]
    (tmp_path / "b.txt").write_bytes(b"\xff\xff")
    for name, message in (("none", "is no file"), ("b.txt", "expected UTF-8")):
        with pytest.raises(FormatError, match=message):
            sampling.read_prompts(tmp_path / name)


def test_a_picture_of_nan_is_named(pipe):
    """Not black pixels, as a pipeline makes of it."""
    arguments = {"seeds": [0], "steps": 2, "height": 48, "width": 48}
    with pytest.raises(UserError, match=r"guidance: expected numbers .*, got NaN in it with guidance 1e\+300 in float32"):
        list(sampling.generate(pipe, ["a red circle"], guidance=1e300, **arguments))
    with pytest.raises(UserError, match="guidance: expected numbers of which a picture can be made"):
        data.generate(pipe, ["a red circle"], seeds=[0], steps=2, guidance=1e300, progress=False)


def test_the_mark_of_a_byte_order_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na ring\n", encoding="utf-8-sig")
    assert sampling.read_prompts(tmp_path / "prompts.txt") == ["a red circle", "a ring"]
