"""Activations on disk: the steps of a run without them, no teacher the second time, nothing stale, killed, out of room."""

import dataclasses
import errno
import json
import os
import resource
import types
import weakref

import pytest
import torch

from pydit import FormatError, PruningPlan, UserError, files, prune
from pydit.distill import DistillConfig, Stage, activations, distill, trainer
from pydit.distill.activations import DiskStore
from pydit.distill.cost import estimate
from pydit.distill.phases import Seen
from pydit.distill.stream import Batch
from pydit.models.adapter import Capture
from tests.distill import tiny
from tests.distill.test_resume import Stop, assert_no_leftovers, resumed

# Three batches in two passes and a step; text-linear blocks, a linear FFN and an interval; padded text.
CONFIG = DistillConfig(layers_steps=7, layers_lr=1e-3, linear_weight=1.0, cache_batches=3, log_every=1)
PLAN = PruningPlan("qwen-image", 6, [(4, 5)], text_linear=[(1, 3)], linear_ffn=[2], linear_text_ffn=[4])


def pair(dtype=torch.float32, seed=0):
    teacher = tiny.make_teacher(dtype=dtype, seed=seed)
    with pytest.warns(UserWarning, match="identity"):
        return teacher, prune(teacher, PLAN)


def trained(config, made=None, batches=tiny.stream):
    teacher, student = made or pair()
    result = distill(teacher, student, batches, config, progress=False)
    return [row["loss"] for row in result.history], tiny.weights(student)


def require_same(found, expected):
    assert found[0] == expected[0]
    assert set(found[1]) == set(expected[1]) and all(torch.equal(found[1][name], p) for name, p in expected[1].items())


def blind(teacher):
    """A teacher that cannot be run."""
    def refuse(*_):
        raise AssertionError("the teacher was run")
    teacher.register_forward_pre_hook(refuse)
    return teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_disk_changes_no_bit_and_spares_the_teacher_the_next_time(tmp_path, dtype):
    def batches(start):
        return tiny.stream(start, dtype=dtype)

    expected = trained(CONFIG, pair(dtype), batches)
    config = dataclasses.replace(CONFIG, cache_dir=tmp_path / "kept")
    require_same(trained(config, pair(dtype), batches), expected)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        activations.INDEX, *(f"batch-0000000{number}.safetensors" for number in range(3))]
    teacher, student = pair(dtype)
    require_same(trained(config, (blind(teacher), student), batches), expected)
    # No batch comes twice: the run without any cache, though every step has read the disk.
    fresh = dataclasses.replace(CONFIG, layers_steps=3, cache_batches=0)
    read = dataclasses.replace(fresh, cache_batches=3, cache_dir=tmp_path / "kept")
    teacher, student = pair(dtype)
    require_same(trained(read, (blind(teacher), student), batches), trained(fresh, pair(dtype), batches))


def test_parts_trained_apart_share_a_directory(tmp_path):
    """Other losses and rates too; a run of one interval founds a directory that is too small for the other."""
    config = dataclasses.replace(CONFIG, cache_dir=tmp_path / "all")
    trained(config)
    part = dataclasses.replace(config, intervals=((4, 5),), layers_lr=2e-3, linear_weight=0.0, loss="mse")
    teacher, student = pair()
    require_same(trained(part, (blind(teacher), student)), trained(dataclasses.replace(part, cache_dir=None)))
    trained(dataclasses.replace(part, cache_dir=tmp_path / "part", cache_batches=1))
    with pytest.raises(UserError, match=r"cache_dir: expected activations at the boundaries of this run's plan, "
                                        r"\[1, 2, 3, 4, 6\], in .*, got those at \[4, 6\]; give another directory"):
        trained(dataclasses.replace(config, cache_dir=tmp_path / "part"))
    # One that is large enough may be added to, at all of its boundaries.
    more = dataclasses.replace(part, cache_batches=4)
    require_same(trained(more), trained(dataclasses.replace(more, cache_dir=None)))
    fourth, _ = files.load_safetensors(tmp_path / "all" / "batch-00000003.safetensors", what="test")
    assert {f"{boundary}.{stream}" for boundary in (1, 2, 3, 4, 6) for stream in ("image", "text")} < set(fourth)


def test_every_stage_of_a_schedule_has_its_own(tmp_path):
    """Their plans need other boundaries, and their batches come later in the stream."""
    stages = (Stage(PruningPlan("qwen-image", 6, [(1, 2), (3, 5)]), 3),)
    config = dataclasses.replace(CONFIG, layers_steps=3, linear_weight=0.0, cache_batches=2, schedule=stages)
    expected = trained(config, tiny.make_pair())
    config = dataclasses.replace(config, cache_dir=tmp_path)
    for _ in range(2):
        require_same(trained(config, tiny.make_pair()), expected)
    found = [files.read_json(folder / activations.INDEX, what="test")["made_of"]["boundaries"]
             for folder in (tmp_path, tmp_path / "stage-1")]
    assert found == [[1, 3, 4, 6], [1, 3, 6]] and len(list((tmp_path / "stage-1").glob("batch-*"))) == 2


