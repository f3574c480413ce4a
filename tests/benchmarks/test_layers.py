"""`pydit bench layers` and `pydit bench model` at a size that says nothing about speed."""

import json
import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import pydit
from benchmarks import blocks, compare, layers, model, parts
from benchmarks.cases import whole_block
from benchmarks.runner import run_case
from pydit.families import FAMILIES
from pydit.plan import PRESETS


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Options of a plan with blocks of several kinds; no peers, which would be compiled, and no cold inputs."""
    monkeypatch.setitem(layers.timing.ROTATED_BYTES, "cpu", 1)
    monkeypatch.setattr(layers.timing, "measure_limits", lambda *_: {"copy_gb_s": 10.0, "gemm_tflop_s": 0.1})
    monkeypatch.setattr(layers, "run_case", partial(run_case, peers=set()))
    plan = pydit.PruningPlan("qwen-image", 6, [(0, 1)], text_linear=[(2, 4)], linear_ffn=[5])
    plan.save(tmp_path / "plan.json")
    return ["--config", "tiny", "--plan", str(tmp_path / "plan.json"), "--size", "32", "--text", "6", "--rounds", "3",
            "--json", str(tmp_path / "out.json")]


def test_layers_are_counted_by_kind_and_timed(command, tmp_path, capsys):
    assert layers.main(command) == 0
    rows = {row["kind"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert sum(row["count"] for row in rows.values()) == 5 and rows["dense"]["count"] >= 1 and len(rows) >= 3
    out = capsys.readouterr().out
    for kind, row in rows.items():
        assert row["providers"]["pydit"]["us"] > 0 and row["floor_us"] > 0 and kind in out
    assert "% ideal" in out and "wrong" not in out
    for row in rows.values():
        ideal, before, after = (row["parts"][name] for name in ("ideal", "before", "after"))
        assert sum(ideal.values()) == pytest.approx(row["ideal_us"]) and row["ideal_us"] >= row["floor_us"]
        for found in (before, after):
            assert set(found) == set(parts.PARTS) and all(value > 0 for value in found.values())
    assert re.search(r"us by part +ideal +before +after\n", out) and re.search(r"dense +attention +[\d.]+ ", out)


def test_every_kind_of_block_is_timed_as_what_it_is():
    """Each block of every preset and of plans beyond them costs what the block of its kind computes."""
    for name, plan in PLANS:
        config = blocks.config_of(name, plan)
        specs, counts = layers.kinds_of(plan.family, config, plan)
        assert sum(counts.values()) == plan.num_student_layers
        for spec in [*plan.blocks, *pydit.PruningPlan(plan.family, plan.num_layers).blocks]:
            of_kind = specs[blocks.kind_of(plan.family, config, spec)]
            flops = [FAMILIES[plan.family].block_flops(config, s, 6889, 512) for s in (spec, of_kind)]
            assert flops[0] == flops[1], (name, spec, of_kind)
            weights = [FAMILIES[plan.family].block_parameters(config, s) for s in (spec, of_kind)]
            assert weights[0] == weights[1] or (spec.dead_query and spec.text == "linear" and weights[1] < weights[0])
    qwen = [layers.kinds_of("qwen-image", blocks.config_of(name, plan), plan)[0] for name, plan in PLANS
            if plan.family == "qwen-image"]
    named = whole_block.KINDS | whole_block.MORE_KINDS
    found = {kind: spec for specs in qwen for kind, spec in specs.items()}
    assert len(found) >= 7 and all(
        replace(named[kind], dead_query=False) == replace(spec, source=(0,)) for kind, spec in found.items())


PLANS = [*(({"qwen-image": "qwen-image", "flux.1": "flux.1-dev", "sd3.5": "sd3.5-large"}[fields[0]],
            pydit.PruningPlan.preset(name)) for name, fields in PRESETS.items()),
         ("qwen-image", pydit.PruningPlan("qwen-image", 60, [(0, 1)], text_linear=[(2, 9)], linear_ffn=[3, 9, 20], linear_text_ffn=[21])),
         ("flux.1-dev", pydit.PruningPlan("flux.1", 57, [(3, 4)], text_linear=[(6, 8), (30, 33)], linear_ffn=[5, 7, 31, 40],
                                           linear_text_ffn=[6])),
         ("sd3.5-medium", pydit.PruningPlan("sd3.5", 24, [(3, 4)], text_linear=[(15, 17)], linear_ffn=[5, 16], linear_text_ffn=[9, 20])),
         ("sd3.5-medium", pydit.PruningPlan("sd3.5", 24))]
OF_PLANS = {(name, kind): spec for name, plan in PLANS for kind, spec in layers.kinds_of(
    plan.family, blocks.config_of(name, plan), plan)[0].items()}
OF_PLANS |= {("qwen-image", kind): spec for kind, spec in (whole_block.KINDS | whole_block.MORE_KINDS).items()}


@pytest.mark.parametrize(("name", "kind"), OF_PLANS)
def test_parts_of_a_block_add_up_to_it(name, kind):
    """FLOPs of products and attention are the family's; the floor of the ops is none below that of the whole."""
    family, config, spec = blocks.CONFIGS[name].family, blocks.CONFIGS[name].config, OF_PLANS[name, kind]
    ops = parts.works(config, spec, 2, 6889, 512, 2, family)
    work = blocks.block_work(family, config, spec, 2, 6889, 512, 2)
    assert sum(work.flops for part, work in ops if part != "rest") == work.flops
    if not kind.endswith("_last"):
        assert work.flops == 2 * FAMILIES[family].block_flops(config, spec, 6889, 512)
    ideal = parts.floors(ops, {"copy_gb_s": 4300.0, "gemm_tflop_s": 790.0})
    assert (ideal["attention"] == ideal["rest"] == 0) == (kind == "affine") and ideal["products"] > 0
    assert parts.floors(ops, {"copy_gb_s": 4300.0}) is None
    assert sum(ideal.values()) >= max(work.bytes / 4300e3, work.flops / 790e6) * 0.999


