"""Captioned images: what is read and what is listed instead, sizes, the cache and its resume, batches."""

import io
import json
import math
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from pydit import FormatError, UserError, files
from pydit.data import CachedDataset, Sample, Skipped, build_cache, cache, read_samples
from pydit.data.buckets import buckets, decode, nearest
from pydit.inference.pipeline import load_pipeline
from tests.demo.pipelines import untrained


def picture(seed, width=48, height=48, form="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def folder(path, count=5, **options):
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{i:03d}.png").write_bytes(picture(i, **options))
        (path / f"{i:03d}.txt").write_text(f"picture number {i}\n")
    return path


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(untrained(), dtype=torch.float32)


# Samples.

def test_a_folder_in_order(tmp_path):
    folder(tmp_path / "a" / "b", 2)
    (tmp_path / "z.jpg").write_bytes(picture(9, form="JPEG"))
    (tmp_path / "z.json").write_text(json.dumps({"other": 1, "prompt_en": " a last one "}))
    (tmp_path / "notes.md").write_text("no sample")
    found = list(read_samples(tmp_path))
    assert [(s.key, s.caption) for s in found] == [
        ("a/b/000", "picture number 0"), ("a/b/001", "picture number 1"), ("z", "a last one")]
    assert found[0].image == picture(0)


def test_shards_in_order(tmp_path):
    shard(tmp_path / "s2.tar", [("x.png", picture(2)), ("x.txt", b"two")])
    shard(tmp_path / "s1.tar", [("d/a.1.0.jpg", picture(1, form="JPEG")), ("d/a.json", b'{"caption": "one"}'),
                                ("d/b.txt", b"no image here")])
    found = list(read_samples(tmp_path))
    assert [s.key for s in found] == ["s1.tar:d/a", "s1.tar:d/b", "s2.tar:x"]
    assert isinstance(found[0], Sample) and found[0].caption == "one"
    assert found[1] == Skipped("s1.tar:d/b", "no image among .txt")
    assert list(read_samples(tmp_path / "s2.tar")) == [Sample("s2.tar:x", picture(2), "two")]


def test_odd_names_and_captions_are_samples_or_listed(tmp_path, pipe):
    """Bytes that are not UTF-8, half a surrogate pair, a byte order mark, capitals, shards that were joined."""
    shard(tmp_path / "s" / "s.tar", [("a.png", picture(0)), ("a.txt", b"one"), ("a.png", picture(1)), ("a.txt", b"two"),
                                     (os.fsdecode(b"caf\xe9.png"), picture(2)), (os.fsdecode(b"caf\xe9.txt"), b"\xef\xbb\xbfthree"),
                                     ("half.png", picture(3)), ("half.json", b'{"caption": "a cat \\ud83d"}')])
    assert [(s.key, getattr(s, "caption", None)) for s in read_samples(tmp_path / "s")] == [
        ("s.tar:a", "one"), ("s.tar:a", "two"), ("s.tar:caf\\xe9", "three"), ("s.tar:half", None)]
    index = build_cache(pipe, tmp_path / "s", tmp_path / "cache", resolution=48, progress=False)
    assert len(index["samples"]) == 3 and index["skipped"][0]["reason"].startswith("caption cannot be read")
    (tmp_path / "A.PNG").write_bytes(picture(0))
    (tmp_path / "A.TXT").write_text("capitals")
    (tmp_path / "s" / "s.tar").unlink()
    assert [s.caption for s in read_samples(tmp_path)] == ["capitals"]
    shard(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match="got none of 0 .the first: .*empty.tar: nothing in it"):
        build_cache(pipe, tmp_path / "empty.tar", tmp_path / "none", resolution=48, progress=False)
    assert not (tmp_path / "none").exists()


def test_sixteen_bits_of_grey_are_the_same_picture():
    grey, file = np.tile(np.arange(48, dtype=np.uint16) * 1365, (48, 1)), io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    found = decode(file.getvalue(), ((48, 48),))
    assert np.abs(found[:, :, 0].astype(int) - grey // 257).max() <= 1


@pytest.mark.parametrize("parts, reason", [
    ({"txt": b"  \n"}, "no caption"), ({}, "no caption"), ({"json": b'{"caption": 3}'}, "no caption"),
    ({"json": b"[1]"}, "no caption"), ({"json": b"{"}, "caption cannot be read"),
    ({"txt": b"\xff\xfe\xff"}, "caption cannot be read"), ({"json": b"[" * 100_000}, "caption cannot be read"),
])
def test_captions_that_are_none(tmp_path, parts, reason):
    (tmp_path / "a.png").write_bytes(picture(0))
    for suffix, content in parts.items():
        (tmp_path / f"a.{suffix}").write_bytes(content)
    (found,) = read_samples(tmp_path)
    assert found.key == "a" and found.reason.startswith(reason)


@pytest.mark.parametrize("cut", [100, 700, 3000])
def test_a_truncated_shard_gives_what_is_whole(tmp_path, cut):
    path = shard(tmp_path / "s.tar", [(f"{i}.{kind}", content) for i in range(2) for kind, content in (
        ("txt", b"caption"), ("png", picture(i, 8, 8)))])
    path.write_bytes(path.read_bytes()[:cut])
    found = list(read_samples(path))
    assert isinstance(found[-1], Skipped) and found[-1].reason.startswith("no complete tar file")
    assert sum(isinstance(s, Sample) for s in found) == (1 if cut == 3000 else 0)


def test_nothing_there(tmp_path):
    with pytest.raises(FormatError, match="which does not exist"):
        list(read_samples(tmp_path / "none"))
    with pytest.raises(FormatError, match=r"expected images .* or .tar shards"):
        list(read_samples(tmp_path))


# Sizes.

@pytest.mark.parametrize("resolution, step", [(1328, 16), (1024, 16), (48, 8), (16, 16)])
def test_buckets_have_one_area(resolution, step):
    sizes = buckets(resolution, step)
    assert (resolution // step * step,) * 2 in sizes
    for height, width in sizes:
        assert height % step == 0 == width % step and 0.5 <= height / width <= 2
        assert abs(height * width / resolution ** 2 - 1) < (0.02 if resolution > 1000 else 0.4)
    assert {(w, h) for h, w in sizes} == set(sizes)  # tall and wide alike
    assert nearest(sizes, 10 * resolution, 10 * resolution) == (resolution // step * step,) * 2


def test_an_image_covers_its_bucket_without_distortion():
    """A wide image of vertical stripes: the middle third stays, stripes keep their proportions."""
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    found = decode(stream.getvalue(), ((48, 48),))
    assert found.shape == (48, 48, 3) and found[:, 3:-3].min() > 200
    assert decode(stream.getvalue(), buckets(48, 8)).shape[1] > 48


def test_what_is_no_image():
    for wrong in (b"", b"nothing", picture(0)[:60], b"\x89PNG\r\n\x1a\n" + b"\x00" * 100):
        with pytest.raises(ValueError, match="no readable image"):
            decode(wrong, ((8, 8),))
    header = bytearray(picture(0))
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # 3.6 gigapixels, by its own account
    with pytest.raises(ValueError, match="no readable image"):
        decode(bytes(header), ((8, 8),))


# The cache.

def test_latents_and_embeddings_are_those_of_the_pipeline(tmp_path, pipe):
    from pydit.demo import data

    (tmp_path / "out" / ".index.json.abcdefgh.part").mkdir(parents=True)  # of a build that was killed at its first write
    index = build_cache(pipe, folder(tmp_path / "in", 3), tmp_path / "out", resolution=48, progress=False)
    assert index["complete"] and [s["key"] for s in index["samples"]] == ["000", "001", "002"]
    tensors, _ = files.load_safetensors(tmp_path / "out" / "shard-00000.safetensors", what="shard")
    for i in range(3):
        pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(picture(i)))).copy()).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(tensors[f"{i}.latents"], data.encode_images(pipe, pixels[None])[0], atol=1e-5)
        embeds, mask = data.encode_prompts(pipe, [f"picture number {i}"])
        assert mask is None and torch.equal(tensors[f"{i}.embeds"], embeds[0])


def test_bad_samples_are_listed_and_counted(tmp_path, pipe):
    source = folder(tmp_path / "in", 4)
    (source / "001.png").write_bytes(b"broken")
    (source / "002.txt").unlink()
    index = build_cache(pipe, source, tmp_path / "out", resolution=48, progress=False)
    assert [s["key"] for s in index["samples"]] == ["000", "003"]
    assert [s["key"] for s in index["skipped"]] == ["001", "002"] and index["read"] == 4
    assert index["skipped"][0]["reason"].startswith("no readable image")
    assert CachedDataset(tmp_path / "out").skipped == index["skipped"]


@pytest.mark.parametrize("at", [0, 2, 3, 7])
def test_a_build_that_was_stopped_goes_on(tmp_path, pipe, monkeypatch, at):
    source = folder(tmp_path / "in", 8)
    (source / "004.png").write_bytes(b"broken")
    whole = build_cache(pipe, source, tmp_path / "whole", resolution=48, shard_size=3, progress=False)
    seen, add = [], cache._add

    def dying(pipe, sample, *rest):
        if len(seen) == at:
            raise KeyboardInterrupt
        seen.append(sample.key)
        add(pipe, sample, *rest)

    monkeypatch.setattr(cache, "_add", dying)
    if at < 7:
        with pytest.raises(KeyboardInterrupt):
            build_cache(pipe, source, tmp_path / "out", resolution=48, shard_size=3, progress=False)
        if (tmp_path / "out" / cache.INDEX).exists():
            with pytest.raises(FormatError, match="got an unfinished one; build it again"):
                CachedDataset(tmp_path / "out")
    monkeypatch.setattr(cache, "_add", add)
    if at >= 3:  # the first shard is not encoded again
        monkeypatch.setattr(cache, "_add", lambda pipe, sample, *rest: add(pipe, sample, *rest)
                            if sample.key >= "003" or at == 7 else pytest.fail(sample.key))
    again = build_cache(pipe, source, tmp_path / "out", resolution=48, shard_size=3, progress=False)
    assert again == whole
    for name in whole["shards"]:
        ours, theirs = (files.load_safetensors(tmp_path / place / name, what="x")[0] for place in ("out", "whole"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_source_that_has_changed_is_no_longer_the_cached_one(tmp_path, pipe):
    """More images or another caption; gone, a complete cache serves. Nothing usable leaves nothing behind."""
    data, out = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    (data / "a.png").write_bytes(picture(0))
    with pytest.raises(UserError, match="at least one captioned image that can be read, got none of 1 .the first: a: no c"):
        build_cache(pipe, data, out, resolution=48, progress=False)
    assert not out.exists()
    (data / "a.txt").write_text("a ring")
    assert len(build_cache(pipe, data, out, resolution=48, progress=False)["samples"]) == 1
    (data / "a.txt").write_text("a larger ring")
    with pytest.raises(UserError, match="differs in files; give another directory, or delete this one"):
        build_cache(pipe, data, out, resolution=48, progress=False)
    (data / "a.txt").write_text("a ring")
    build_cache(pipe, data, out, resolution=48, progress=False)
    data.rename(tmp_path / "moved")
    assert len(build_cache(pipe, data, out, resolution=48, progress=False)["samples"]) == 1
    with pytest.raises(UserError, match="differs in resolution"):
        build_cache(pipe, data, out, resolution=32, progress=False)
    with pytest.raises(FormatError, match="which does not exist"):
        build_cache(pipe, data, tmp_path / "new", resolution=48, progress=False)
    assert not (tmp_path / "new").exists()


def test_a_cache_belongs_to_the_weights_that_made_it(tmp_path, pipe):
    """Of the VAE as of the text encoder; the dtype they were loaded in is none of its business, nor are old caches'."""
    source, out = folder(tmp_path / "in", 1), tmp_path / "out"
    index = build_cache(pipe, source, out, resolution=48, progress=False)
    try:
        pipe.vae.to(torch.bfloat16), pipe.text_encoder.to(torch.bfloat16)
        assert build_cache(pipe, source, out, resolution=48, progress=False) == index
    finally:
        pipe.vae.float(), pipe.text_encoder.float()
    for encoder in (pipe.vae, pipe.text_encoder):
        weight = next(p for p in encoder.parameters() if p.numel() > 8)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
        with pytest.raises(UserError, match="which differs in encoders; give another directory"):
            build_cache(pipe, source, out, resolution=48, progress=False)
        with torch.no_grad():
            weight.copy_(kept)
    del index["made_of"]["encoders"]  # as caches were written before
    files.write_json(out / cache.INDEX, index)
    assert build_cache(pipe, source, out, resolution=48, progress=False) == index


def test_what_a_cache_refuses(tmp_path, pipe):
    source = folder(tmp_path / "in", 1)
    build_cache(pipe, source, tmp_path / "out", resolution=48, progress=False)
    with pytest.raises(UserError, match="out: expected a cache of"):
        build_cache(pipe, source, tmp_path / "out", resolution=56, progress=False)
    with pytest.raises(UserError, match="with other files in it"):
        build_cache(pipe, source, source, resolution=48, progress=False)
    with pytest.raises(UserError, match="pipe: expected a QwenImagePipeline, got Linear"):
        build_cache(torch.nn.Linear(1, 1), source, tmp_path / "new")
    (source / "000.txt").unlink()
    with pytest.raises(UserError, match="expected at least one captioned image that can be read, got none of 1 .*no caption"):
        build_cache(pipe, source, tmp_path / "none", resolution=48, progress=False)
    (tmp_path / "out" / cache.INDEX).write_text('{"format": "pydit-cached-dataset", "version": 1}')
    with pytest.raises(FormatError, match="missing entries"):
        CachedDataset(tmp_path / "out")


# Batches.

@pytest.fixture(scope="module")
def cached(tmp_path_factory, pipe):
    """Eleven square, tall and wide images in shards of four."""
    root = tmp_path_factory.mktemp("cached")
    folder(root / "in", 6)
    folder(root / "in" / "tall", 3, height=96)
    folder(root / "in" / "wide", 2, width=90)
    build_cache(pipe, root / "in", root / "out", resolution=48, shard_size=4, progress=False)
    return root / "out"


def take(dataset, count, start=0):
    stream = dataset(start)
    return [next(stream) for _ in range(count)]


def test_every_sample_once_an_epoch_in_batches_of_one_size(cached):
    dataset = CachedDataset(cached, batch_size=2)
    assert len(dataset) == 11 and dataset.batches_per_epoch == 3 + 2 + 1
    for epoch in range(2):
        members = [m for batch in dataset._order(epoch) for m in batch]
        assert sorted(members) == list(range(11))
    assert dataset._order(0) != dataset._order(1)
    for batch, target in take(dataset, 12):
        (_, height, width), = batch["img_shapes"][0]
        assert batch["hidden_states"].shape[1] == height * width == target.shape[1]
        assert all(shape == batch["img_shapes"][0] for shape in batch["img_shapes"])


def test_any_batch_by_its_number(cached):
    dataset = CachedDataset(cached, batch_size=2, seed=3, prompt_dropout=0.3)
    whole, tail = take(dataset, 15), take(CachedDataset(cached, batch_size=2, seed=3, prompt_dropout=0.3), 4, start=11)
    for (batch, target), (again, other) in zip(whole[11:], tail, strict=True):
        assert torch.equal(target, other) and torch.equal(batch["hidden_states"], again["hidden_states"])
        assert torch.equal(batch["encoder_hidden_states"], again["encoder_hidden_states"])
    assert not torch.equal(whole[0][1], take(CachedDataset(cached, batch_size=2, seed=4), 1)[0][1])


def test_the_velocity_undoes_the_noise(cached):
    clean = {tuple(CachedDataset(cached)._load(i)[0].flatten()[:3].tolist()) for i in range(11)}
    for batch, target in take(CachedDataset(cached), 11):
        found = batch["hidden_states"] - batch["timestep"][:, None, None] * target
        assert any(np.allclose(found.flatten()[:3], known, atol=1e-5) for known in clean)


def test_prompts_that_are_left_out(cached):
    full, none = (CachedDataset(cached, batch_size=2, prompt_dropout=share) for share in (0.0, 1.0))
    for (batch, _), (bare, _) in zip(take(full, 6), take(none, 6), strict=True):
        assert torch.equal(batch["hidden_states"], bare["hidden_states"])
        assert all(torch.equal(row, full._empty) for row in bare["encoder_hidden_states"])
        assert batch["encoder_hidden_states"].shape[1] > bare["encoder_hidden_states"].shape[1]
    half = take(CachedDataset(cached, batch_size=2, prompt_dropout=0.5), 60)
    masks = [batch["encoder_hidden_states_mask"] for batch, _ in half]
    assert any(mask is not None for mask in masks)  # a mixed batch is padded
    dropped = sum(int((len(CachedDataset(cached)._empty) == (batch["encoder_hidden_states"].abs().sum(-1) > 0).sum(1)).sum())
                  for batch, _ in half)
    assert 0.3 < dropped / sum(len(batch["timestep"]) for batch, _ in half) < 0.7


def test_pairs_are_one_noised_sample_with_and_without_its_prompt(cached):
    single, pairs = CachedDataset(cached, batch_size=2, seed=3), CachedDataset(cached, batch_size=2, seed=3, pairs=True)
    for (batch, target), (both, wanted) in zip(take(single, 6), take(pairs, 6), strict=True):
        for rows in (slice(0, None, 2), slice(1, None, 2)):
            assert torch.equal(both["hidden_states"][rows], batch["hidden_states"]) and torch.equal(wanted[rows], target)
            assert torch.equal(both["timestep"][rows], batch["timestep"])
        assert len(both["img_shapes"]) == 2 * len(batch["img_shapes"])
        width = batch["encoder_hidden_states"].shape[1]
        assert torch.equal(both["encoder_hidden_states"][0::2, :width], batch["encoder_hidden_states"])
        for row in both["encoder_hidden_states"][1::2]:
            assert torch.equal(row[:len(pairs._empty)], pairs._empty) and not row[len(pairs._empty):].any()
    with pytest.raises(UserError, match="prompt_dropout: expected 0, because in pairs .* got 0.1"):
        CachedDataset(cached, pairs=True, prompt_dropout=0.1)


@pytest.mark.parametrize("timesteps, shift, cdf", [
    ("uniform", 1.0, lambda s: s), ("uniform", 3.0, lambda s: s / (3 - 2 * s)),
    ("logit-normal", 1.0, lambda s: 0.5 * (1 + math.erf(math.log(s / (1 - s)) / math.sqrt(2)))),
])
def test_sigmas_follow_their_distribution(cached, timesteps, shift, cdf):
    """Kolmogorov-Smirnov at 20,000 draws: 1.95 / sqrt(n) has a false alarm in a thousand."""
    dataset = CachedDataset(cached, timesteps=timesteps, shift=shift)
    sigma = dataset._sigma(20_000, torch.Generator().manual_seed(0)).double().sort().values.clamp(1e-9, 1 - 1e-9)
    expected = torch.tensor([cdf(s) for s in sigma.tolist()])
    steps = (torch.arange(20_000) + 0.5) / 20_000
    assert (expected - steps).abs().max() < 1.95 / 20_000 ** 0.5
    assert sigma.min() > 0 and sigma.max() <= 1


def test_bad_options(cached):
    for options, message in (({"batch_size": 0}, "batch_size"), ({"timesteps": "cosine"}, "timesteps: expected one of"),
                             ({"shift": 0}, "shift"), ({"prompt_dropout": 1.5}, "prompt_dropout")):
        with pytest.raises(UserError, match=message):
            CachedDataset(cached, **options)
    with pytest.raises(FormatError, match="data: expected"):
        CachedDataset(cached / "nothing")


def test_a_broken_shard_is_named(tmp_path, pipe):
    build_cache(pipe, folder(tmp_path / "in", 2), tmp_path / "out", resolution=48, progress=False)
    shard = tmp_path / "out" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(FormatError, match=r"data: expected a complete safetensors file, got a broken one .*shard-00000"):
        take(CachedDataset(tmp_path / "out"), 1)


def test_distillation_from_images(pipe, cached):
    import pydit

    student = pydit.prune(pipe.transformer, pydit.PruningPlan.from_intervals(6, [(1, 2), (4, 5)]))
    config = pydit.distill.DistillConfig(layers_steps=36, layers_lr=3e-4, output_steps=2, flow_weight=0.1, log_every=6)
    result = pydit.distill.distill(pipe.transformer, student, CachedDataset(cached, batch_size=4), config, progress=False)
    assert result.history[5]["loss"] < result.history[0]["loss"] and "flow" in result.history[-1]["output"]
