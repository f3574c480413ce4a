"""Pruned models: what each init builds, plugging teacher layers, saving, loading, and what must stay untouched."""

import copy
import json
import warnings

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import pydit
from pydit.errors import FormatError, UserError
from pydit.models import get_adapter
from pydit.models.qwen_image import PrunedQwenImageTransformer2DModel
from pydit.plan import PruningPlan
from tests.models import tiny

PLAN = PruningPlan.from_intervals(6, [[1, 3], [4, 5]])


@pytest.fixture
def teacher():
    return tiny.transformer(6)


@pytest.fixture
def student(teacher):
    return pydit.prune(teacher, PLAN)


def run(model, batch=None):
    with torch.no_grad():
        return model(**(batch or tiny.batch())).sample


def by_hand(teacher, layers, batch=None):
    """The teacher with only these layers, in order."""
    stock = copy.deepcopy(teacher)
    stock.transformer_blocks = torch.nn.ModuleList([teacher.transformer_blocks[k] for k in layers])
    return run(stock, batch)


@pytest.mark.parametrize("init, layers", [("first", (0, 1, 4)), ("middle", (0, 2, 4)), ("last", (0, 3, 5))])
def test_copying_inits(teacher, init, layers):
    student = pydit.prune(teacher, PLAN, init=init)
    assert torch.equal(run(student), by_hand(teacher, layers))
    assert student.source == [[0], [1, 2, 3], [4, 5]] and student.replaced == [(1, 1, 3), (2, 4, 5)]
    assert student.plan == PLAN and student.config.num_layers == 3


def test_average(teacher):
    block = pydit.prune(teacher, PLAN, init="average").transformer_blocks[1].state_dict()
    for name, tensor in block.items():
        mean = sum(teacher.transformer_blocks[k].state_dict()[name].double() for k in (1, 2, 3)) / 3
        assert torch.allclose(tensor.double(), mean, atol=1e-7)


@pytest.mark.parametrize("init", ["first", "average", "probe"])
def test_teacher_is_not_changed_and_nothing_is_shared(teacher, init):
    before, output = tiny.fingerprint(teacher), run(teacher)
    student = pydit.prune(teacher, PLAN, init=init, batches=[tiny.batch()])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert tiny.same(before, teacher.state_dict()) and torch.equal(run(teacher), output)
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert not teacher.training and not student.training


def interval_errors(teacher, student, batch):
    """Squared error of every interval's block on teacher inputs, per stream, real tokens only."""
    adapter = get_adapter(teacher)
    capture = adapter.capture(teacher, batch, range(7))
    real = capture.kwargs["encoder_hidden_states_mask"]
    errors = {}
    for block, start, end in student.replaced:
        with torch.no_grad():
            image, text = adapter.call_block(student.transformer_blocks[block], *capture.states[start], capture.kwargs)
        errors[start, "image"] = float((image - capture.states[end + 1][0]).square().sum())
        errors[start, "text"] = float((text - capture.states[end + 1][1])[real].square().sum())
    return errors


def test_probe_lowers_the_interval_error_on_new_batches(teacher):
    fit = [tiny.batch(images=16, seed=seed) for seed in range(5)]
    first, probe = pydit.prune(teacher, PLAN), pydit.prune(teacher, PLAN, init="probe", batches=iter(fit))
    before = interval_errors(teacher, first, tiny.batch(images=16, seed=99))
    after = interval_errors(teacher, probe, tiny.batch(images=16, seed=99))
    for key in ((1, "image"), (1, "text"), (4, "image")):
        assert after[key] < 0.9 * before[key], key
    assert after[4, "text"] == before[4, "text"]  # the model does not read the last block's text output


def test_probe_changes_only_the_last_linears(teacher):
    first, probe = (pydit.prune(teacher, PLAN, init=init, batches=[tiny.batch()]) for init in ("first", "probe"))
    refitted = probe.state_dict()
    changed = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, refitted[name])}
    assert changed == {f"transformer_blocks.{name}.{kind}" for name in ("1.img_mlp.net.2", "1.txt_mlp.net.2",
                                                                        "2.img_mlp.net.2")
                       for kind in ("weight", "bias")}


