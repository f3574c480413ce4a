"""FLUX.1 and SD3.5: what their adapters see, and pruned models of theirs."""

import copy
import warnings

import pytest
import torch

import pydit
from pydit.errors import FormatError, UserError
from pydit.models import get_adapter
from pydit.models.flux import PrunedFluxTransformer2DModel
from pydit.models.sd3 import PrunedSD3Transformer2DModel
from pydit.plan import PruningPlan
from tests.models import tiny


def flux():
    return tiny.flux(num_layers=4, num_single_layers=5)


def sd3():
    return tiny.sd3(num_layers=7, dual_attention_layers=(0, 1, 2))


FAMILIES = {
    "flux.1": (flux, tiny.flux_batch, PrunedFluxTransformer2DModel, 9, [(1, 2), (4, 6)]),
    "sd3.5": (sd3, tiny.sd3_batch, PrunedSD3Transformer2DModel, 7, [(0, 1), (2, 4)]),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def teacher(family):
    model = FAMILIES[family][0]()
    with torch.no_grad():  # so that every block does something
        for name, parameter in model.named_parameters():
            if "norm1" in name or ".norm.linear" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model


@pytest.fixture
def batch(family):
    return FAMILIES[family][1]()


@pytest.fixture
def plan(family):
    return PruningPlan.from_intervals(FAMILIES[family][3], FAMILIES[family][4], family=family)


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def by_hand(teacher, layers, batch):
    """The teacher with only these layers, in order."""
    adapter, stock = get_adapter(teacher), copy.deepcopy(teacher)
    blocks = adapter.blocks(stock)
    first = len(getattr(stock, adapter.block_lists[0]))
    for name, chosen in zip(adapter.block_lists, ([k for k in layers if k < first], [k for k in layers if k >= first]),
                            strict=False):
        setattr(stock, name, torch.nn.ModuleList([blocks[k] for k in chosen]))
    return run(stock, batch)


def test_published_sizes():
    """diffusers' facts: exact counts on the meta device."""
    assert PruningPlan("flux.1", 57).num_parameters() == 11_901_408_320
    assert PruningPlan("sd3.5", 38).num_parameters() == 8_056_627_520
    assert PruningPlan("sd3.5", 24).num_parameters() == 2_243_171_520
    eight = PruningPlan.preset("ppcl-flux.1-8b")
    assert 7.9e9 < eight.num_parameters() < 8.1e9 and "placeholder" in eight.describe()
    five = PruningPlan.preset("ppcl-sd3.5-large-5b")
    assert 5.2e9 < five.num_parameters() < 5.4e9 and "placeholder" in five.describe()


def test_captured_states_chain(teacher, batch):
    adapter = get_adapter(teacher)
    depth = adapter.num_layers(teacher)
    capture = adapter.capture(teacher, batch, range(depth + 1))
    image, text = capture.states[0]
    with torch.no_grad():
        for k, block in enumerate(adapter.blocks(teacher)):
            image, text = adapter.call_block(block, image, text, capture.kwargs)
            assert torch.equal(image, capture.states[k + 1][0])
            if text is not None:
                assert torch.equal(text, capture.states[k + 1][1])


def test_count_equals_the_model(teacher, plan, batch):
    student = pydit.prune(teacher, plan)
    assert plan.num_parameters(dict(teacher.config)) == sum(p.numel() for p in student.parameters())
    empty = PruningPlan(plan.family, plan.num_layers)
    assert empty.num_parameters(dict(teacher.config)) == sum(p.numel() for p in teacher.parameters())


def test_flops_are_those_counted_by_torch(teacher, plan, batch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    one = {name: value[:1] if name not in ("img_ids", "txt_ids") else value for name, value in batch.items()}

    def counted(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(**one)
        return counter.get_total_flops()

    tokens = {"image_tokens": 20 if plan.family == "flux.1" else 16, "text_tokens": 7}
    config = dict(teacher.config)
    expected = PruningPlan(plan.family, plan.num_layers).num_flops(config, **tokens) - plan.num_flops(config, **tokens)
    assert counted(teacher) - counted(pydit.prune(teacher, plan)) == expected


@pytest.mark.parametrize("init", ["first", "middle", "last"])
def test_copying_inits(family, teacher, plan, batch, init):
    if family == "sd3.5" and init != "first":
        with pytest.raises(UserError, match='init: expected "first" for an interval whose layers differ in structure'):
            pydit.prune(teacher, plan, init=init)
        return
    place = {"first": lambda n: 0, "middle": lambda n: (n - 1) // 2, "last": lambda n: n - 1}[init]
    chosen = [layers[place(len(layers))] for layers in plan.source]
    student = pydit.prune(teacher, plan, init=init)
    assert torch.equal(run(student, batch), by_hand(teacher, chosen, batch))
    assert type(student) is FAMILIES[family][2] and student.source == [list(layers) for layers in plan.source]


def test_the_last_layer_of_sd3_stands_for_an_interval():
    """It has the form that the block needs, which the layers before it have not."""
    make, batch, _cls, depth, _ = FAMILIES["sd3.5"]
    teacher = make()
    student = pydit.prune(teacher, PruningPlan.from_intervals(depth, [(depth - 2, depth - 1)], family="sd3.5"), init="last")
    assert torch.equal(run(student, batch()), by_hand(teacher, [*range(depth - 2), depth - 1], batch()))


@pytest.mark.parametrize("init, weights", [("average", (1, 1)), ("position-average", (2, 1))])
def test_averages(family, teacher, init, weights):
    pair = {"flux.1": (5, 6), "sd3.5": (3, 4)}[family]
    plan = PruningPlan.from_intervals(FAMILIES[family][3], [pair], family=family)
    layers = get_adapter(teacher).blocks(teacher)
    student = get_adapter(teacher).blocks(pydit.prune(teacher, plan, init=init))[pair[0]]
    for name, tensor in student.state_dict().items():
        mean = sum(w * layers[k].state_dict()[name].double() for w, k in zip(weights, pair, strict=True)) / sum(weights)
        assert torch.allclose(tensor.double(), mean, atol=1e-7)


def test_probe_lowers_the_interval_error(family, teacher, plan):
    made = FAMILIES[family][1]
    first = pydit.prune(teacher, plan)
    probe = pydit.prune(teacher, plan, init="probe", batches=[made(seed) for seed in range(20)])
    adapter, batch = get_adapter(teacher), made(99)
    capture = adapter.capture(teacher, batch, range(plan.num_layers + 1))
    block, start, end = plan.replaced[0]
    errors = []
    for student in (first, probe):
        with torch.no_grad():
            image = adapter.call_block(adapter.blocks(student)[block], *capture.states[start], capture.kwargs)[0]
        errors.append(float((image - capture.states[end + 1][0]).square().sum()))
    assert errors[1] < errors[0]


def test_plugging(teacher, plan, batch):
    student = pydit.prune(teacher, plan)
    student.set_active([])
    assert torch.equal(run(student, batch), run(teacher, batch))
    for active in plan.intervals:
        student.set_active([active])
        layers = [k for k in range(plan.num_layers) if not active[0] < k <= active[1]]
        assert torch.equal(run(student, batch), by_hand(teacher, layers, batch)) and student.active == [active]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_files(tmp_path, family, teacher, plan, batch, with_teacher):
    student = pydit.prune(teacher, plan)
    student.save_pretrained(tmp_path, with_teacher=with_teacher)
    loaded = FAMILIES[family][2].from_pretrained(tmp_path)
    assert torch.equal(run(loaded, batch), run(student, batch)) and loaded.plan == plan
    if with_teacher:
        loaded.set_active([])
        assert torch.equal(run(loaded, batch), run(teacher, batch))


def test_stock_diffusers_loads_it(tmp_path, teacher, plan, batch):
    student = pydit.prune(teacher, plan)
    student.to_stock().save_pretrained(tmp_path)
    loaded = type(teacher).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, batch), run(student, batch))
    blocks = get_adapter(student).blocks(student)
    assert len(get_adapter(loaded).blocks(loaded)) == len(blocks) == plan.num_student_layers


def test_an_affine_block(family, teacher, batch):
    depth = FAMILIES[family][3]
    plan = PruningPlan(family, depth, [(1, 2)], affine=[1, depth - 1])
    student = pydit.prune(teacher, plan, batches=[FAMILIES[family][1](seed) for seed in range(8)])
    assert plan.num_parameters(dict(teacher.config)) == sum(p.numel() for p in student.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        identity = pydit.prune(teacher, plan)
    errors = [float((run(model, batch) - run(teacher, batch)).square().mean()) for model in (student, identity)]
    assert errors[0] < errors[1]
    student.set_active([])
    assert torch.equal(run(student, batch), run(teacher, batch))


def test_an_interval_that_ends_the_model(family, teacher, batch):
    """The last block of SD3.5 has no text output, so the block that stands for it loses its own."""
    depth = FAMILIES[family][3]
    plan = PruningPlan.from_intervals(depth, [(depth - 3, depth - 1)], family=family)
    for init in ("first", "average"):
        student = pydit.prune(teacher, plan, init=init)
        assert plan.num_parameters(dict(teacher.config)) == sum(p.numel() for p in student.parameters())
        if init == "first":
            expected = by_hand(teacher, range(depth - 2), batch)
            assert torch.allclose(run(student, batch), expected, rtol=1e-5, atol=1e-6)
    student.set_active([])
    assert torch.equal(run(student, batch), run(teacher, batch))


def test_no_interval_straddles():
    with pytest.raises(UserError, match=r"one side of layer 19, where the dual blocks end, got \[18, 19\]"):
        PruningPlan.from_intervals(57, [(18, 19)], family="flux.1")
    plan = PruningPlan.from_intervals(9, [(3, 4)], family="flux.1")  # where they end, only the model knows
    with pytest.raises(UserError, match=r"one side of layer 4, where the dual blocks end, got \[3, 4\]"):
        pydit.prune(flux(), plan)
    with pytest.raises(UserError, match="one side of layer 4"):
        plan.num_parameters(dict(flux().config))


def test_a_plan_of_another_family(family, teacher, plan, tmp_path):
    with pytest.raises(UserError, match=f"plan: expected a plan for {family}, got one for qwen-image"):
        pydit.prune(teacher, PruningPlan("qwen-image", FAMILIES[family][3]))
    pydit.prune(teacher, plan).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace(f'"family": "{family}"', '"family": "qwen-image"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError, match=f"config: expected a plan for {family}, got one for qwen-image"):
        FAMILIES[family][2].from_pretrained(tmp_path)


def test_collect_detect_distil(teacher, family):
    """The whole way from activations to a student that has learnt something."""
    made = FAMILIES[family][1]
    stats = pydit.analysis.collect(teacher, [made(seed) for seed in range(6)])
    found = pydit.analysis.detect(stats, method="bi", target=0.3)
    assert found.family == family and found.removed >= 2
    student = pydit.prune(teacher, found)
    config = pydit.distill.DistillConfig(layers_steps=8, output_steps=8, layers_lr=3e-3, output_lr=3e-3)
    batch = made(99)
    before = float((run(student, batch) - run(teacher, batch)).square().mean())
    pydit.distill.distill(teacher, student, lambda start: (made(start + n) for n in range(10_000)), config)
    assert float((run(student, batch) - run(teacher, batch)).square().mean()) < before
