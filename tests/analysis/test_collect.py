"""Collected statistics against states captured by hand; saving, merging, padding, seeds."""

import itertools
import weakref

import pytest
import torch

from pydit.analysis import ActivationStats, collect, detect, score
from pydit.errors import FormatError, UserError
from pydit.models import get_adapter
from pydit.stats import CKA, Moments, linear_cka
from tests.models import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.transformer(3)


def batches(n=6):
    return [tiny.batch(images=4, seed=seed) for seed in range(n)]


def captured(model, batch):
    """stream -> list of [tokens, C] at every boundary, real tokens only."""
    capture = get_adapter(model).capture(model, batch, range(4))
    mask = batch["encoder_hidden_states_mask"].bool()
    return {"image": [capture.states[k][0].flatten(0, 1) for k in range(4)],
            "text": [capture.states[k][1][mask] for k in range(4)]}


def test_moments_see_every_real_token_of_the_probe_batches(model):
    stats = collect(model, batches(), progress=False)
    for stream in ("image", "text"):
        for layer in range(3):
            expected = Moments(64, 64)
            for batch in batches()[0::2]:
                states = captured(model, batch)[stream]
                expected.update(states[layer], states[layer + 1])
            got = stats.moments[stream][layer]
            assert got.count == expected.count
            assert torch.allclose(got.m_xy, expected.m_xy)
    assert stats.moments["image"][0].count == 3 * 4 * 16
    assert stats.images_seen == 24 and not stats.last_text_used


def test_a_batch_holds_two_boundaries_at_a_time():
    """Not those of all blocks: for Qwen-Image at 1328 x 1328 they would be 2.8 GB."""
    model, alive, most = tiny.transformer(8), [], []

    def left(_block, _inputs, outputs):
        alive.append(weakref.ref(outputs[1]))
        most.append(sum(reference() is not None for reference in alive))

    handles = [block.register_forward_hook(left) for block in model.transformer_blocks]
    stats = collect(model, batches(4), tokens_per_batch=4, progress=False)
    for handle in handles:
        handle.remove()
    assert len(most) == 4 * 8 and max(most) <= 3  # the block's input and output, and the one just moved on
    assert all(len(sample) == 9 for sample in stats.samples["image"])


def test_samples_are_the_same_real_tokens_at_every_boundary(model):
    stats = collect(model, batches(), tokens_per_batch=10, progress=False)
    for stream in ("image", "text"):
        assert len(stats.samples[stream]) == 3
        for index, batch in enumerate(batches()[1::2]):
            states, sample = captured(model, batch)[stream], stats.samples[stream][index]
            assert sample.shape == (4, 10, 64)
            position = (sample[0][:, None] == states[0][None]).all(-1).float().argmax(1)
            assert len(set(position.tolist())) == 10
            for k in range(4):
                assert torch.equal(sample[k], states[k][position])
            owner = torch.arange(4).repeat_interleave(16) if stream == "image" else \
                torch.arange(4).repeat_interleave(7)[batch["encoder_hidden_states_mask"].bool().flatten()]
            assert torch.equal(stats.sample_ids[stream][index], owner[position] + 4 * (2 * index + 1))


def test_padding_changes_nothing(model):
    def poisoned(batch):
        text = batch["encoder_hidden_states"].clone()
        text[batch["encoder_hidden_states_mask"] == 0] = 100.0
        return {**batch, "encoder_hidden_states": text}

    clean = collect(model, batches(2), progress=False)
    dirty = collect(model, [poisoned(batch) for batch in batches(2)], progress=False)
    for stream in ("image", "text"):
        assert torch.allclose(clean.samples[stream][0], dirty.samples[stream][0], atol=1e-5)
        assert torch.allclose(clean.moments[stream][2].m_xx, dirty.moments[stream][2].m_xx, rtol=1e-4, atol=1e-3)


def test_model_is_not_changed_and_seed_decides(model):
    before = tiny.fingerprint(model)
    first, again, other = (collect(model, batches(), tokens_per_batch=8, progress=False, seed=seed)
                           for seed in (0, 0, 1))
    assert tiny.same(before, model.state_dict())
    assert torch.equal(first.samples["image"][0], again.samples["image"][0])
    assert not torch.equal(first.samples["image"][0], other.samples["image"][0])