def test_what_is_stale_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, cache_dir=tmp_path / "kept")
    trained(config)
    with pytest.raises(UserError, match="expected activations of this run's teacher in .*, got those of one with other"):
        trained(config, pair(seed=1))

    def altered(change):
        def batches(start):
            for number, (batch, target) in enumerate(tiny.stream(start), start):
                yield (change(dict(batch)) if number == 1 else batch), target
        return batches

    for change in (lambda b: b | {"timestep": b["timestep"] + 1e-6}, lambda b: b | {"hidden_states": -b["hidden_states"]},
                   lambda b: b | {"encoder_hidden_states_mask": None}):
        with pytest.raises(UserError, match="expected activations of this run's batches in .*, got those of other data, "
                                            "timesteps, noise or seed as batch 1; give another directory"):
            trained(config, batches=altered(change))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="expected a new directory or one with activations.json, got .* with other files"):
        trained(dataclasses.replace(config, cache_dir=tmp_path / "other"))
    with pytest.raises(UserError, match="expected batches and block arguments of tensors and plain values, got a set"):
        trained(config, batches=altered(lambda b: b | {"attention_kwargs": {"x": {1}}}))
    index = tmp_path / "kept" / activations.INDEX
    good = index.read_text()
    for broken, message in (('{"format": "pyd', "expected JSON"), ("[]", "expected pydit-teacher-activations version 1"),
                            (good.replace('"version": 1', '"version": 2'), "expected pydit-teacher-activations version 1")):
        index.write_text(broken)
        with pytest.raises(FormatError, match=f"cache_dir: {message}"):
            trained(config)
    index.write_text(good)
    os.truncate(tmp_path / "kept" / "batch-00000002.safetensors", 2000)
    with pytest.raises(FormatError, match="cache_dir: expected a complete safetensors file"):
        trained(config)


def test_a_flipped_bit_is_refused_and_deleting_the_file_mends_it(tmp_path):
    config = dataclasses.replace(CONFIG, cache_dir=tmp_path)
    expected, path = trained(config), tmp_path / "batch-00000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="cache_dir: expected the activations that were written, got a damaged file "
                                          ".*batch-00000001.safetensors.*; delete it, and the next run makes it again"):
        trained(config)
    path.unlink()
    require_same(trained(config), expected)
    teacher, student = pair()
    require_same(trained(config, (blind(teacher), student)), expected)