def test_probe_is_exact_where_the_last_linear_is_all_that_differs(teacher):
    """Layer 2 does nothing and layer 1 lost its last linear: refitting must find the lost weights' output again."""
    with torch.no_grad():
        for modulation in (teacher.transformer_blocks[2].img_mod, teacher.transformer_blocks[2].txt_mod):
            modulation[1].weight.zero_(), modulation[1].bias.zero_()
        student_start = copy.deepcopy(teacher)
    plan = PruningPlan.from_intervals(6, [[1, 2]])
    student = pydit.prune(student_start, plan, init="probe", batches=[tiny.batch()])
    assert torch.allclose(run(student), run(teacher), atol=1e-5)


def test_probe_says_when_tokens_are_fewer_than_unknowns(teacher):
    """256 inputs and a bias; the text of the last interval, which nothing reads, is not fitted."""
    batches = [tiny.batch(images=16, seed=seed) for seed in range(2)]
    with pytest.warns(UserWarning, match=r"1 of the layers that init=.probe. fits have more unknowns than tokens \(the "
                                         r"first, text of layers 1-3: 257 for \d+\)"):
        pydit.prune(teacher, PLAN, init="probe", batches=batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pydit.prune(teacher, PLAN, init="probe", batches=[tiny.batch(images=16, seed=seed) for seed in range(6)])


def test_probe_needs_batches(teacher):
    with pytest.raises(UserError, match='batches: expected calibration batches for init="probe", got none'):
        pydit.prune(teacher, PLAN, init="probe")
    with pytest.raises(UserError, match="expected at least one calibration batch"):
        pydit.prune(teacher, PLAN, init="probe", batches=[])


@pytest.mark.parametrize("active, layers", [
    ([], range(6)),
    ([[4, 5]], (0, 1, 2, 3, 4)),
    ([(1, 3)], (0, 1, 4, 5)),
    ([(4, 5), (1, 3)], (0, 1, 4)),
    (torch.tensor([[1, 3]]), (0, 1, 4, 5)),
])
def test_set_active(teacher, student, active, layers):
    batch = tiny.batch()
    student.set_active(active)
    assert torch.equal(run(student, batch), by_hand(teacher, layers, batch))
    assert get_adapter(student).num_layers(student) == len(layers)
    student.set_active(PLAN.intervals)
    assert torch.equal(run(student, batch), by_hand(teacher, (0, 1, 4), batch))
    assert student.active == list(PLAN.intervals)


def test_teacher_layers_are_no_part_of_the_student(teacher, student):
    names = set(student.state_dict())
    student.set_active([])
    assert set(student.state_dict()) == names
    assert not any(name.startswith("transformer_blocks.3") for name in names)
    assert len(list(student.parameters())) < len(list(teacher.parameters()))
    assert len(student.transformer_blocks) == 3
    student.train()
    assert not any(block.training for block in teacher.transformer_blocks)
    student.double()
    assert next(teacher.parameters()).dtype == torch.float32
    with pytest.raises(UserError, match="teacher's layers on cpu, torch.float64 like the student, got cpu"):
        run(student, tiny.cast(tiny.batch(), torch.float64))
    assert "QwenImageTransformerBlock" in repr(student)
    student.float()
    assert torch.equal(run(student), run(teacher))


def test_deepcopy_shares_the_teacher(teacher, student):
    twin = copy.deepcopy(student)
    twin.set_active([])
    assert student.active == list(PLAN.intervals) and twin.active == []
    assert twin.transformer_blocks.teacher is student.transformer_blocks.teacher
    assert twin.transformer_blocks[1] is not student.transformer_blocks[1]
    assert torch.equal(run(twin), run(teacher))


@pytest.mark.parametrize("active", [[], [(1, 3)], PLAN.intervals])
def test_gradient_checkpointing(student, active):
    student.set_active(active)
    batch = tiny.batch()
    plain = student(**batch).sample
    plain.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    student.enable_gradient_checkpointing()
    output = student(**batch).sample
    output.square().sum().backward()
    assert torch.equal(output, plain)
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_bad_set_active(student):
    with pytest.raises(UserError, match=r"expected intervals of the plan \[\(1, 3\), \(4, 5\)\], got \[\(1, 2\)\]"):
        student.set_active([[1, 2]])
    for wrong in ([1, 3], [(1, 3.0)], [("1", "3")]):
        with pytest.raises(UserError, match="expected .start, end. pairs of integers, got"):
            student.set_active(wrong)
    assert student.active == [(1, 3), (4, 5)]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_save_and_load(tmp_path, teacher, student, with_teacher):
    student.save_pretrained(tmp_path, with_teacher=with_teacher)
    small = PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path, with_teacher=False)
    assert torch.equal(run(small), run(student)) and not small.transformer_blocks.teacher.layers
    loaded = PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path)
    assert (run(loaded) - run(student)).abs().max() == 0
    assert (loaded.plan, loaded.source, loaded.replaced) == (student.plan, student.source, student.replaced)
    assert (tmp_path / "teacher_layers.safetensors").exists() == with_teacher
    if not with_teacher:
        with pytest.raises(UserError, match=r"layers \[1, 2, 3, 4, 5\] are not attached"):
            loaded.set_active([])
        loaded.attach_teacher(teacher)
    loaded.set_active([])
    assert torch.equal(run(loaded), run(teacher))


