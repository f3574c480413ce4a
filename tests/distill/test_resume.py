"""A run that is killed and resumed ends with the weights of the run that was not."""

import dataclasses
import itertools
import json
import signal
import time

import pytest
import torch

import pydit
from pydit import FormatError, PruningPlan, UserError
from pydit.distill import DistillConfig, checkpoint, distill
from tests.distill import tiny
from tests.processes import context

CONFIG = DistillConfig(layers_steps=6, layers_lr=1e-3, output_steps=4, output_lr=1e-3, output_trainable="all",
                       log_every=4, save_every=1)


class Stop(Exception):
    """Ends a run from inside the stream, as a kill would."""


def stopping_stream(at):
    def batches(start):
        for number, item in enumerate(tiny.stream(start), start):
            if number == at:
                raise Stop
            yield item
    return batches


@pytest.fixture(scope="module")
def uninterrupted():
    """(history, weights) of the run in one piece."""
    teacher, student = tiny.make_pair()
    config = dataclasses.replace(CONFIG, save_every=None)
    return distill(teacher, student, tiny.stream, config, progress=False).history, tiny.weights(student)


def without_times(history):
    return [{name: value for name, value in row.items() if name not in ("seconds", "ms_per_step")} for row in history]


def assert_no_leftovers(directory):
    """The JSONs of the last two checkpoints and the tensors they name, nothing else."""
    names = {checkpoint.INDEX, checkpoint.PREVIOUS} & {path.name for path in directory.iterdir()}
    tensors = {json.loads((directory / name).read_text())["tensors"] for name in names}
    assert {path.name for path in directory.iterdir()} == names | tensors and len(tensors) == len(names)


def resumed(config, batches=tiny.stream):
    teacher, student = tiny.make_pair()
    result = distill(teacher, student, batches, dataclasses.replace(config, resume=True), progress=False)
    return result, tiny.weights(student)


@pytest.mark.parametrize("at", [1, 5, 6, 9])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, uninterrupted, at):
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    teacher, student = tiny.make_pair()
    with pytest.raises(Stop):
        distill(teacher, student, stopping_stream(at), config, progress=False)
    assert_no_leftovers(tmp_path)
    result, weights = resumed(config)
    assert result.resumed_from == (("layers", at) if at < 6 else ("output", at - 6))
    history, expected = uninterrupted
    assert without_times(result.history) == without_times(history)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_muon_phase_continues_bit_for_bit(tmp_path, dtype):
    config = dataclasses.replace(CONFIG, muon_lr=1e-2)
    teacher, student = tiny.make_pair(dtype=dtype)
    def batches(start):
        return tiny.stream(start, dtype=dtype)
    distill(teacher, student, batches, dataclasses.replace(config, save_every=None), progress=False)
    by_adamw = tiny.make_pair(dtype=dtype)
    distill(*by_adamw, batches, dataclasses.replace(CONFIG, save_every=None), progress=False)
    config = dataclasses.replace(config, checkpoint_dir=tmp_path)
    with pytest.raises(UserError, match="expected more than 8 batches"):
        distill(*tiny.make_pair(dtype=dtype), itertools.islice(batches(0), 8), config, progress=False)
    teacher, again = tiny.make_pair(dtype=dtype)
    result = distill(teacher, again, batches, dataclasses.replace(config, resume=True), progress=False)
    assert result.resumed_from == ("output", 2)
    expected, weights = tiny.weights(student), tiny.weights(again)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    name = "transformer_blocks.1.attn.to_q.weight"
    assert not torch.equal(expected[name], tiny.weights(by_adamw[1])[name])


def test_iterables_are_stepped_over_to_the_same_place(tmp_path, uninterrupted):
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    teacher, student = tiny.make_pair()
    with pytest.raises(UserError, match="expected more than 7 batches"):
        distill(teacher, student, itertools.islice(tiny.stream(), 7), config, progress=False)
    _, weights = resumed(config, tiny.stream())
    assert all(torch.equal(weights[name], expected) for name, expected in uninterrupted[1].items())


@pytest.mark.parametrize("layers, output, at, place", [(2, None, 1, ("layers", 1)), (2, None, 3, ("output", 1)),
                                                       (0, 2, 7, ("output", 1))])
