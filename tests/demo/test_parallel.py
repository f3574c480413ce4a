"""Distillation in two processes: both take part, and a process that dies is named."""

import pytest
import torch

from pydit.demo import data, parallel
from pydit.distill import DistillConfig, distill
from pydit.errors import UserError
from pydit.inference.pipeline import load_pipeline
from pydit.plan import PruningPlan
from pydit.pruning import prune
from tests.demo.pipelines import untrained

BATCHES = {"batch_size": 4, "seed": 3, "images": 16}


def _train(work, workers, folder=None, batches=BATCHES, **config):
    pipe = load_pipeline(untrained(), dtype=torch.float32)
    student = prune(pipe.transformer, PruningPlan.from_intervals(6, [(1, 2)]))
    result = parallel.train(pipe, student, DistillConfig(layers_steps=2, layers_lr=1e-3, output_steps=2, output_lr=1e-3,
                                                         log_every=1, **config),
                            folder=folder or untrained(), work=work, workers=workers, batches=batches)
    return result, student


@pytest.mark.slow
def test_two_processes_train_on_batches_of_their_own(tmp_path):
    threads = torch.get_num_threads()
    (both, student), (alone, _) = _train(tmp_path, 2), _train(tmp_path, 1)
    assert both.steps == alone.steps == {"layers": 2, "output": 2}
    # The loss of the first step is the mean of what each process finds on its first batch.
    pipe = load_pipeline(untrained(), dtype=torch.float32)
    other = data.make_batches(pipe, **{**BATCHES, "seed": 1003})
    second = distill(pipe.transformer, prune(pipe.transformer, PruningPlan.from_intervals(6, [(1, 2)])), other,
                     DistillConfig(layers_steps=1, layers_lr=1e-3, log_every=1))
    expected = (alone.history[0]["loss"] + second.history[0]["loss"]) / 2
    assert both.history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert torch.get_num_threads() == threads and not torch.distributed.is_initialized()
    assert not (tmp_path / "meeting").exists() and all(p.isfinite().all() for p in student.parameters())


@pytest.mark.slow
def test_two_processes_train_on_states_that_their_student_draws(tmp_path):
    batches = {"batch_size": 2, "seed": 3, "pairs": True, "weights": [1.0, 0, 0, 0, 0, 0, 0], "on_policy": True}
    (both, student), (alone, _) = (_train(tmp_path, workers, batches=batches, guidance=2.5) for workers in (2, 1))
    assert both.steps == alone.steps == {"layers": 2, "output": 2}
    assert both.history[0]["loss"] != alone.history[0]["loss"] and all(p.isfinite().all() for p in student.parameters())


@pytest.mark.slow
def test_a_process_that_dies_is_named(tmp_path, monkeypatch):
    original = parallel.write_json
    monkeypatch.setattr(parallel, "write_json", lambda path, job: original(
        path, {**job, "batches": {**job["batches"], "batch_size": "four"}}))
    with pytest.raises(UserError, match=r"process 1 ended with code 1; its output is in .*worker1\.log"):
        _train(tmp_path, 2)
    assert "batch_size: expected a whole number" in (tmp_path / "worker1.log").read_text()
    assert not torch.distributed.is_initialized()
