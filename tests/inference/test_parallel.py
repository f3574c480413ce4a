"""Two processes share a model's work by diffusers' context or tensor parallelism: the numbers of one, or a refusal."""

import itertools
import json
import os
from pathlib import Path

import diffusers
import pytest
import torch
import torch.distributed as dist

import pydit
from pydit.errors import UserError
from pydit.inference import hooked
from pydit.models import get_adapter
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests import processes
from tests.models import tiny

FLOAT64 = 1e-11  # sums of float64 in another order, through at most four blocks
FLOAT32 = 1e-6  # stock attention rotates in float32 whatever the model's dtype


def qwen_batch(**fields):
    """Eight text tokens of each sample, so that two processes have equal parts, with holes in the second's mask."""
    batch = {**tiny.batch(images=2, text=8), **fields}
    batch["encoder_hidden_states_mask"] = torch.tensor([[1] * 8, [0, 1, 1, 0, 0, 0, 1, 0]])
    return batch


def flux_batch():
    batch = tiny.flux_batch()
    return {**batch, "encoder_hidden_states": batch["encoder_hidden_states"][:, :6], "txt_ids": torch.zeros(6, 3)}


def sd3_batch():
    batch = tiny.sd3_batch()
    return {**batch, "encoder_hidden_states": batch["encoder_hidden_states"][:, :6]}


def pruned():
    plan = PruningPlan("qwen-image", 4, text_linear=[(1, 2)], linear_ffn=[3], linear_text_ffn=[0]).lean()
    return pydit.prune(tiny.transformer(4), plan)


def sd3_plan():
    """diffusers has none for SD3."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    part = ContextParallelInput(split_dim=1, expected_dims=3)
    return {"transformer_blocks.0": {"hidden_states": part, "encoder_hidden_states": part},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}


MODELS = {
    "qwen": (lambda: tiny.transformer(2), qwen_batch),
    "qwen, text mask None": (lambda: tiny.transformer(2),
                             lambda: {**qwen_batch(), "encoder_hidden_states_mask": None}),
    "qwen, two rows": (lambda: tiny.transformer(2, zero_cond_t=True),
                       lambda: qwen_batch(img_shapes=[[(1, 2, 2), (1, 3, 4)]] * 2)),
    "qwen, pruned": (pruned, qwen_batch),
    "flux": (tiny.flux, flux_batch),
    "sd3": (tiny.sd3, sd3_batch),
}
WAYS = {"ulysses": {"ulysses_degree": 2}, "ring": {"ring_degree": 2}}
ORDERS = ("before", "after")  # enable_parallelism, of pydit.accelerate
TENSOR_PARALLEL = hasattr(diffusers, "TensorParallelConfig")


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def parallel(model, family, **degrees):
    from diffusers import ContextParallelConfig

    plan = {"cp_plan": sd3_plan()} if family == "sd3" else {}
    model.enable_parallelism(config=ContextParallelConfig(**degrees), **plan)
    return model


def accelerated(family, order, make=None, exact=False, **degrees):
    model = (make or MODELS[family][0])().double()
    if order == "before":
        return pydit.accelerate(parallel(model, family, **degrees), exact=exact)
    return parallel(pydit.accelerate(model, exact=exact), family, **degrees)


def message(call):
    try:
        call()
    except (UserError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def four_processes(out):
    """Two exchange heads, and both pairs go round."""
    model = accelerated("qwen", "before", ulysses_degree=2, ring_degree=2)
    found = run(model, tiny.cast(qwen_batch(), torch.float64))
    if torch.distributed.get_rank() == 0:
        rows = pydit.report(model)["model"]["parallel"]
        torch.save({"found": found, "reason": rows[0]["reason"]}, f"{out}/four.pt")


def life(rank, out):
    """First of two processes, then of four, for both ways of context parallelism together."""
    os.environ.update(GLOO_SOCKET_IFNAME="lo", PYDIT_BACKEND="auto")
    # diffusers asks for the number of accelerators, and which: a CUDA build of torch names one without a driver too.
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_accelerator = lambda *_: None
    for world, program in ((2, two_processes), (4, four_processes)):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{out}/store-{world}", rank=rank, world_size=world)
            program(out)
            dist.destroy_process_group()


def two_processes(out):
    """In each of two processes: every case, kept by the first."""
    outputs, words = {}, {}
    for family, way, order in itertools.product(MODELS, WAYS, ORDERS):
        name = f"{family}/{way}/{order}"
        model = accelerated(family, order, **WAYS[way])
        batch = tiny.cast(MODELS[family][1](), torch.float64)
        outputs[name] = run(model, batch)
        words[name] = pydit.report(model)["model"]
        if family in ("qwen", "flux") and way == "ulysses":
            outputs[f"{name}/restored"] = run(pydit.restore(model), batch)
    outputs |= left_to_stock(words)
    outputs |= gradients()
    outputs["simulated"] = simulated_ring()
    if TENSOR_PARALLEL:
        outputs |= tensor_parallel(words)
    refusals(words)
    if torch.distributed.get_rank() == 0:
        torch.save(outputs, f"{out}/outputs.pt")
        Path(out, "words.json").write_text(json.dumps(words))


def left_to_stock(words):
    """What diffusers' own attention runs, over both processes."""
    batch, found = tiny.cast(qwen_batch(), torch.float64), {}
    for name, make in {
        "chosen before": lambda: pydit.accelerate(chosen(parallel(tiny.transformer(2).double(), "qwen", ulysses_degree=2))),
        "chosen after": lambda: chosen(accelerated("qwen", "after", ulysses_degree=2)),
        "anything": lambda: accelerated("qwen", "after", ulysses_degree=2, ulysses_anything=True),
        "exact before": lambda: accelerated("qwen", "before", exact=True, ulysses_degree=2),
        "exact after": lambda: accelerated("qwen", "after", exact=True, ulysses_degree=2),
    }.items():
        model = make()
        found[name] = run(model, batch)
        words[name] = pydit.report(model)["model"]
    found["exact, restored"] = run(pydit.restore(model), batch)
    return found


