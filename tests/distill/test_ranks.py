"""Two processes: one or both are killed and two resume, bit for bit, also what one had begun; both read in shards."""

import os
import shutil
import signal
import time
import warnings

import pytest
import torch

from pydit import FormatError, PruningPlan, files, prune
from pydit.distill import activations, distill
from pydit.inference.pipeline import _dtype_option, load_pipeline, save_pipeline
from pydit.models import get_adapter
from tests.demo.pipelines import untrained
from tests.distill import ranks, tiny
from tests.distill.test_distributed import numbers, require_equal_steps
from tests.distill.test_resume import Stop
from tests.inference.test_streaming import directory
from tests.models import tiny as models
from tests.processes import context

pytestmark = pytest.mark.slow
DTYPES = {"teacher": torch.bfloat16, "shorter": torch.float32, "thinned": torch.float32}
ACTS = {"one_is_killed": [1], "all_are_killed": [0, 1], "go_on": []}  # and whom the parent kills


def _end(processes, out, killed):
    """Kill these processes where they wait, and wait for the rest to end by themselves."""
    deadline = time.monotonic() + 120
    first = killed[:1] if len(killed) > 1 else killed  # the others wait for it
    while not all((out / f"hanging-{rank}").exists() for rank in first):
        assert all(process.is_alive() for process in processes), "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for rank in killed:  # so that none ends by itself before its turn
        os.kill(processes[rank].pid, signal.SIGSTOP)
    for rank in killed:
        processes[rank].kill()
    for process in processes:
        process.join(max(1.0, deadline - time.monotonic()))
        assert process.exitcode is not None
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A directory with what two processes made of each run, in three lives.

    In the first one the process that is left has a batch of activations that the other one lacks.
    """
    out = tmp_path_factory.mktemp("ranks")
    begun_by_one(out)
    pipelines(out)
    shutil.copytree(out / "one-then-whole", out / "one-then-sharded")
    for act, killed in ACTS.items():
        processes = [context().Process(target=ranks.live, args=(act, rank, str(out))) for rank in range(2)]
        try:
            for process in processes:
                process.start()
            codes = _end(processes, out, killed)
        finally:
            for process in processes:
                process.kill()
        for rank in killed:
            assert codes[rank] == -signal.SIGKILL
            (out / f"hanging-{rank}").unlink(missing_ok=True)
        assert all(codes[rank] == (ranks.LOST if killed else 0) for rank in range(2) if rank not in killed)
        if act == "one_is_killed":
            mine, other = ([path.name for path in (out / "kept").glob(f"batch-*.{rank}-of-2.safetensors")]
                           for rank in range(2))
            assert (len(mine), len(other)) == (4, 3) and len(list((out / "kept").glob(".batch-*.part"))) == 1
        if act == "all_are_killed":
            assert (out / "sharded" / ".state-output-00000002.part").is_dir()
    return out


def pipelines(out):
    """Directories to be read in shards."""
    shutil.copytree(untrained(), out / "teacher")
    for name, fields in (("shorter", {}), ("thinned", {"text_linear": [(3, 5)], "linear_ffn": [0], "linear_text_ffn": [1]})):
        pipe = load_pipeline(untrained(), dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            pipe.register_modules(transformer=prune(pipe.transformer, PruningPlan("qwen-image", 6, [(1, 2)], **fields)))
        save_pipeline(pipe, out / name)
    shutil.copytree(out / "teacher", out / "broken")
    config = files.read_json(out / "broken" / "transformer" / "config.json", what="test")
    files.write_json(out / "broken" / "transformer" / "config.json", config | {"num_layers": 7})
    directory(out / "flux.1", models.flux(num_layers=2, num_single_layers=2))
    directory(out / "sd3.5", models.sd3(num_layers=3, dual_attention_layers=(0,)))
    big(out / "big")


def big(path):
    """A transformer of 150 MB."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=8, attention_head_dim=32, num_attention_heads=11,
            joint_attention_dim=24, axes_dims_rope=(8, 12, 12))
    directory(path, model.to(torch.float32).to_empty(device="cpu"), shard="50MB")