def test_no_flipped_bit_is_taken_for_what_was_written(tmp_path):
    """One in every third byte of the header, where it may be in the name of a tensor that is not read; and in the tensors that are."""
    needed, more = (types.SimpleNamespace(boundaries=boundaries, observe_at=list) for boundaries in ([1], [1, 2]))
    batch = Batch({"x": torch.ones(3), "scale": 2.0}, None)
    states = {b: (torch.arange(6.0).reshape(2, 3) + b, torch.ones(1, 4, dtype=torch.bfloat16) * b) for b in (1, 2)}
    arguments = {"mask": torch.tensor([True, False]), "phase": torch.tensor([1 + 2j]), "names": ("a", [None, 3])}

    def store(phase=needed):
        return DiskStore(tmp_path, "teacher", phase, torch.device("cpu"))

    store(more).put(0, batch, Seen(Capture(states, arguments), {"image": 0.5}))

    def read():
        found = store()
        found.require_same(0, batch)
        seen = found.get(0)
        assert repr(found.get(0)) == repr(seen)
        return repr(seen)

    path, good = tmp_path / "batch-00000000.safetensors", read()
    data = path.read_bytes()
    header, end = files.read_header(path, what="test")
    ranges = [entry["data_offsets"] for name, entry in header.items() if not name.startswith("2.")]
    payload = [end + place for start, stop in ranges for place in {start, (start + stop) // 2, stop - 1}]
    for number, place in enumerate([*payload, *range(0, end, 3)]):
        broken = bytearray(data)
        broken[place] ^= 1 << number % 8
        path.write_bytes(broken)
        try:
            found = read()
        except FormatError as error:
            assert "expected" in str(error)
        else:
            assert found == good and place not in payload
    path.write_bytes(data)
    assert read() == good


@pytest.mark.parametrize("at", [2, 5])  # while the cache fills, and in the second pass
def test_a_killed_run_goes_on_from_the_disk(tmp_path, at):
    """The teacher runs on nothing that is there; lost batches are observed again; of the stream, one batch is drawn."""
    config = dataclasses.replace(CONFIG, linear_weight=0.0, save_every=1, checkpoint_dir=tmp_path / "run",
                                 cache_dir=tmp_path / "kept")
    expected = trained(dataclasses.replace(config, checkpoint_dir=None, save_every=None, cache_dir=None), tiny.make_pair())
    teacher, student = tiny.make_pair()
    steps = []
    student.transformer_blocks[1].register_forward_pre_hook(lambda *_: steps.append(None) if len(steps) < at else stop())
    with pytest.raises(Stop):
        distill(teacher, student, tiny.stream, config, progress=False)
    assert_no_leftovers(tmp_path / "run")
    # Killed in step at + 1, which has kept its batch if it was a new one: the disk is ahead of the checkpoint.
    assert len(list((tmp_path / "kept").glob("batch-*"))) == 3
    leftover = tmp_path / "kept" / ".batch-00000001.safetensors.abc.part"
    leftover.mkdir()
    (tmp_path / "kept" / "batch-00000002.safetensors").unlink()
    starts = []

    def batches(start):
        starts.append(start)
        return tiny.stream(start)

    result, weights = resumed(config, batches)
    assert result.resumed_from == ("layers", at) and starts == [1 if at == 2 else 2]
    require_same(([row["loss"] for row in result.history], weights), expected)
    assert not leftover.exists() and len(list((tmp_path / "kept").iterdir())) == 4
    with pytest.raises(UserError, match="got those of other data, timesteps, noise or seed as batch"):
        distill(*tiny.make_pair(), lambda start: tiny.stream(start, size=3), dataclasses.replace(
            config, checkpoint_dir=tmp_path / "new"), progress=False)


def stop():
    raise Stop


def test_a_full_disk_leaves_what_was_kept(tmp_path):
    """A write that the system really refuses: a limit on the size of files, from the third batch on."""
    config = dataclasses.replace(CONFIG, save_every=1, checkpoint_dir=tmp_path / "run", cache_dir=tmp_path / "kept")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batches(start):
        for number, item in enumerate(tiny.stream(start), start):
            if number == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
            yield item

    made = pair()
    try:
        with pytest.raises(OSError, match="could not keep the teacher's activations .File too large.; those of 2 batches "
                                          "are kept, and the last checkpoint is as it was: make room and resume"
                           ) as caught:
            distill(*made, batches, config, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        activations.INDEX, "batch-00000000.safetensors", "batch-00000001.safetensors"}
    assert_no_leftovers(tmp_path / "run")
    require_same(trained(dataclasses.replace(config, resume=True)),
                 trained(dataclasses.replace(config, checkpoint_dir=None, save_every=None, cache_dir=None)))


def test_one_observation_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """Of twelve batches that are kept."""
    held, most = weakref.WeakSet(), []

    class Watching(activations.DiskStore):
        def get(self, number):
            seen = super().get(number)
            held.update(image for image, _ in seen.capture.states.values())
            most.append(len(held))
            return seen

    monkeypatch.setattr(trainer, "DiskStore", Watching)
    trained(dataclasses.replace(CONFIG, layers_steps=24, cache_batches=12, cache_dir=tmp_path))
    assert most == [5] * 12  # one image stream per boundary


def test_the_estimate_counts_what_is_written(tmp_path):
    """All but the arguments that a block has beside its streams; parts and processes in proportion."""
    config = dataclasses.replace(CONFIG, cache_dir=tmp_path)
    made = pair()
    trained(config, made, batches=lambda start: tiny.stream(start, padding=False))
    streams = 0
    for path in tmp_path.glob("batch-*"):
        tensors, metadata = files.load_safetensors(path, what="test")
        streams += sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.startswith("argument"))
        assert json.loads(metadata["weights"]) is None

    def disk(**changes):
        options = dict(batch_size=2, element_bytes=4, image_tokens=tiny.GRID**2, text_tokens=tiny.TEXT)
        fields = {key: changes.pop(key) for key in list(changes) if key in ("intervals", "cache_dir")}
        found = estimate(PLAN, dict(made[0].config), dataclasses.replace(config, **fields), **options | changes)
        return found.disk

    assert disk() == {"teacher's activations of 3 batches, on disk": streams}
    assert list(disk(intervals=((4, 5),)).values()) == [streams * 2 // 5]
    assert list(disk(processes=2).values()) == [streams] and list(disk(processes=3).values()) == [streams * 3 // 2]
    assert disk(cache_dir=None) == {}
