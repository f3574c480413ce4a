"""Wrong files of every kind on the command line: one sentence and exit code 2, nothing written, no memory for what is not there.

100 files of each kind; with ``--hypothesis-profile=nightly`` 1,000.
"""

import copy
import dataclasses
import json
import pickle
import shutil
import types
import warnings
import zlib

import pytest
import torch

import pydit
from pydit import UserError, analysis, files, weights
from pydit.analysis import ActivationStats
from pydit.analysis.ablation import Ablation
from pydit.analysis.criteria import base
from pydit.data import CachedDataset, Sample, build_cache, read_samples
from pydit.data.buckets import buckets, decode
from pydit.distill import activations, checkpoint, distill, trainer
from pydit.distill.trainer import NonFiniteLossError
from pydit.inference import pluggable, sampling
from pydit.inference.pipeline import load_pipeline
from pydit.plan import PruningPlan
from tests.analysis import synthetic
from tests.data.test_data import folder, picture, shard
from tests.demo.pipelines import untrained
from tests.distill import tiny
from tests.distill.test_resume import CONFIG, Stop, stopping_stream
from tests.fuzz import harness, mutate
from tests.inference.test_streaming import directory

PLANS = [PruningPlan.from_intervals(4, [(1, 2)], provenance={"note": "by hand", "scores": [1.0, 2.0]}),
         PruningPlan("qwen-image", 4, [(0, 1)], text_linear=[(2, 3)]).lean(),
         PruningPlan.preset("ppcl-flux.1-8b"), PruningPlan.preset("amber-qwen-image-10b")]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline directory of a tiny transformer alone, and a plan for it."""
    from diffusers import QwenImageTransformer2DModel

    path = tmp_path_factory.mktemp("pipeline")
    model = QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=8,
                                        num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4))
    PLANS[0].save(path / "plan.json")
    return directory(path / "teacher", model)


def judge(argv, out, *, seed):
    """Run a command that may fail in one sentence; if it does, nothing is there that was not before."""
    before = sorted(out.parent.iterdir())
    code, printed, err = harness.command(*argv)
    problem = harness.complaint(code, err)
    assert problem is None, f"seed {seed}: {problem}"
    if code:
        assert not printed and sorted(out.parent.iterdir()) == before, f"seed {seed}: partial output"
    elif out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
    return code


def test_plans(tmp_path, pipeline):
    texts = [json.dumps(plan.to_dict()).encode() for plan in PLANS]
    file, out, codes = tmp_path / "plan.json", tmp_path / "out", []
    for seed in harness.seeds():
        file.write_bytes(mutate.json_file(texts[seed % 4], seed))
        codes.append(judge(("plan", "--show", file, "--out", out), out, seed=seed))
        if codes[-1] == 0:
            judge(("plan", "--show", file, "--json"), out, seed=seed)
            judge(("prune", pipeline, "--plan", file, "--out", out), out, seed=seed)
    assert set(codes) == {0, 2} and codes.count(2) > len(codes) / 2


def test_statistics(tmp_path):
    stats = synthetic.stats("awniwa", samples=4, rows=16)
    generator = torch.Generator().manual_seed(0)
    losses, norms, times = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((8, 6), (8,), (8,)))
    stats.add_ablation(Ablation(losses, 1 + norms, times, torch.arange(8) // 4))
    file, out, codes = tmp_path / "stats.safetensors", tmp_path / "out", []
    stats.save(file)
    content = file.read_bytes()
    ways = ((), ("--method", "laptop", "--target", "0.3"), ("--method", "amber", "--target", "0.3"), ("--budget", "cka"))
    for seed in harness.seeds():
        file.write_bytes(mutate.safetensors_file(content, seed))
        codes.append(judge(("plan", file, *ways[seed % 4], "--out", out), out, seed=seed))
        if codes[-1] == 0:
            judge(("plan", file, "--compare"), out, seed=seed)
    assert set(codes) == {0, 2} and codes.count(2) > len(codes) / 2


def test_weights(tmp_path, pipeline):
    """Of a transformer: refused before anything is written, or the output loads."""
    from diffusers import QwenImageTransformer2DModel

    teacher, out, codes = shutil.copytree(pipeline, tmp_path / "teacher"), tmp_path / "out", []
    file = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    for seed in harness.seeds():
        file.write_bytes(mutate.safetensors_file(content, seed))
        before = sorted(tmp_path.iterdir())
        code, printed, err = harness.command("prune", teacher, "--plan", pipeline.parent / "plan.json", "--out", out)
        assert harness.complaint(code, err) is None, f"seed {seed}: {harness.complaint(code, err)}"
        codes.append(code)
        if code:
            assert not printed and sorted(tmp_path.iterdir()) == before, f"seed {seed}"
        else:
            QwenImageTransformer2DModel.from_pretrained(out / "transformer")
            shutil.rmtree(out)
    assert set(codes) == {0, 2} and codes.count(2) > len(codes) / 2


@pytest.mark.parametrize("name", ["transformer/config.json", "model_index.json"])
def test_configurations(tmp_path, pipeline, name):
    teacher, out = shutil.copytree(pipeline, tmp_path / "teacher"), tmp_path / "out"
    content = (teacher / name).read_bytes()
    for seed in harness.seeds()[::4]:
        (teacher / name).write_bytes(mutate.json_file(content, seed))
        judge(("prune", teacher, "--plan", pipeline.parent / "plan.json", "--out", out), out, seed=seed)


def test_checkpoints(tmp_path):
    """The JSON and, under a checksum that is right, the tensors of a run's checkpoint: refused as they were, or resumed."""
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path / "run", layers_steps=2, output_steps=2)
    teacher, student = tiny.make_pair(layers=3, intervals=((1, 2),))
    untouched = copy.deepcopy(student)
    with pytest.raises(Stop):
        distill(teacher, student, stopping_stream(3), config, progress=False)
    run = files.read_json(tmp_path / "run" / checkpoint.INDEX, what="x")
    index, tensors = (tmp_path / "run" / checkpoint.INDEX).read_bytes(), tmp_path / "run" / run["tensors"]
    content, refused = tensors.read_bytes(), 0
    (tmp_path / "run" / checkpoint.PREVIOUS).unlink()
    for seed in harness.seeds():
        if seed % 3:
            new = mutate.json_file(index, seed), content
        else:
            broken = mutate.safetensors_file(content, seed)
            new = json.dumps(run | {"crc32": zlib.crc32(broken)}).encode(), broken
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / checkpoint.INDEX).write_bytes(new[0])
        tensors.write_bytes(new[1])
        try:
            with harness.bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checkpoint.load(tmp_path / "run", run["run"], dict(untouched.named_parameters()))
                distill(teacher, copy.deepcopy(untouched), tiny.stream, dataclasses.replace(config, resume=True),
                        progress=False)
        except (UserError, NonFiniteLossError) as error:
            refused += 1
            assert "expected" in str(error) and "\n" not in str(error), f"seed {seed}: {error}"
            assert isinstance(error, trainer.NonFiniteLossError) or (
                (tmp_path / "run" / checkpoint.INDEX).read_bytes(), tensors.read_bytes()) == new, f"seed {seed}"
    assert refused > len(harness.seeds()) / 2


