"""Twenty kills, damaged checkpoints, a full disk, Ctrl-C: a resumed run still ends with the weights of an unbroken one."""

import dataclasses
import errno
import os
import random
import signal
import sys
import time
import warnings

import pytest
import torch

from pydit import FormatError
from pydit.distill import checkpoint, distill
from tests.distill import crash, tiny
from tests.distill.test_resume import CONFIG, Stop, resumed, stopping_stream, uninterrupted  # noqa: F401
from tests.processes import context

KILLS = 20


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _wait_for(path, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
def test_twenty_kills(tmp_path, one_thread):
    """Three of them in the middle of a checkpoint's write: tensors half written, before either JSON."""
    generator = random.Random(0)
    directory = tmp_path / "run"
    points = [*crash.POINTS, *[None] * (KILLS - len(crash.POINTS))]
    generator.shuffle(points)
    for point in points:
        for suffix in (".alive", ".hanging"):
            directory.with_suffix(suffix).unlink(missing_ok=True)
        process = context().Process(target=crash.live, args=(str(directory), point))
        process.start()
        if point is None:
            _wait_for(directory.with_suffix(".alive"), process)
            time.sleep(generator.uniform(0, 0.12))
        else:
            _wait_for(directory.with_suffix(".hanging"), process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    teacher, student = tiny.make_pair()
    result = distill(teacher, student, tiny.stream, dataclasses.replace(crash.CONFIG, checkpoint_dir=directory),
                     progress=False)
    assert result.resumed_from is not None and result.steps == {"layers": 60, "output": 30}
    teacher, whole = tiny.make_pair()
    distill(teacher, whole, tiny.stream, dataclasses.replace(crash.CONFIG, save_every=None, resume=False), progress=False)
    expected = tiny.weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.weights(student).items())


def flip(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 4  # one bit of a weight: safetensors itself cannot see it
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda directory, tensors: flip(tensors),
    "a truncated file": lambda directory, tensors: os.truncate(tensors, 1000),
    "a lost file": lambda directory, tensors: tensors.unlink(),
    "a broken JSON": lambda directory, tensors: (directory / checkpoint.INDEX).write_text('{"format": "pyd'),
    "an empty JSON": lambda directory, tensors: (directory / checkpoint.INDEX).write_text(""),
    "a lost JSON": lambda directory, tensors: (directory / checkpoint.INDEX).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted, damage):  # noqa: F811
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    with pytest.raises(Stop):
        distill(*tiny.make_pair(), stopping_stream(5), config, progress=False)
    DAMAGE[damage](tmp_path, tmp_path / "state-layers-00000005.safetensors")
    with pytest.warns(UserWarning, match="going on from the checkpoint before, step 4 of phase layers"):
        result, weights = resumed(config)
    assert result.resumed_from == ("layers", 4)
    assert all(torch.equal(weights[name], expected) for name, expected in uninterrupted[1].items())


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    with pytest.raises(Stop):
        distill(*tiny.make_pair(), stopping_stream(5), config, progress=False)
    for step in (4, 5):
        flip(tmp_path / f"state-layers-0000000{step}.safetensors")
    with pytest.raises(FormatError, match=r"got a damaged file .*state-layers-00000005"):
        resumed(config)


@pytest.mark.parametrize("writer", ["save_safetensors", "write_json"])
def test_a_full_disk_names_the_checkpoint_that_is_left(tmp_path, uninterrupted, monkeypatch, writer):  # noqa: F811
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    real, calls = getattr(checkpoint.files, writer), []

    def full(*args):
        calls.append(args)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint.files, writer, full)
    with pytest.raises(OSError, match="could not write a checkpoint .No space left on device.; the last good one is in"
                                      ) as caught:
        distill(*tiny.make_pair(), tiny.stream, config, progress=False)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(checkpoint.files, writer, real)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _result, weights = resumed(config)
    assert all(torch.equal(weights[name], expected) for name, expected in uninterrupted[1].items())


def interrupted(directory):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    crash.CONFIG = dataclasses.replace(crash.CONFIG, save_every=10**6)
    try:
        crash.live(directory)
    except KeyboardInterrupt:
        sys.exit(130)


def test_ctrl_c_saves(tmp_path, one_thread):
    directory = tmp_path / "run"
    process = context().Process(target=interrupted, args=(str(directory),))
    process.start()
    _wait_for(directory.with_suffix(".alive"), process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    config = dataclasses.replace(crash.CONFIG, checkpoint_dir=directory, save_every=10**6)
    teacher, student = tiny.make_pair()
    result = distill(teacher, student, tiny.stream, config, progress=False)
    assert result.resumed_from[0] == "layers" and 1 <= result.resumed_from[1] < 60
    teacher, whole = tiny.make_pair()
    distill(teacher, whole, tiny.stream, dataclasses.replace(config, checkpoint_dir=None, save_every=None, resume=False),
            progress=False)
    expected = tiny.weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.weights(student).items())