def test_a_cache_is_filled_again(tmp_path, layers, output, at, place):
    """Killed while the layer phase fills its cache, or the output phase its own."""
    config = dataclasses.replace(CONFIG, save_every=None, cache_batches=layers, output_cache_batches=output)
    teacher, student = tiny.make_pair()
    whole = distill(teacher, student, tiny.stream, config, progress=False)
    config = dataclasses.replace(config, save_every=1, checkpoint_dir=tmp_path)
    with pytest.raises(Stop):
        distill(*tiny.make_pair(), stopping_stream(at), config, progress=False)
    result, weights = resumed(config)
    assert result.resumed_from == place
    assert without_times(result.history) == without_times(whole.history)
    assert all(torch.equal(weights[name], p) for name, p in tiny.weights(student).items())


def test_a_cache_is_filled_again_in_a_later_pass(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, output_steps=0, cache_batches=2, checkpoint_dir=tmp_path / "whole")
    teacher, student = tiny.make_pair()
    distill(teacher, student, tiny.stream, config, progress=False)
    config = dataclasses.replace(config, checkpoint_dir=tmp_path / "parts")
    real = checkpoint.save

    def save(directory, progress, *rest):
        real(directory, progress, *rest)
        if progress.step == 5:
            raise Stop

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Stop):
        distill(*tiny.make_pair(), tiny.stream, config, progress=False)
    monkeypatch.setattr(checkpoint, "save", real)
    result, weights = resumed(config)
    assert result.resumed_from == ("layers", 5)
    assert all(torch.equal(weights[name], p) for name, p in tiny.weights(student).items())


def test_sparse_saves_and_bf16_masters(tmp_path):
    def batches(start):
        return tiny.stream(start, dtype=torch.bfloat16)

    weights = []
    for at in (None, 5):
        config = dataclasses.replace(CONFIG, save_every=2, output_steps=0, checkpoint_dir=tmp_path / str(at))
        teacher, student = tiny.make_pair(dtype=torch.bfloat16)
        if at is not None:
            with pytest.raises(UserError, match="expected more than 5"):
                distill(teacher, student, itertools.islice(batches(0), at), config, progress=False)
            teacher, student = tiny.make_pair(dtype=torch.bfloat16)
            config = dataclasses.replace(config, resume=True)
        result = distill(teacher, student, batches, config, progress=False)
        weights.append(tiny.weights(student))
    assert result.resumed_from == ("layers", 4)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_run_only_loads(tmp_path, uninterrupted):
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    teacher, student = tiny.make_pair()
    distill(teacher, student, tiny.stream, config, progress=False)
    result, weights = resumed(config, stopping_stream(0))
    assert result.resumed_from == ("done", 0) and result.steps == {"layers": 6, "output": 4}
    assert all(torch.equal(weights[name], expected) for name, expected in uninterrupted[1].items())


def life(directory):
    torch.set_num_threads(1)

    def slow(start):
        for item in tiny.stream(start):
            time.sleep(0.05)
            yield item

    distill(*tiny.make_pair(), slow, dataclasses.replace(CONFIG, checkpoint_dir=directory), progress=False)