def test_shards(tmp_path):
    """Tar members, captions, images: each is a sample or is listed with a reason."""
    content = shard(tmp_path / "s.tar", [(f"{i:03}.{kind}", data) for i in range(4) for kind, data in (
        ("png", picture(i)) if i % 2 else ("jpg", picture(i, form="JPEG")),
        ("txt", b"a caption") if i < 2 else ("json", b'{"caption": "x"}'))]).read_bytes()
    sizes, images, found = buckets(48, 8), 0, []
    for seed in harness.seeds():
        (tmp_path / "s.tar").write_bytes(mutate.tar_file(content, seed))
        with harness.bounded():
            for sample in read_samples(tmp_path / "s.tar"):
                found.append(sample)
                if isinstance(sample, Sample):
                    try:
                        images += decode(sample.image, sizes).ndim == 3
                    except ValueError as error:
                        assert str(error).startswith("no readable image")
                else:
                    assert "\n" not in sample.reason and sample.reason
    assert 0 < images < len(found)


def test_caches(tmp_path):
    """The index and the shards of computed latents and embeddings."""
    build_cache(load_pipeline(untrained()), folder(tmp_path / "images", 4), tmp_path / "cache", resolution=48, shard_size=2,
                progress=False)
    contents = {path: path.read_bytes() for path in sorted((tmp_path / "cache").iterdir())}
    refused = 0
    for seed in harness.seeds():
        path = list(contents)[seed % len(contents)]
        path.write_bytes((mutate.json_file if path.suffix == ".json" else mutate.safetensors_file)(contents[path], seed))
        try:
            with harness.bounded():
                dataset = CachedDataset(tmp_path / "cache", batch_size=2, prompt_dropout=0.3)
                stream = dataset(0)
                for _ in range(min(dataset.batches_per_epoch, 4)):
                    next(stream)
        except UserError as error:
            refused += 1
            assert "expected" in str(error) and "\n" not in str(error), f"seed {seed}: {error}"
        path.write_bytes(contents[path])
    assert refused > len(harness.seeds()) / 2


