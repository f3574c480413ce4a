"""Every field is checked, and the message says which, what and what came."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pydit import PruningPlan, UserError
from pydit.distill import DistillConfig, Stage, trainer


@pytest.mark.parametrize("fields, message", [
    ({"layers_steps": -1}, "layers_steps: expected a whole number >= 0, or None, got -1"),
    ({"layers_steps": 2.5}, "layers_steps: .* got 2.5"),
    ({"layers_steps": True}, "layers_steps: .* got True"),
    ({"output_steps": "10"}, "output_steps: .* got '10'"),
    ({"layers_steps": None}, "layers_steps: expected a whole number, because max_minutes is not given, got None"),
    ({"output_steps": None}, "output_steps: expected a whole number, because max_minutes is not given, got None"),
    ({"layers_steps": 0}, "layers_steps: expected at least one phase with steps, got 0"),
    ({"layers_lr": 0}, "layers_lr: expected a number > 0, got 0"),
    ({"output_lr": float("nan")}, "output_lr: expected a number > 0, got nan"),
    ({"max_minutes": 0}, "max_minutes: expected a number > 0, or None, got 0"),
    ({"output_share": 1.0}, "output_share: expected a number from 0 up to, not including, 1, got 1.0"),
    ({"loss": "cosine"}, "loss: expected one of direction, normalized_mse, mse, masked_mse, got 'cosine'"),
    ({"magnitude": -0.1}, "magnitude: expected a number >= 0, got -0.1"),
    ({"output_trainable": "some"}, "output_trainable: expected 'replaced' or 'all', got 'some'"),
    ({"boundary_weight": float("inf")}, "boundary_weight: expected a number >= 0, got inf"),
    ({"flow_weight": None}, "flow_weight: expected a number >= 0, got None"),
    ({"guidance": 0}, "guidance: expected a number > 0, or None, got 0"),
    ({"warmup": 1}, "warmup: .* got 1"),
    ({"final_lr": 1.5}, "final_lr: expected a number from 0 to 1, got 1.5"),
    ({"betas": (0.9, 1.0)}, "betas: expected two numbers .* got \\(0.9, 1.0\\)"),
    ({"betas": 0.9}, "betas: .* got 0.9"),
    ({"weight_decay": "x"}, "weight_decay: .* got 'x'"),
    ({"eps": 0}, "eps: expected a number > 0, got 0"),
    ({"clip": -1}, "clip: expected a number >= 0, got -1"),
    ({"ema": 0.5}, "ema: expected a number from 0 to 0.28, got 0.5"),
    ({"gradient_checkpointing": 1}, "gradient_checkpointing: expected True or False, got 1"),
    ({"shard": "both"}, "shard: expected one of none, student, all, got 'both'"),
    ({"split_batches": None}, "split_batches: expected True or False, got None"),
    ({"optimizer": "sgd"}, "optimizer: expected one of adamw, adamw8bit, got 'sgd'"),
    ({"optimizer": "adamw8bit", "shard": "student"}, "optimizer: expected 'adamw', because shard is 'student'"),
    ({"teacher_memory": "streamed", "shard": "all"}, "teacher_memory: expected resident, because shard is 'all'"),
    ({"cache_batches": -1}, "cache_batches: expected a whole number >= 0, got -1"),
    ({"cache_dir": ""}, "cache_dir: expected a path or None, got ''"),
    ({"cache_dir": "d"}, "cache_batches: expected at least 1, because there is a cache_dir, got 0"),
    ({"cache_dir": "d", "cache_batches": 2, "layers_steps": 0, "output_steps": 1},
     "cache_dir: expected None, because layers_steps is 0 and only what the teacher-fed phase sees is kept on disk"),
    ({"cache_dir": "d", "cache_batches": 2, "output_steps": 1},
     "output_cache_batches: expected a whole number, because there is a cache_dir"),
    ({"data": {1, 2}}, "data: expected a mapping of plain data for JSON, or None"),
    ({"data": {"noise": float("nan")}}, "data: expected a mapping of plain data for JSON"),
    ({"data": {"noise": (1, 2)}}, "data: expected a mapping of plain data for JSON"),
    ({"log_every": 0}, "log_every: expected a whole number >= 1, got 0"),
    ({"checkpoint_dir": ""}, "checkpoint_dir: expected a path or None, got ''"),
    ({"checkpoint_dir": "d", "save_every": 0}, "save_every: expected a whole number >= 1, or None, got 0"),
    ({"checkpoint_dir": "d", "save_every_seconds": -1}, "save_every_seconds: .* got -1"),
    ({"checkpoint_dir": "d", "resume": "yes"}, "resume: expected True, False or 'auto', got 'yes'"),
    ({"save_every": 5}, "save_every: expected a checkpoint_dir to go with it, got 5 and checkpoint_dir None"),
    ({"resume": "auto"}, "resume: expected a checkpoint_dir"),
])
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        DistillConfig(**fields).validate()


def test_defaults_and_time_budgets_are_valid():
    DistillConfig().validate()
    DistillConfig(layers_steps=None, output_steps=None, max_minutes=6).validate()
    DistillConfig(layers_steps=0, output_steps=3).validate()


def test_a_config_survives_json():
    config = DistillConfig(layers_steps=7, betas=(0.8, 0.9), checkpoint_dir="here", save_every=3, resume="auto",
                           cache_dir=Path("there"), cache_batches=2)
    again = DistillConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == dataclasses.replace(config, cache_dir="there")
    config = DistillConfig(intervals=((1, 2), (4, 6)))
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match=r"intervals: expected pairs of whole numbers, or None, got \(\(1, 2\), 4\)"):
        DistillConfig.from_dict({"intervals": [[1, 2], 4]})


def test_unknown_fields_and_non_mappings_are_refused():
    with pytest.raises(UserError, match="config: expected fields among layers_steps, .*, got 'learning_rate'"):
        DistillConfig.from_dict({"learning_rate": 1e-3})
    with pytest.raises(UserError, match="config: expected a mapping of field names to values, got list"):
        DistillConfig.from_dict([1])


def test_only_bookkeeping_may_change_between_parts_of_a_run():
    base = DistillConfig()
    for field in dataclasses.fields(DistillConfig):
        if field.name == "schedule":  # each of its stages has a checkpoint of its own
            continue
        other = dataclasses.replace(base, **{field.name: "different"})
        may_change = field.name in ("checkpoint_dir", "save_every", "save_every_seconds", "resume", "log_every", "shard",
                                    "teacher_memory", "cache_dir")
        if field.name != "betas":
            assert (other.computation() == base.computation()) == may_change, field.name


@pytest.mark.parametrize("fields, layers, output", [({}, 0, 0), ({"cache_batches": 3}, 3, 3),
                                                    ({"output_cache_batches": 4}, 0, 4),
                                                    ({"cache_batches": 3, "output_cache_batches": 0}, 3, 0)])
def test_each_phase_has_its_cache(fields, layers, output):
    config = DistillConfig(**fields)
    assert (config.cache_size("layers"), config.cache_size("output")) == (layers, output)


@pytest.mark.parametrize(("mine", "main", "due"), [(19.9, 20.1, True), (20.1, 19.9, False)])
def test_the_main_process_says_when_a_checkpoint_is_due(monkeypatch, tmp_path, mine, main, due):
    """By its own clock a process could save a step before the others, and wait for them for ever."""
    config = SimpleNamespace(checkpoint_dir=tmp_path, save_every=None, save_every_seconds=20.0)
    run = SimpleNamespace(config=config, progress=SimpleNamespace(step=3), saved_at=0.0, _now=lambda: mine, device="cpu")
    monkeypatch.setattr(trainer.distributed, "agree", lambda value, device: main)
    assert trainer._Run._save_is_due(run, SimpleNamespace(steps=10)) is due
    config.save_every = 3
    assert trainer._Run._save_is_due(run, SimpleNamespace(steps=10)) is True


def test_whole_numbers_of_any_kind():
    """As ints, so that a checkpoint can hold them."""
    given = DistillConfig(layers_steps=np.int64(5), output_steps=torch.tensor(3), log_every=np.uint8(2),
                          schedule=(Stage(PruningPlan("qwen-image", 4, [(1, 2)]), np.int32(4)),))
    given.validate()
    plain = DistillConfig(layers_steps=5, output_steps=3, log_every=2,
                          schedule=(Stage(PruningPlan("qwen-image", 4, [(1, 2)]), 4),))
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict()) and given.schedule[0].layers_steps == 4
    with pytest.raises(UserError, match="layers_steps: expected a whole number >= 0, or None, got "):
        DistillConfig(layers_steps=np.True_).validate()


def test_numbers_of_numpy_and_torch():
    given = DistillConfig(layers_lr=np.float32(0.5), output_lr=torch.tensor(0.25), betas=(np.float16(0.5), np.float64(0.75)),
                          gradient_checkpointing=np.True_, magnitude=np.int64(2))
    given.validate()
    fields = given.to_dict()
    assert json.dumps(fields) == json.dumps(DistillConfig(layers_lr=0.5, output_lr=0.25, betas=(0.5, 0.75),
                                                          gradient_checkpointing=True, magnitude=2).to_dict())
    assert [type(fields[name]) for name in ("layers_lr", "output_lr", "gradient_checkpointing")] == [float, float, bool]


@pytest.mark.parametrize("value", [1e300, 10**400, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["layers_lr", "muon_lr", "flow_weight"])
def test_numbers_that_float32_cannot_hold_are_named(name, value):
    with pytest.raises(UserError, match=rf"{name}: expected a number >=? 0.*, got (1e\+300|10000|inf|nan)"):
        DistillConfig(**{name: value}).validate()