def test_a_killed_process_is_resumed_to_the_same_weights(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    process = context().Process(target=life, args=(str(directory),))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not progress_reached(directory, 3):
            assert process.is_alive(), "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result, weights = resumed(dataclasses.replace(CONFIG, checkpoint_dir=directory))
        teacher, student = tiny.make_pair()
        distill(teacher, student, tiny.stream, dataclasses.replace(CONFIG, save_every=None), progress=False)
    finally:
        torch.set_num_threads(threads)
    assert result.resumed_from[1] < 6 and result.resumed_from[0] in ("layers", "output")
    assert all(torch.equal(weights[name], p) for name, p in tiny.weights(student).items())


def progress_reached(directory, step):
    index = directory / checkpoint.INDEX
    return index.exists() and json.loads(index.read_text())["progress"]["step"] >= step


@pytest.mark.parametrize("write", [3, 4])  # of step 3: the JSON of the checkpoint before, and its own
def test_a_kill_between_tensors_and_index_keeps_the_previous_checkpoint(tmp_path, uninterrupted, monkeypatch, write):
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    writes = itertools.count()
    real = checkpoint.files.write_json

    def dying(path, obj):
        if next(writes) == write:
            raise Stop
        real(path, obj)

    monkeypatch.setattr(checkpoint.files, "write_json", dying)
    teacher, student = tiny.make_pair()
    with pytest.raises(Stop):
        distill(teacher, student, tiny.stream, config, progress=False)
    result, weights = resumed(config)
    assert result.resumed_from == ("layers", 2)
    assert all(torch.equal(weights[name], expected) for name, expected in uninterrupted[1].items())
    assert_no_leftovers(tmp_path)


@pytest.fixture
def partial(tmp_path):
    """A checkpoint after three steps, and its configuration."""
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    teacher, student = tiny.make_pair()
    with pytest.raises(Stop):
        distill(teacher, student, stopping_stream(3), config, progress=False)
    return config


@pytest.mark.parametrize("fields, message", [
    ({"layers_lr": 2e-3}, "checkpoint_dir: expected a checkpoint with config.layers_lr 0.002, got one made with 0.001"),
    ({"betas": (0.8, 0.9)}, r"config.betas \[0.8, 0.9\], got one made with \[0.9, 0.95\]"),
    ({"loss": "mse"}, "config.loss 'mse', got one made with 'direction'"),
])
def test_another_configuration_is_refused(partial, fields, message):
    with pytest.raises(UserError, match=message):
        resumed(dataclasses.replace(partial, **fields))


def test_another_plan_or_teacher_is_refused(partial):
    config = dataclasses.replace(partial, resume=True)
    teacher = tiny.make_teacher()
    student = pydit.prune(teacher, PruningPlan.from_intervals(6, [[1, 3]]))
    with pytest.raises(UserError, match=r"plan.intervals \[\[1, 3\]\], got one made with \[\[1, 2\], \[4, 5\]\]"):
        distill(teacher, student, tiny.stream, config, progress=False)
    teacher, student = tiny.make_pair(seed=1)
    with pytest.raises(UserError, match="expected a checkpoint with teacher"):
        distill(teacher, student, tiny.stream, config, progress=False)


def test_resume_says_what_it_wants(partial, tmp_path):
    with pytest.raises(UserError, match="expected a directory without a checkpoint, because resume is False"):
        distill(*tiny.make_pair(), tiny.stream, partial, progress=False)
    with pytest.raises(UserError, match="expected a checkpoint to resume, got none in"):
        resumed(dataclasses.replace(partial, checkpoint_dir=tmp_path / "elsewhere"))
    config = dataclasses.replace(partial, checkpoint_dir=tmp_path / "new", resume="auto", save_every=None)
    assert distill(*tiny.make_pair(), tiny.stream, config, progress=False).resumed_from is None


def test_broken_checkpoints_are_refused(partial, tmp_path):
    index = tmp_path / checkpoint.INDEX
    good = json.loads(index.read_text())
    (tmp_path / checkpoint.PREVIOUS).unlink()  # which would be taken instead
    state = tmp_path / good["tensors"]
    whole = state.read_bytes()
    state.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(FormatError, match="expected a complete safetensors file"):
        resumed(partial)
    state.write_bytes(whole)
    for broken, message in (({**good, "version": 99}, "version 1 in .*, got 'pydit-distill-checkpoint' version 99"),
                            ({**good, "progress": {"step": 1, "nonsense": 2}}, "got a broken one"),
                            ({**good, "tensors": "../elsewhere.safetensors"}, "expected a file name"),
                            ([], "got something else")):
        index.write_text(json.dumps(broken))
        with pytest.raises(FormatError, match=message):
            resumed(partial)
    index.write_text("{")
    with pytest.raises(FormatError, match="expected JSON"):
        resumed(partial)


def test_random_state_is_restored(tmp_path):
    """Dropout in the student draws the same numbers after a resume."""
    weights = []
    for at in (None, 3):
        config = dataclasses.replace(CONFIG, output_steps=0, checkpoint_dir=tmp_path / str(at))
        torch.manual_seed(5)
        teacher, student = with_dropout(*tiny.make_pair())
        if at is not None:
            with pytest.raises(Stop):
                distill(teacher, student, stopping_stream(at), config, progress=False)
            torch.manual_seed(99)
            teacher, student = with_dropout(*tiny.make_pair())
            config = dataclasses.replace(config, resume=True)
        distill(teacher, student, tiny.stream, config, progress=False)
        weights.append(tiny.weights(student))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def with_dropout(teacher, student):
    student.transformer_blocks[1].img_mlp.net[1].p = 0.5
    return teacher, student
