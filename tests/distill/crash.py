"""A run that a parent process kills: forked from a server that has imported everything, so that a life costs little."""

import dataclasses
import time
from pathlib import Path

import torch

from pydit.distill import DistillConfig, checkpoint, distill
from tests.distill import tiny

CONFIG = DistillConfig(layers_steps=60, layers_lr=1e-3, output_steps=30, output_lr=1e-3, output_trainable="all",
                       log_every=7, save_every=1, resume="auto")
tiny.make_pair()  # half a second the first time, which every life would spend
POINTS = ("tensors", "previous", "index")  # moments of a checkpoint's write


def slow(start):
    """The stream of a run that takes a while."""
    for item in tiny.stream(start):
        time.sleep(0.01)
        yield item


def live(directory, hang_at=None):
    """Train until killed or done. ``hang_at``: in the second checkpoint, wait at that point of its write for the kill.

    Touches ``<directory>.alive`` at the first step, and ``<directory>.hanging`` where it waits.
    """
    torch.set_num_threads(1)
    directory = Path(directory)

    def batches(start):
        for item in slow(start):
            directory.with_suffix(".alive").touch()
            yield item

    if hang_at is not None:
        _hang(directory, hang_at)
    distill(*tiny.make_pair(), batches, dataclasses.replace(CONFIG, checkpoint_dir=directory), progress=False)


def _hang(directory, point):
    saves = [0]
    save, write_json, save_file = checkpoint.save, checkpoint.files.write_json, checkpoint.files.save_safetensors

    def wait():
        directory.with_suffix(".hanging").touch()
        time.sleep(60)

    def counted(*args):
        saves[0] += 1
        save(*args)

    def json_writer(path, data):
        if saves[0] == 2 and Path(path).name == {"previous": checkpoint.PREVIOUS, "index": checkpoint.INDEX}.get(point):
            wait()
        write_json(path, data)

    def tensor_writer(path, tensors, metadata=None):
        if saves[0] == 2 and point == "tensors":
            with checkpoint.files.replace_file(path) as temporary:  # half a file under its temporary name
                temporary.write_bytes(b"\x10" * 5000)
                wait()
        save_file(path, tensors, metadata)

    checkpoint.save = counted
    checkpoint.files.write_json, checkpoint.files.save_safetensors = json_writer, tensor_writer