@pytest.mark.parametrize("fraction, samples", [(0.5, 4), (0.25, 2), (0.75, 6)])
def test_endless_batches_and_sample_fraction(model, fraction, samples):
    stats = collect(model, itertools.cycle(batches(2)), max_batches=8, sample_fraction=fraction, progress=False)
    assert len(stats.samples["image"]) == samples
    assert stats.moments["image"][0].count == (8 - samples) * 4 * 16


def assert_equal(a, b):
    assert (a.family, a.num_layers, a.width, a.last_text_used, a.images_seen) == \
        (b.family, b.num_layers, b.width, b.last_text_used, b.images_seen)
    for stream in ("image", "text"):
        for x, y in zip(a.moments[stream], b.moments[stream], strict=True):
            assert all(torch.equal(v, y.state_dict()[k]) for k, v in x.state_dict().items())
        for x, y in zip(a.samples[stream] + a.sample_ids[stream], b.samples[stream] + b.sample_ids[stream],
                        strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype


def test_file_round_trip(model, tmp_path):
    stats = collect(model, batches(), progress=False)
    stats.save(tmp_path / "stats.safetensors")
    assert_equal(ActivationStats.load(tmp_path / "stats.safetensors"), stats)


def test_bfloat16_model(tmp_path):
    model = tiny.transformer(2).bfloat16()
    stats = collect(model, [tiny.cast(batch, torch.bfloat16) for batch in batches(4)], progress=False)
    assert stats.samples["image"][0].dtype == torch.bfloat16
    stats.save(tmp_path / "stats.safetensors")
    assert_equal(ActivationStats.load(tmp_path / "stats.safetensors"), stats)
    matrix, low, high = stats.cka_matrix("text")
    assert torch.isfinite(matrix).all() and (low <= high).all()


def test_merge_equals_one_run(model):
    whole = collect(model, batches(4), progress=False)
    first, second = collect(model, batches(4)[:2], progress=False), collect(model, batches(4)[2:], progress=False)
    merged = first.merge(second)
    assert merged.images_seen == 16
    for stream in ("image", "text"):
        assert torch.allclose(merged.moments[stream][1].m_xy, whole.moments[stream][1].m_xy)
        assert len(merged.samples[stream]) == 2
        assert merged.sample_ids[stream][1].min() >= 8


def test_cka_matrix(model):
    stats = collect(model, batches(8), progress=False)
    for stream in ("image", "text"):
        matrix, low, high = stats.cka_matrix(stream)
        assert matrix.shape == (4, 4)
        assert torch.allclose(matrix.diagonal(), torch.ones(4, dtype=torch.float64))
        assert (low <= matrix + 1e-9).all() and (matrix <= high + 1e-9).all()
    one = collect(model, batches(2), progress=False)
    with pytest.raises(UserError, match="expected at least 2 sample batches with 4 or more text tokens, got 1"):
        one.cka_matrix("text")
    assert torch.allclose(one.cka("text").matrix().diagonal(), torch.ones(4, dtype=torch.float64))  # without interval
    with pytest.raises(UserError, match="expected at least 1 sample batch with 4 or more text tokens, got 0"):
        ActivationStats("qwen-image", 3, 8).cka("text")
    assert abs(linear_cka(one.samples["image"][0][0], one.samples["image"][0][3]) - float(
        one.merge(one).cka_matrix("image")[0][0, 3])) < 1e-9
    with pytest.raises(UserError, match="stream: expected one of image, text, got 'both'"):
        one.cka_matrix("both")


@pytest.mark.parametrize("options, message", [
    ({"max_batches": 1}, "max_batches: expected at least 2, got 1"),
    ({"sample_fraction": 1.0}, "sample_fraction: expected a number between 0 and 1, got 1.0"),
    ({"tokens_per_batch": 3}, "tokens_per_batch: expected at least 4, got 3"),
])
def test_bad_options(model, options, message):
    with pytest.raises(UserError, match=message):
        collect(model, batches(2), progress=False, **options)


def test_bad_batches(model):
    with pytest.raises(UserError, match="got 1 probe and 0 sample batches"):
        collect(model, batches(1), progress=False)
    with pytest.raises(UserError, match="batches: expected an iterable of dicts of forward arguments, got NoneType"):
        collect(model, None)
    with pytest.raises(UserError, match="batch: expected a dict of forward arguments, got list"):
        collect(model, [[1], [2]], progress=False)
    broken = tiny.batch()
    broken["hidden_states"][0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="expected finite values"):
        collect(model, [broken, broken], progress=False)


def test_merge_refuses_another_model(model):
    stats = collect(model, batches(2), progress=False)
    with pytest.raises(UserError, match="other: expected num_layers 3, got 2"):
        stats.merge(collect(tiny.transformer(2), batches(2), progress=False))
    with pytest.raises(UserError, match="other: expected ActivationStats, got list"):
        stats.merge([stats])


def test_a_path_is_no_statistics():
    for function in (detect, score):
        with pytest.raises(UserError, match="stats: expected ActivationStats, got str"):
            function("stats.safetensors")


def test_bad_files(model, tmp_path):
    from pydit import files

    stats = collect(model, batches(2), progress=False)
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    tensors, metadata = files.load_safetensors(path, what="stats")
    with pytest.raises(FormatError, match="expected pydit-activation-stats version 1"):
        files.save_safetensors(path, tensors, {**metadata, "version": "2"})
        ActivationStats.load(path)
    with pytest.raises(FormatError, match="m_xx is missing"):
        files.save_safetensors(path, {k: v for k, v in tensors.items() if k != "moments.text.1.m_xx"}, metadata)
        ActivationStats.load(path)
    with pytest.raises(FormatError, match="that does not fit"):
        files.save_safetensors(path, tensors, {**metadata, "num_layers": "4"})
        ActivationStats.load(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(FormatError, match="complete safetensors"):
        ActivationStats.load(path)


def test_resumed_run_equals_an_uninterrupted_one(model, tmp_path):
    """Stopped after 3 batches, saved, loaded, continued."""
    whole = collect(model, batches(), with_ablation=True, progress=False)
    seen = []
    part = collect(model, batches(3), with_ablation=True, progress=False, on_batch=lambda s: seen.append(s.batches_seen))
    part.save(tmp_path / "part.safetensors")
    part = ActivationStats.load(tmp_path / "part.safetensors")
    assert seen == [1, 2, 3] and part.batches_seen == 3
    resumed = collect(model, batches()[3:], with_ablation=True, progress=False, resume=part, max_batches=6)
    assert resumed.images_seen == whole.images_seen and resumed.batches_seen == 6
    for stream in ("image", "text"):
        for a, b in zip(resumed.moments[stream], whole.moments[stream], strict=True):
            torch.testing.assert_close(a.m_xy, b.m_xy, rtol=1e-10, atol=1e-10)
        for a, b in zip(resumed.samples[stream], whole.samples[stream], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(resumed.sample_ids[stream], whole.sample_ids[stream], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(resumed.ablation.losses, whole.ablation.losses)
    assert torch.equal(resumed.ablation.batches, whole.ablation.batches)
    with pytest.raises(UserError, match="^resume: expected num_layers 2, got 3"):
        collect(tiny.transformer(2), batches(2), resume=part, progress=False)
    with pytest.raises(UserError, match="^resume: expected ActivationStats, got str"):
        collect(model, batches(2), resume="stats.safetensors", progress=False)


def test_cka_rows_are_tokens_or_images(model):
    stats = collect(model, [tiny.batch(images=5, seed=seed) for seed in range(6)], progress=False)
    images, cka = stats.cka_matrix("image", rows="image")[0], CKA(4)
    for batch, ids in zip(stats.samples["image"], stats.sample_ids["image"], strict=True):
        cka.update([torch.stack([state[ids == k].double().mean(0) for k in ids.unique()]) for state in batch])
    torch.testing.assert_close(images, cka.matrix())
    assert not torch.allclose(images, stats.cka_matrix("image")[0])
    with pytest.raises(UserError, match="rows: expected token or image, got 'prompt'"):
        stats.cka_matrix("image", rows="prompt")
    few = collect(model, batches(4), progress=False)
    few.sample_ids["image"] = [torch.zeros_like(ids) for ids in few.sample_ids["image"]]
    with pytest.raises(UserError, match="at least 2 sample batches with 4 or more image images"):
        few.cka_matrix("image", rows="image")


def test_clip_takes_shared_outliers_out_of_cka(model):
    """8 tokens that share one massive channel make unrelated boundaries look alike."""
    generator = torch.Generator().manual_seed(0)
    stats = ActivationStats("qwen-image", 1, 64)
    for _ in range(3):
        batch = torch.randn(2, 256, 64, generator=generator)
        batch[:, :8, 0] += 100
        stats.add_sample({"image": batch, "text": batch}, {name: torch.zeros(256).long() for name in ("image", "text")})
    assert stats.cka_matrix("image")[0][0, 1] > 0.8
    assert abs(stats.cka_matrix("image", clip=5.0)[0][0, 1]) < 0.25
    with pytest.raises(UserError, match="clip: expected a number above 0"):
        stats.cka_matrix("image", clip=0.0)


def test_projection_keeps_lengths_and_products(model):
    """64 channels to 48 directions: the same for every boundary, so linear relations between blocks survive."""
    stats = collect(model, batches(), project=48, tokens_per_batch=10, progress=False)
    whole = collect(model, batches(), tokens_per_batch=10, progress=False)
    assert (stats.width, stats.projected_from) == (48, 64) and stats.samples["image"][0].shape == (4, 10, 48)
    small, large = (torch.stack([s.samples["image"][k] for k in range(3)]).double() for s in (stats, whole))
    ratio = small.square().sum(-1) / large.square().sum(-1)
    assert (ratio - 1).square().mean().sqrt() < 1.5 * (2 / 48) ** 0.5  # the standard error that is stated
    rows, images = (t.permute(1, 0, 2, 3).flatten(1, 2) for t in (large, small))
    found = torch.linalg.lstsq(rows.flatten(0, 1), images.flatten(0, 1)).solution
    assert len(rows.flatten(0, 1)) > 64 and found.shape == (64, 48)
    torch.testing.assert_close(rows.flatten(0, 1) @ found, images.flatten(0, 1), rtol=1e-3, atol=1e-3)
    assert stats.moments["image"][0].m_xx.shape == (48, 48)
    with pytest.raises(UserError, match="project: expected 8 to 63 directions, got 64"):
        collect(model, batches(), project=64, progress=False)
    with pytest.raises(UserError, match="other: expected width 48, got 64"):
        stats.merge(whole)


def test_a_layer_that_is_not_there_raises(model):
    stats = collect(model, batches(2), progress=False)
    for layer in (3, -1):
        with pytest.raises(UserError, match=f"layer: expected 0 to 2, got {layer}"):
            stats.probe(layer, "image")
    with pytest.raises(UserError, match="stream: expected one of image, text, got 'img'"):
        stats.probe(0, "img")
    with pytest.raises(UserError, match=r"boundaries: expected numbers in 0..3, got \[4\]"):
        get_adapter(model).capture(model, batches(1)[0], [4])


def test_memory_estimate_is_what_tensors_take(model):
    stats = collect(model, batches(), tokens_per_batch=10, progress=False)
    size = sum(t.numel() * t.element_size() for stream in ("image", "text") for m in stats.moments[stream]
               for t in m.state_dict().values() if t.ndim)
    size += sum(b.numel() * b.element_size() for stream in ("image", "text") for b in stats.samples[stream])
    assert ActivationStats.estimate_bytes(3, 64, sample_batches=3, tokens=10) == size


@pytest.mark.parametrize("dual, single", [(0, 3), (3, 0)])
def test_a_flux_model_of_one_kind_of_block(dual, single, tmp_path):
    """A run without blocks begins nowhere; its statistics come back from their file."""
    model = tiny.flux(num_layers=dual, num_single_layers=single)
    stats = collect(model, [tiny.flux_batch(seed) for seed in range(4)], progress=False)
    stats.save(tmp_path / "stats.safetensors")
    found = ActivationStats.load(tmp_path / "stats.safetensors")
    assert found.starts == stats.starts == (0,)
    assert detect(found, "bi", target=2).intervals == ((0, 2),)