def plan_of_scores(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return analysis.select(base.Scores.load(path), target=1)


def test_other_files(tmp_path):
    """Scores, fallback orders, results and logs of evaluations."""
    from pydit.demo.evaluate import Result

    stats = synthetic.stats("nana")
    for method, options in (("ppcl", {}), ("bi", {"resamples": 10})):
        analysis.score(stats, method, **options).save(tmp_path / f"{method}.safetensors")
    pluggable.save_order([pluggable.Subset(((1, 2),), 10, 20, 0.5)], tmp_path / "order.json")
    result = Result(["a ring"], ["one"], [0], [True], {"steps": 1})
    files.write_json(tmp_path / "result.json", result.to_json())
    readers = {"ppcl.safetensors": plan_of_scores, "bi.safetensors": plan_of_scores, "order.json": pluggable.load_order,
               "result.json": lambda path: Result.from_json(files.read_json(path, what="compare"), what="compare").summary()}
    for name, read in readers.items():
        content, refused = (tmp_path / name).read_bytes(), 0
        for seed in harness.seeds():
            mutated = (mutate.json_file if name.endswith("json") else mutate.safetensors_file)(content, seed)
            (tmp_path / name).write_bytes(mutated)
            try:
                with harness.bounded():
                    read(tmp_path / name)
            except UserError as error:
                refused += 1
                assert "expected" in str(error) and "\n" not in str(error), f"{name}, seed {seed}: {error}"
        assert refused > len(harness.seeds()) / 4


@pytest.mark.parametrize("content", mutate.pickles()[2:], ids=["2", "3", "4", "5", "torch.save", "old torch.save"])
def test_a_pickle_anywhere_is_refused(tmp_path, pipeline, content, monkeypatch):
    """Under its own name or another's: it is never read, and where nothing else would be, the message says so."""
    def loads(*_args, **_options):
        raise AssertionError("a pickle was loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, loads)
    teacher = shutil.copytree(pipeline, tmp_path / "teacher")
    plan, weights = pipeline.parent / "plan.json", teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    for name in ("stats.safetensors", "stats.bin", "stats.pt", "stats.pkl"):
        (tmp_path / name).write_bytes(content)
        code, _, err = harness.command("plan", tmp_path / name)
        assert code == 2 and "got a pickle" in err, err
    (tmp_path / "plan.json").write_bytes(content)
    code, _, err = harness.command("plan", "--show", tmp_path / "plan.json")
    assert code == 2 and "got a pickle" in err, err
    for name in ("model_index.json", "transformer/config.json"):
        good = (teacher / name).read_bytes()
        (teacher / name).write_bytes(content)
        code, _, err = harness.command("prune", teacher, "--plan", plan, "--out", tmp_path / "out")
        assert code == 2 and "got a pickle" in err, err
        (teacher / name).write_bytes(good)
    weights.write_bytes(content)
    code, _, err = harness.command("prune", teacher, "--plan", plan, "--out", tmp_path / "out")
    assert code == 2 and "got a pickle" in err, err
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(content)
    code, _, err = harness.command("prune", teacher, "--plan", plan, "--out", tmp_path / "out")
    assert code == 2 and "got a pickle" in err and not (tmp_path / "out").exists(), err


@pytest.mark.parametrize("count", [2**24, 10**12])
def test_a_header_that_announces_more_than_the_file_holds(tmp_path, count):
    """64 MiB or 4 TB in a file of 100 bytes, in each loader: refused with 32 MiB of memory to take."""
    header = {"x": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    (tmp_path / "x.safetensors").write_bytes(mutate.join(header, b"\0" * 16))
    for read in (lambda path: files.load_safetensors(path, what="x"), ActivationStats.load,
                 lambda path: weights.SafetensorsReader(path.parent, "x", what="x")):
        with harness.bounded(2**25), pytest.raises(pydit.FormatError, match=f"16 bytes of tensors instead of {4 * count}"):
            read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", mutate.pickles()[2:], ids=["2", "3", "4", "5", "torch.save", "old torch.save"])
def test_a_pickle_among_what_training_reads_is_refused(tmp_path, content, monkeypatch):
    """Indexes and tensors of checkpoints, caches and kept activations; images, captions, shards and prompts."""
    def loads(*_args, **_options):
        raise AssertionError("a pickle was loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, loads)
    phase = types.SimpleNamespace(boundaries=[1], observe_at=list)
    for name, read in {
            checkpoint.INDEX: lambda path: checkpoint.load(path, {}, {}), "index.json": CachedDataset,
            activations.INDEX: lambda path: activations.DiskStore(path, "teacher", phase, torch.device("cpu"))}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(pydit.FormatError, match="got a pickle"):
            read(tmp_path)
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({
        "format": checkpoint.FORMAT, "version": checkpoint.VERSION, "run": {}, "tensors": "t.safetensors",
        "progress": dataclasses.asdict(checkpoint.Progress())}))
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(pydit.FormatError, match="got a pickle"):
        checkpoint.load(tmp_path, {}, {})
    (found,) = read_samples(shard(tmp_path / "s.tar", [("a.png", content), ("a.txt", b"a caption")]))
    with pytest.raises(ValueError, match="no readable image"):
        decode(found.image, buckets(48, 8))
    (found,) = read_samples(shard(tmp_path / "c.tar", [("a.png", picture(0)), ("a.txt", content)]))
    assert not isinstance(found, Sample) and "caption" in found.reason
    (tmp_path / "p.tar").write_bytes(content)
    assert not [found for found in read_samples(tmp_path / "p.tar") if isinstance(found, Sample)]
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match="prompts: expected"):
        sampling.read_prompts(tmp_path / "prompts.txt")