def chosen(model):
    model.set_attention_backend("native")
    return model


def gradients():
    """Of all weights, from a loss of the whole output in every process: parts add up to those of one process."""
    found = {}
    for way in WAYS:
        model = accelerated("qwen", "before", **WAYS[way]).train()
        model(**tiny.cast(qwen_batch(), torch.float64), return_dict=False)[0].square().sum().backward()
        for name in GRADIENTS:
            grad = model.get_parameter(name).grad
            torch.distributed.all_reduce(grad)
            found[f"gradient/{way}/{name}"] = grad
    return found


GRADIENTS = [f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k", "add_v_proj", "norm_added_k")]


def simulated_ring():
    from pydit import backend

    os.environ["PYDIT_BACKEND"] = "sim"
    backend.configure_sim()
    model = parallel(pydit.accelerate(tiny.transformer(2).bfloat16()), "qwen", ring_degree=2)
    found = run(model, tiny.cast(qwen_batch(), torch.bfloat16))
    assert pydit.report()["joint_attention"]["path"] == "sim"
    os.environ["PYDIT_BACKEND"] = "auto"
    return found


def tensor_parallel(words):
    """diffusers takes GPUs alone; nothing but that check stands in the way of two CPUs."""
    from diffusers import TensorParallelConfig
    from diffusers.hooks import tensor_parallel

    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    found = {}
    for family, order in itertools.product(("qwen", "flux"), ORDERS):
        model, batch = MODELS[family][0]().double(), tiny.cast(MODELS[family][1](), torch.float64)
        for step in ORDERS if order == "before" else ORDERS[::-1]:
            if step == "before":
                model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
            else:
                pydit.accelerate(model)
        found[f"tensor/{family}/{order}"] = run(model, batch)
        words[f"tensor/{family}/{order}"] = pydit.report(model)["model"]
        found[f"tensor/{family}/{order}/restored"] = run(pydit.restore(model), batch)
    return found


def refusals(words):
    batch = tiny.cast(sd3_batch(), torch.float64)
    words["sd3 exact"] = message(lambda: run(accelerated("sd3", "after", exact=True, ulysses_degree=2), batch))
    model = accelerated("sd3", "after", ulysses_degree=2, ulysses_anything=True)
    words["sd3 anything"] = message(lambda: run(model, batch))
    words["sd3 chosen"] = message(lambda: run(chosen(accelerated("sd3", "before", ring_degree=2)), batch))
    words["graphs"] = message(lambda: pydit.accelerate(parallel(tiny.transformer(1), "qwen", ring_degree=2),
                                                       cuda_graphs=True))
    one_head = lambda: tiny.transformer(1, attention_head_dim=64, num_attention_heads=1, axes_dims_rope=(16, 24, 24))  # noqa: E731
    model = accelerated("qwen", "after", one_head, ulysses_degree=2)
    words["heads"] = message(lambda: run(model, tiny.cast(qwen_batch(), torch.float64)))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(outputs, words) of the first of two processes, and what the first of four found."""
    out = tmp_path_factory.mktemp("two")
    processes.together(life, 4, str(out))
    return torch.load(out / "outputs.pt"), json.loads((out / "words.json").read_text()), torch.load(out / "four.pt")


def stock(family):
    make, batch = MODELS[family]
    return run(make().double(), tiny.cast(batch(), torch.float64))


def close(found, expected, relative=FLOAT64):
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore:.*start as the identity")
def test_context_parallelism_equals_one_process(two, family):
    """Whether diffusers was told first or this package; on the fused attention, which the report says."""
    make, batch = MODELS[family]
    expected, alone = stock(family), run(pydit.accelerate(make().double()), tiny.cast(batch(), torch.float64))
    for way, order in itertools.product(WAYS, ORDERS):
        name = f"{family}/{way}/{order}"
        close(two[0][name], alone)
        close(two[0][name], expected, FLOAT32)
        rows = two[1][name]["parallel"]
        assert [row["path"] for row in rows] == ["pydit"], rows
        assert rows[0]["reason"] == f"context parallelism, {way.replace('u', 'U', 1)} over 2 processes"
        assert rows[0]["count"] == sum(row["count"] for row in two[1][name]["attention"])
        if f"{name}/restored" in two[0]:
            close(two[0][f"{name}/restored"], expected)


def test_ulysses_and_ring_together_equal_one_process(two):
    close(two[2]["found"], run(pydit.accelerate(tiny.transformer(2).double()), tiny.cast(qwen_batch(), torch.float64)))
    assert two[2]["reason"] == "context parallelism, Ulysses over 2 processes and ring over 2 processes"


@pytest.mark.parametrize("name", ["chosen before", "chosen after", "anything", "exact before", "exact after"])
def test_what_diffusers_attention_runs_is_whole_too(two, name):
    close(two[0][name], stock("qwen"))
    assert [row["path"] for row in two[1][name]["parallel"]] == ["stock"]
    if name == "chosen after":
        assert any(row["reason"] == "set_attention_backend chose native after pydit.accelerate"
                   for row in two[1][name]["attention"])
    if name == "anything":
        assert any("ulysses_anything: parts of unequal length" in row["reason"] for row in two[1][name]["attention"])
        close(two[0]["exact, restored"], stock("qwen"))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_add_up(two, way):
    model = tiny.transformer(2).double().train()
    model(**tiny.cast(qwen_batch(), torch.float64), return_dict=False)[0].square().sum().backward()
    for name in GRADIENTS:
        close(two[0][f"gradient/{way}/{name}"], model.get_parameter(name).grad, FLOAT32)


def test_ring_of_the_kernel_within_the_tolerance_policy(two):
    """Each process's kernel over each half of the keys, merged."""
    plain = run(tiny.transformer(2).bfloat16(), tiny.cast(qwen_batch(), torch.bfloat16))
    assert_accurate(two[0]["simulated"], stock("qwen"), plain)


@pytest.mark.skipif(not TENSOR_PARALLEL, reason="this version of diffusers has no tensor parallelism")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_tensor_parallelism_equals_one_process(two, family, order):
    name = f"tensor/{family}/{order}"
    close(two[0][name], stock(family), FLOAT32)
    close(two[0][f"{name}/restored"], stock(family))
    assert [row["path"] for row in two[1][name]["parallel"]] == ["pydit"]
    assert two[1][name]["parallel"][0]["reason"] == "tensor parallelism, each process its heads"


def test_attention_over_a_part_of_the_tokens_is_refused(two):
    words = two[1]
    assert "UserError: enable_parallelism: expected attention processors that take part" in words["sd3 exact"]
    assert "ulysses_anything: parts of unequal length; expected that the stock processor" in words["sd3 anything"]
    assert "set_attention_backend chose native; expected that the stock processor" in words["sd3 chosen"]
    assert "cuda_graphs: expected a model that one process runs, got one with context parallelism" in words["graphs"]
    assert words["heads"] == "ValueError: ulysses_degree: expected a divisor of the block's 1 heads, got 2"


def test_a_mask_that_was_not_split_is_refused():
    from types import SimpleNamespace

    from pydit.models import context_parallel

    config = SimpleNamespace(ring_degree=2, ulysses_degree=1)
    x = torch.zeros(1, 4, 2, 32)
    with pytest.raises(ValueError, match="encoder_hidden_states_mask: .* 4 text tokens, got 8: the model's cp_plan"):
        context_parallel.joint_attention(x, x, x, x, x, x, torch.ones(1, 8, dtype=torch.bool), config)


@pytest.mark.parametrize("make", [tiny.sd3, tiny.flux, lambda: tiny.transformer(1)])
def test_a_backend_chosen_after_accelerate_runs_the_stock_processor(make):
    """In every family, SD3's included, whose stock processor itself knows of no choice."""
    model = make()
    batch = {tiny.sd3: sd3_batch, tiny.flux: flux_batch}.get(make, qwen_batch)()
    pydit.accelerate(model)
    calls = []
    for module in hooked.modules_of(model):
        if (processor := getattr(module, "processor", None)) is not None:
            kind = type(processor.stock)
            processor.stock = type(kind.__name__, (kind,), {
                "__call__": lambda self, *args, kind=kind, **options: (
                    calls.append(self._attention_backend) or kind.__call__(self, *args, **options))})()
            processor._attention_backend = "native"
    fast = run(model, batch)
    assert calls and set(calls) == {"native"}
    assert any(row["path"] == "stock" and "chose native after" in row["reason"]
               for row in pydit.report(model)["model"]["attention"])
    tiny.assert_as_stock(fast, make, batch)


def trains_under_fsdp2(rank, folder):
    """The root shards everything, so that weights are gathered when accelerate looks at them before a forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for make, batch in ((lambda: tiny.transformer(2), tiny.batch()), (tiny.flux, tiny.flux_batch()),
                        (tiny.sd3, tiny.sd3_batch())):
        outputs = {}
        for order in ("stock", "accelerated first", "sharded first"):
            model = make()
            if order == "accelerated first":
                pydit.accelerate(model)
            fully_shard(model, mesh=mesh, reshard_after_forward=False)
            if order == "sharded first":
                pydit.accelerate(model)
            optimizer, outputs[order] = torch.optim.SGD(model.parameters(), lr=0.3), []
            for _ in range(3):
                output = model(**batch, return_dict=False)[0]
                output.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                outputs[order].append(output.detach())
            if order != "stock":
                assert {row["path"] for row in pydit.report(model)["model"]["blocks"]} == {"pydit"}
        for order in ("accelerated first", "sharded first"):
            torch.testing.assert_close(outputs[order], outputs["stock"], rtol=1e-4, atol=1e-5)
        model = pydit.accelerate(make())
        blocks = get_adapter(model).blocks(model)
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
        model(**batch)
        pydit.restore(model)
        for block, stock in zip(blocks, get_adapter(model).blocks(make()), strict=True):
            assert type(block).__bases__ == (FSDPModule, type(stock))
        assert torch.equal(model(**batch)[0], make()(**batch)[0])
    dist.destroy_process_group()


def test_training_under_fsdp2(tmp_path):
    processes.together(trains_under_fsdp2, 1, str(tmp_path))