def test_saving_again_without_teacher_removes_it(tmp_path, student):
    student.save_pretrained(tmp_path, with_teacher=True)
    student.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_load_casts_the_teacher_too(tmp_path, student):
    student.save_pretrained(tmp_path, with_teacher=True)
    loaded = PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    loaded.set_active([])
    assert run(loaded, tiny.cast(tiny.batch(), torch.bfloat16)).dtype == torch.bfloat16


def test_stock_diffusers_loads_it(tmp_path, teacher, student):
    student.set_active([])
    stock = student.to_stock()
    assert type(stock) is QwenImageTransformer2DModel and "pydit" not in stock.config
    stock.save_pretrained(tmp_path)
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), by_hand(teacher, (0, 1, 4)))
    shared = {p.data_ptr() for p in student.parameters()}
    assert {p.data_ptr() for p in stock.parameters()} == shared


@pytest.mark.parametrize("change, message", [
    (lambda c: c.update(num_layers=4), "expected num_layers 3 and family qwen-image as in the plan, got 4"),
    (lambda c: c["pydit"]["plan"].update(version=7), "expected version 1, 2 or 3, got 7"),
    (lambda c: c.update(pydit={"other": 1}), "config: expected \"pydit\""),
])
def test_bad_config(tmp_path, student, change, message):
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path)


def test_truncated_teacher_file(tmp_path, student):
    student.save_pretrained(tmp_path, with_teacher=True)
    path = tmp_path / "teacher_layers.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FormatError, match="teacher layers: expected a complete safetensors file"):
        PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path)


def test_prune_errors(teacher, student):
    with pytest.raises(UserError, match="plan: expected a plan for the model's 6 layers, got one for 60"):
        pydit.prune(teacher, PruningPlan.preset("ppcl-qwen-image-12b"))
    with pytest.raises(UserError, match="init: expected one of first, middle, last, average, position-average, probe, got 'ends'"):
        pydit.prune(teacher, PLAN, init="ends")
    with pytest.raises(UserError, match="got a pruned one; prune its to_stock"):
        pydit.prune(student, PruningPlan("qwen-image", 3))
    with pytest.raises(UserError, match="plan: expected a PruningPlan, got list"):
        pydit.prune(teacher, [[1, 2]])
    with pytest.raises(UserError, match="transformer: expected QwenImageTransformer2DModel"):
        pydit.prune(torch.nn.Linear(1, 1), PLAN)
    for wrong, message in (({"ridge": "1"}, "ridge: expected a number >= 0, got '1'"),
                           ({"tokens_per_batch": 0}, "tokens_per_batch: expected a whole number of 1 or more, got 0"),
                           ({"seed": 0.5}, "seed: expected a whole number, got 0.5")):
        with pytest.raises(UserError, match=message):
            pydit.prune(teacher, PLAN, **wrong)


def test_dry_run_and_pruning_again(teacher, student):
    text = pydit.prune(teacher, PLAN, dry_run=True)
    assert "6 layers -> 3 (3 removed, 50.0 %)" in text and "init: first" in text
    again = pydit.prune(student.to_stock(), PruningPlan.from_intervals(3, [[1, 2]]))
    assert torch.equal(run(again), by_hand(teacher, (0, 1)))


def test_empty_plan_is_a_copy(teacher):
    assert torch.equal(run(pydit.prune(teacher, PruningPlan("qwen-image", 6))), run(teacher))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(teacher, dtype):
    student = pydit.prune(teacher.to(dtype), PLAN, init="probe", batches=[tiny.cast(tiny.batch(), dtype)])
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.slow  # importing the compiler
def test_compiles_in_one_graph_and_follows_set_active(student):
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    for active in (PLAN.intervals, [], [(1, 3)]):
        student.set_active(active)
        assert torch.equal(run(compiled), run(student))