def test_the_published_families_have_their_own_kinds():
    kinds = {name: {kind for of, kind in OF_PLANS if of == name} for name in ("flux.1-dev", "sd3.5-large", "sd3.5-medium")}
    assert {"dense", "single_dense", "single_linear_ffn", "single_text_linear"} <= kinds["flux.1-dev"]
    assert kinds["sd3.5-large"] == {"dense", "dense_last"}
    assert {"dense", "dense_attn2", "dense_last", "linear_ffn_attn2", "text_ffn", "text_ffn_attn2"} <= kinds["sd3.5-medium"]


@pytest.mark.parametrize(("config", "fields"), [
    ("tiny-flux.1", {"num_layers": 6, "intervals": [(0, 1)], "text_linear": [(4, 5)], "linear_ffn": [3]}),
    ("tiny-sd3.5", {"num_layers": 6, "intervals": [(2, 3)], "linear_ffn": [1]})])
def test_blocks_and_models_of_every_family(config, fields, command, tmp_path, capsys):
    """Every kind computes what its float64 block does (the runner refuses figures else); whole models run."""
    plan = pydit.PruningPlan(blocks.CONFIGS[config].family, **fields)
    plan.save(tmp_path / "plan.json")
    command[1] = config
    assert layers.main(command) == 0
    rows = {row["kind"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert "wrong" not in capsys.readouterr().out and sum(row["count"] for row in rows.values()) == plan.num_student_layers
    assert set(rows) >= ({"dense", "single_dense", "single_linear_ffn", "single_text_end"} if "flux" in config else
                         {"dense", "dense_attn2", "linear_ffn_attn2", "dense_last"}), rows.keys()
    assert all(row["ideal_us"] > 0 and "details_failed" not in row for row in rows.values())
    (tmp_path / "out.json").unlink()  # of layers, which a file of models does not replace
    capsys.readouterr()
    assert model.main([*command, "--variants", "eager,accelerate,accelerate + table"]) == 0
    assert "kept in float32" not in capsys.readouterr().err  # diffusers' warning of every model
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 6 and all(row["ms"] > 0 for row in rows), rows
    assert all(row["off"] == 0 if row["variant"] == "eager" else 0 < row["off"] < 0.02 for row in rows), rows
    dense = blocks.config_of(config, plan)
    assert [row["parameters"] for row in rows[:2]] == [pydit.PruningPlan(plan.family, plan.num_layers).num_parameters(dense),
                                                       plan.num_parameters(dense)]


@pytest.mark.parametrize(("config", "name"), [
    ("qwen-image", "ppcl-qwen-image-10b"), ("flux.1-dev", "ppcl-flux.1-8b"), ("sd3.5-large", "ppcl-sd3.5-large-5b"),
    ("sd3.5-medium", "dense")])
def test_published_models_have_as_many_parameters_as_their_plans_say(config, name):
    """Made without memory for their weights."""
    plan = layers.plan_of(name, config)
    for shape, counted in (("dense", layers.plan_of("dense", config)), ("pruned", plan)):
        found = model._make(config, plan, shape, "meta")
        assert sum(p.numel() for p in found.parameters()) == counted.num_parameters(blocks.config_of(config, plan))


def test_a_dense_model_alone(command, tmp_path):
    command[1:4] = ["tiny-sd3.5", "--plan", "dense"]
    assert layers.main(command) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["kind"]: row["count"] for row in rows} == {"dense_attn2": 2, "dense": 3, "dense_last": 1}
    (tmp_path / "out.json").unlink()
    assert model.main([*command, "--variants", "eager"]) == 0
    assert [row["model"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["dense"]


def test_kernels_are_told_apart_by_name():
    names = {"attention": ["void pydit::joint_attention_sm90_kernel<128>(P)", "pytorch_flash::flash_fwd_kernel<T>",
                           "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "fmha_cutlassF_bf16_aligned",
                           "aten::scaled_dot_product_attention", "pydit::joint_attention"],
             "products": ["nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "void cutlass::Kernel2<gemm_bf16>(P)",
                          "void pydit::grouped_linear_sm90_kernel<E>(P)", "cublasLt::splitKreduce_kernel<32>",
                          "gemvNSP_kernel", "aten::addmm", "pydit::joint_linear_gelu", "pydit::joint_qkv"],
             None: ["void pydit::modulate_kernel<T>(P)", "void pydit::qk_norm_rope_kernel<T>(P)", "Memcpy DtoD",
                    "void at::native::vectorized_elementwise_kernel<4, F>", "aten::mul", "pydit::ada_layer_norm"]}
    assert {name: parts.part_of(name) for part in names.values() for name in part} == {
        name: part for part, of in names.items() for name in of}
    span = lambda us: SimpleNamespace(elapsed_us=lambda: us)  # noqa: E731
    event = lambda name, us, **more: SimpleNamespace(**{  # noqa: E731
        "name": name, "time_range": span(us), "device_type": DeviceType.CUDA, "is_user_annotation": False, **more})
    events = [event("nvjet_sm90", 6.0), event("flash_fwd_kernel", 4.0), event("Memset", 1.0), event("nvjet_sm90", 2.0),
              event("aten::mm", 50.0, device_type=DeviceType.CPU), event("gemm range", 9.0, is_user_annotation=True)]
    assert parts.summed(events, "cuda", 2) == {"products": 4.0, "attention": 2.0, "rest": 0.5}
    assert parts.summed(events[4:], "cuda", 2) is None


def test_a_run_out_of_time_leaves_what_it_has(command, tmp_path, monkeypatch):
    """The file is written after every kind; a kind's details that raise cost no time of it."""
    def raises(*_):
        raise RuntimeError("no sensors")

    clock = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr(layers, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(layers.parts, "measured", raises)
    assert layers.main([*command, "--seconds", "50"]) == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert [row["kind"] for row in data["rows"]] == ["dense"] and data["not_run"] and not data["complete"]
    assert data["rows"][0]["details_failed"] == "no sensors" and data["rows"][0]["providers"]["pydit"]["us"] > 0
    assert data["format"] != compare.FORMAT  # which the tables of README take


def test_models_side_by_side(command, tmp_path, capsys):
    assert model.main([*command, "--variants", "eager,accelerate,accelerate + table"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["model"], row["variant"]) for row in rows] == [
        (shape, variant) for variant in ("eager", "accelerate", "accelerate + table") for shape in ("dense", "pruned")]
    assert not any("failed" in row for row in rows) and all(row["ms"] > 0 for row in rows), rows
    sizes = {(row["model"], row["variant"]): row["parameters"] for row in rows}
    assert sizes["pruned", "eager"] < sizes["dense", "eager"] and "ratio" in capsys.readouterr().out


def test_a_pruned_model_is_timed_without_its_teacher(command):
    """And costs what the plan says."""
    plan = layers.plan_of(command[3])
    student, dense = (model._make("tiny", plan, shape, "cpu") for shape in ("pruned", "dense"))
    assert type(student).__name__ == "PrunedQwenImageTransformer2DModel" and not student._lists[0].teacher.layers
    assert sum(p.numel() for p in student.parameters()) == plan.num_parameters(dense.config)
    thinned = [(block.spec, spec) for block, spec in zip(student.own_blocks, plan.blocks, strict=True) if not spec.is_stock]
    assert thinned and all(found == wanted for found, wanted in thinned)


@pytest.mark.parametrize("output", [float("nan"), 0.0])
def test_a_model_that_computes_something_else_gets_no_time(command, tmp_path, monkeypatch, capsys, output):
    def broken(made, **_):
        return lambda **batch: (torch.full_like(made(**batch)[0], output),)

    monkeypatch.setattr(model.pydit, "accelerate", broken)
    assert model.main([*command, "--variants", "eager,accelerate"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert ["ms" in row for row in rows] == [True, True, False, False]
    assert "expected the output of the eager model" in rows[3]["failed"] and "failed: AssertionError" in capsys.readouterr().out


def test_models_leave_what_they_have_when_time_is_over(command, tmp_path, monkeypatch):
    """A variant that cannot be built stops no other, and what follows the last one in time is named."""
    clock, make, made = iter([0.0, 0.0, 0.0, 100.0]), model._make, []

    def fails_first(*args):
        made.append(args)
        if len(made) == 1:
            raise RuntimeError("out of memory")
        return make(*args)

    monkeypatch.setattr(model, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter))
    monkeypatch.setattr(model, "_make", fails_first)
    assert model.main([*command, "--variants", "eager,accelerate", "--seconds", "50"]) == 0
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["rows"][0]["failed"] == "RuntimeError: out of memory" and data["rows"][1]["ms"] > 0
    assert data["not_run"] == ["dense, accelerate", "pruned, accelerate"] and not data["complete"]
    assert data["rows"][1]["ratio"] is None and data["format"] not in (compare.FORMAT, layers.FORMAT)


@pytest.mark.parametrize("main", [layers, model])
def test_an_earlier_runs_figures_stay_where_time_is_over(main, command, tmp_path, capsys):
    earlier = json.dumps({"format": main.FORMAT, "rows": ["of an earlier run"]})
    (tmp_path / "out.json").write_text(earlier)
    assert main.main([*command, "--seconds", "1e-9"]) == 0
    assert (tmp_path / "out.json").read_text() == earlier and (tmp_path / "out.json.partial").exists()
    assert "out.json is as it was" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "words"), [
    (["--size", "33"], "size: expected a multiple of 16, got 33"), (["--plan", "no-such"], "no-such"),
    (["--config", "flux.1-dev"], "plan: expected one of flux.1 for flux.1-dev, got one of qwen-image"),
    (["--config", "qwen-image"], "plan: expected one of 60 layers for qwen-image, got one of 6")])
@pytest.mark.parametrize("main", [layers.main, model.main])
def test_bad_options(main, change, words, command, capsys):
    assert main([*command, *change]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "samples"), [("fp32", 1), ("bf16", 2)])
def test_narrow_models_of_every_family_are_timed_in_turn(tmp_path, monkeypatch, capsys, dtype, samples):
    monkeypatch.setattr(model, "NARROW", ((64, 4),))
    assert model.main(["--narrow", "--rounds", "3", "--json", str(tmp_path / "out.json"), "--dtype", dtype,
                       "--samples", str(samples)]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 5 and all(row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] for row in rows), rows
    assert all((row["dtype"], row["samples"]) == (dtype, samples) for row in rows)
    assert "sd3.5" in capsys.readouterr().out
    assert model.main(["--narrow", "--rounds", "2"]) == model.main([]) == 2


def test_unknown_variants(command, capsys):
    assert model.main([*command, "--variants", "eager,fast"]) == 2
    assert "variants: expected names out of" in capsys.readouterr().err
