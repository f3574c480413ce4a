"""A process that streams and saves after every batch, killed without warning: what is left goes on to the same end."""

import os
import signal
import time

import torch

from pydit import files
from pydit.stats import CKA, Moments
from tests.processes import context
from tests.stats.test_cka import features
from tests.stats.test_moments import FIELDS, rows

BATCHES = 40


def stream(path, batches=BATCHES, pause=0.0):
    """Moments and CKA of the batches, from what ``path`` holds on; saved there after each."""
    moments, cka = Moments(6, 4), CKA(2)
    if path.exists():
        state, _ = files.load_safetensors(path, what="state")
        for name, part in (("moments", moments), ("cka", cka)):
            part.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state.items()
                                  if key.startswith(f"{name}.")})
    for seed in range(cka.batches, batches):
        moments.update(*rows(n=50, offset=100.0, seed=seed))
        cka.update(features(10 if seed + 1 < BATCHES else 5, (4, 4), seed=seed))
        files.save_safetensors(path, {f"{name}.{key}": value for name, part in (("moments", moments), ("cka", cka))
                                      for key, value in part.state_dict().items()})
        time.sleep(pause)
    return moments, cka


def test_killed_and_resumed(tmp_path):
    path = tmp_path / "state.safetensors"
    life = context().Process(target=stream, args=(path, BATCHES, 0.05))
    life.start()
    while not path.exists():
        assert life.is_alive()
        time.sleep(0.01)
    os.kill(life.pid, signal.SIGKILL)
    life.join()
    assert life.exitcode == -signal.SIGKILL
    moments, cka = stream(path, 0)  # what the file holds
    assert 0 < cka.batches < BATCHES and moments.count == 50 * cka.batches
    resumed, whole = stream(path), stream(tmp_path / "whole.safetensors")
    assert all(torch.equal(getattr(resumed[0], name), getattr(whole[0], name)) for name in FIELDS)
    assert torch.equal(resumed[1].matrix(), whole[1].matrix())
    assert resumed[1].describe() == f"{BATCHES} batches of 10 rows; batch {BATCHES - 1} has 5"