def begun_by_one(out):
    """A run of one process that stopped in its second phase."""
    def batches(start):
        for number, item in enumerate(ranks.three(start), start):
            if number == 5:
                raise Stop
            yield item
    with pytest.raises(Stop):
        distill(*tiny.make_pair(), batches, ranks.saved(ranks.STEPS, out, "one-then-whole"), progress=False)


@pytest.mark.parametrize("name, place", [("cached", ["layers", 3]), ("sharded", ["output", 1])])
def test_killed_processes_are_resumed_bit_for_bit(out, name, place):
    """One of two, while a sharded teacher's activations are kept on disk; both, in the write of a sharded checkpoint."""
    found, expected = (files.read_json(out / f"{run}.json", what="test") for run in (name, "unbroken"))
    assert found["resumed"] == place
    assert (found["losses"], found["norms"]) == (expected["losses"], expected["norms"])
    weights, whole = (files.load_safetensors(out / f"{run}.safetensors", what="test")[0] for run in (name, "unbroken"))
    assert set(weights) == set(whole) and all(torch.equal(weights[key], tensor) for key, tensor in whole.items())
    if name == "cached":
        assert len(list((out / "kept").iterdir())) == 2 * 4 + 1 and (out / "kept" / activations.INDEX).is_file()
    assert not [path for path in (out / name).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["one-then-whole", "one-then-sharded"])
def test_what_one_began_two_go_on_with(out, name):
    """From a checkpoint in one file."""
    teacher, student = tiny.make_pair()
    result = distill(teacher, student, ranks.three, ranks.STEPS, progress=False)
    found = require_equal_steps(out, name, student, result)
    assert found["resumed"] == ["output", 1] and len(found["losses"]) == len(numbers(result)["losses"]) == 7
    assert (out / name / "state-done-00000000").is_dir() == (name == "one-then-sharded")


@pytest.mark.parametrize("name", DTYPES)
def test_the_shards_are_those_of_the_whole_model(out, name):
    whole = load_pipeline(out / name, dtype=DTYPES[name]).transformer
    found, _ = files.load_safetensors(out / f"{name}.safetensors", what="test")
    velocity = found.pop("velocity")
    expected = dict(whole.named_parameters())
    assert set(found) == set(expected) and all(torch.equal(found[key], p) for key, p in expected.items())
    assert torch.equal(velocity, ranks.velocity(whole, DTYPES[name]))
    seen = [files.read_json(out / f"{name}-{rank}.json", what="test") for rank in range(2)]
    stored = sum(reader.numel() * 4 for reader in expected.values())  # the files hold float32
    rows = sum(4 * p[:1].numel() for p in expected.values())  # of an odd number, one process has one more
    assert sum(one["read"] for one in seen) == stored and all(one["read"] <= (stored + rows) / 2 for one in seen)
    assert all(one["class"] == type(whole).__name__ and one["sharded"] for one in seen)
    assert seen[0]["plan"] == (whole.plan.to_dict() if hasattr(whole, "plan") else None)


@pytest.mark.parametrize("family", ["flux.1", "sd3.5"])
def test_other_families_with_their_buffers(out, family):
    kind = get_adapter(family).stock_class()
    expected = kind.from_pretrained(out / family / "transformer", **_dtype_option(torch.bfloat16)).state_dict()
    found, _ = files.load_safetensors(out / f"{family}.safetensors", what="test")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_whole_model_does_not_fit(out):
    """Under a limit on data memory of three quarters of the model, beside what the process has already."""
    for rank in range(2):
        seen = files.read_json(out / f"big-{rank}.json", what="test")
        assert seen == {"loaded": True, "whole": False}


def test_weights_that_the_configuration_does_not_explain(out):
    message = files.read_json(out / "broken-1.json", what="test")
    with pytest.raises(FormatError, match="expected weights that match the config in .*broken.transformer, got"):
        raise FormatError(message)
    with pytest.raises(FormatError, match="expected weights that match the config in .*broken.transformer, got"):
        load_pipeline(out / "broken")
