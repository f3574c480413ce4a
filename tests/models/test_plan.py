"""Plans: validation, files, published sizes, the table."""

import json

import numpy as np
import pytest
import torch

import pydit
from pydit.errors import FormatError, UserError
from pydit.plan import PruningPlan
from tests.models import tiny


@pytest.mark.parametrize("name, layers, parameters", [
    ("ppcl-qwen-image-14b", 42, 14_313_437_760),
    ("ppcl-qwen-image-12b", 35, 11_934_618_688),
    ("ppcl-qwen-image-11b", 35, 10_981_226_560),
    ("ppcl-qwen-image-10b", 35, 10_603_653_184),
    ("amber-qwen-image-10b", 30, 10_235_462_208),
    ("amber-qwen-image-6b", 30, 6_837_149_248),
])
def test_presets_have_the_published_size(name, layers, parameters):
    plan = PruningPlan.preset(name)
    assert (plan.num_layers, plan.num_student_layers, plan.num_parameters()) == (60, layers, parameters)


def test_unknown_preset():
    with pytest.raises(UserError, match="preset: expected one of ppcl-qwen-image-14b, ppcl-qwen-image-12b, .*, got 'x'"):
        PruningPlan.preset("x")


def test_teacher_size():
    assert PruningPlan("qwen-image", 60).num_parameters() == 20_430_401_088


def test_flops_are_those_of_a_block_counted_by_torch():
    """FlopCounterMode counts linears and attention; tokens as in a batch of one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = tiny.transformer(3), tiny.batch(images=1, masked=False)
    counts = []
    for blocks in (1, 2):
        model.transformer_blocks = model.transformer_blocks[:1] if blocks == 1 else torch.nn.ModuleList(
            [model.transformer_blocks[0]] * 2)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(**batch)
        counts.append(counter.get_total_flops())
    plan = PruningPlan.from_intervals(3, [(1, 2)])
    assert plan.num_flops(dict(tiny.transformer(3).config), image_tokens=16, text_tokens=7) == 2 * (counts[1] - counts[0])
    assert PruningPlan("qwen-image", 60).num_flops() // 60 // 10**9 == 2349  # GFLOP at 6889 + 512 tokens


@pytest.mark.parametrize("config", [{}, {"use_additional_t_cond": True, "out_channels": None}, {"zero_cond_t": True},
                                    {"num_attention_heads": 3}])
def test_parameter_count_equals_the_built_model(config):
    model = tiny.transformer(5, **config)
    plan = PruningPlan.from_intervals(5, [[1, 3]])
    assert PruningPlan("qwen-image", 5).num_parameters(model.config) == sum(p.numel() for p in model.parameters())
    student = pydit.prune(model, plan)
    assert plan.num_parameters(dict(model.config)) == sum(p.numel() for p in student.parameters())


def test_parameter_count_of_another_depth():
    with pytest.raises(UserError, match="expected num_layers 5 as in the plan, got 60"):
        PruningPlan("qwen-image", 5).num_parameters()


@pytest.mark.parametrize("intervals, message", [
    ([[1, 3], [3, 4]], r"got \[1, 3\] and \[3, 4\], which overlap"),
    ([[0, 9], [2, 3]], r"got \[0, 9\] and \[2, 3\], which overlap"),
    ([[8, 10]], r"expected layers 0 to 9, got \[8, 10\], which is out of range"),
    ([[-1, 2]], r"got \[-1, 2\], which is out of range"),
    ([[4, 2]], r"got the reversed interval \[4, 2\]"),
    ([[4, 4]], r"got \[4, 4\], which removes nothing"),
    ([[1, 2, 3]], r"pairs of integers, got \[1, 2, 3\]"),
    ([[1, 2.5]], r"pairs of integers, got \[1, 2.5\]"),
    ([[True, 2]], r"pairs of integers, got \[True, 2\]"),
    ([3, 4], "pairs of integers, got 3"),
    ("1-2", "pairs, got '1-2'"),
    (None, "pairs, got None"),
])
def test_bad_intervals(intervals, message):
    with pytest.raises(UserError, match=message):
        PruningPlan("qwen-image", 10, intervals)


WHOLE = {"numpy": np.int32, "short": np.uint8, "array": np.array, "tensor": torch.tensor}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_any_kind(kind):
    """As an int in everything that is computed or written: numpy's int32 overflows in a FLOP count."""
    whole = WHOLE[kind]
    given = PruningPlan("qwen-image", whole(10), [(whole(1), whole(2))], linear_ffn=[whole(3)], affine=[whole(4)],
                        single_stream=whole(7), text_linear=[[whole(5), whole(6)]])
    plain = PruningPlan("qwen-image", 10, [(1, 2)], linear_ffn=[3], affine=[4], single_stream=7, text_linear=[[5, 6]])
    assert given == plain and json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
    config, tokens = {"num_layers": 10}, whole(200)
    assert given.num_flops(config, image_tokens=tokens) == plain.num_flops(config, image_tokens=200)
    assert int(tokens) == 200  # not added to in place


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 2.0, torch.tensor(2.0), torch.tensor([2])])
def test_what_is_no_whole_number(value):
    for fields in ({"num_layers": value}, {"intervals": [(1, value)]}, {"linear_ffn": [value]}, {"single_stream": value}):
        with pytest.raises(UserError, match=f"^{next(iter(fields))}: expected "):
            PruningPlan(**{"family": "qwen-image", "num_layers": 10, **fields})
    with pytest.raises(UserError, match="text_tokens: expected an integer of 0 or more"):
        PruningPlan("qwen-image", 60).num_flops(text_tokens=value)


def test_bad_family_and_depth():
    with pytest.raises(UserError, match="family: expected one of qwen-image, flux.1, sd3.5, got 'flux'"):
        PruningPlan.from_intervals(10, [[1, 2]], family="flux")
    for depth in (0, "10", 3.0, True):
        with pytest.raises(UserError, match="num_layers: expected a positive integer"):
            PruningPlan("qwen-image", depth)


def test_order_does_not_matter():
    plan = PruningPlan.from_intervals(10, [(7, 9), [1, 2], torch.tensor([4, 5])])
    assert plan == PruningPlan.from_intervals(10, [[1, 2], [4, 5], [7, 9]], provenance={"by": "hand"})
    assert plan.intervals == ((1, 2), (4, 5), (7, 9))
    assert hash(plan) == hash(PruningPlan.from_intervals(10, plan.intervals))
    assert plan != PruningPlan.from_intervals(10, [[1, 2]]) and plan != PruningPlan.from_intervals(11, plan.intervals)


def test_source_and_replaced():
    plan = PruningPlan.from_intervals(8, [[1, 3], [4, 5]])
    assert plan.source == ((0,), (1, 2, 3), (4, 5), (6,), (7,))
    assert plan.replaced == ((1, 1, 3), (2, 4, 5))
    assert (plan.removed, plan.num_student_layers) == (3, 5)


def test_file_round_trip(tmp_path):
    plan = PruningPlan.from_intervals(60, [[3, 4], [9, 12]], provenance={"method": "hand", "scores": [0.5]})
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.provenance == plan.provenance
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (data["format"], data["version"], data["intervals"]) == ("pydit-plan", 1, [[3, 4], [9, 12]])


@pytest.mark.parametrize("change, message", [
    (lambda d: d.update(format="other"), "expected an object with \"format\": \"pydit-plan\", got 'other'"),
    (lambda d: d.update(version=4), "expected version 1, 2 or 3, got 4"),
    (lambda d: d.update(PruningPlan("qwen-image", 60, linear_ffn=[1]).to_dict(), version=2.0), "1, 2 or 3, got 2.0"),
    (lambda d: d.update(version=2), "missing affine, dead_tensors, linear_ffn, single_stream, text_linear$"),
    (lambda d: d.update(version=3), "missing affine, dead_tensors, linear_ffn, linear_text_ffn, single_stream, text_linear$"),
    (lambda d: d.update(PruningPlan("qwen-image", 60, linear_text_ffn=[1]).to_dict(), version=2), "unknown or missing linear_text_ffn"),
    (lambda d: d.update(kinds={}), "unknown or missing kinds"),
    (lambda d: d.pop("family"), "unknown or missing family"),
    (lambda d: d.update(intervals=[[5, 99]]), "out of range"),
    (lambda d: d.update(intervals={"a": 1}), "intervals: expected \\[start, end\\] pairs, got {'a': 1}"),
    (lambda d: d.update(intervals={}), "intervals: expected \\[start, end\\] pairs, got {}"),
    (lambda d: d.update(PruningPlan("qwen-image", 60, linear_ffn=[1]).to_dict(), linear_ffn={}),
     "linear_ffn: expected numbers of layers, got {}"),
    (lambda d: d.update(provenance=[1]), "provenance: expected a dict, got list"),
])
def test_bad_files(tmp_path, change, message):
    data = PruningPlan.from_intervals(60, [[3, 4]]).to_dict()
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message) as caught:
        PruningPlan.load(path)
    assert str(path) in str(caught.value)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        PruningPlan.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": "pydit-pl')
    with pytest.raises(FormatError, match="expected JSON in"):
        PruningPlan.load(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(FormatError, match="got list"):
        PruningPlan.load(tmp_path / "list.json")
    text = json.dumps(PruningPlan.from_intervals(60, [[3, 4]]).to_dict())
    (tmp_path / "twice.json").write_text(text[:-1] + ', "intervals": [[3, 40]]}')
    with pytest.raises(FormatError, match="expected JSON in .*twice.json, got something else .'intervals' more than once"):
        PruningPlan.load(tmp_path / "twice.json")


def test_describe():
    text = PruningPlan.preset("ppcl-qwen-image-12b").describe().splitlines()
    assert text[0] == ("qwen-image: 60 layers -> 35 (25 removed, 41.7 %), "
                       "20,430,401,088 parameters -> 11,934,618,688")
    assert len(text) == 38 and "82.2 (58.3 %)" in text[1]
    assert text[6].split() == ["3", "3-4", "339,831,296", "one", "block", "for", "2"]
    assert "parameters" not in PruningPlan.from_intervals(8, [[1, 2]]).describe()


def test_matches():
    model = tiny.transformer(4)
    assert PruningPlan("qwen-image", 4).matches(model) and not PruningPlan("qwen-image", 5).matches(model)
    with pytest.raises(UserError, match="plan: expected a plan for the model's 4 layers, got one for 60"):
        PruningPlan.preset("ppcl-qwen-image-12b").require_match(model)


@pytest.mark.parametrize("intervals", [7, "3-4", None, [3, 4]])
def test_intervals_that_are_no_pairs_are_refused(intervals):
    with pytest.raises(UserError, match=r"intervals: expected \[start, end\] pairs"):
        PruningPlan.from_intervals(60, intervals)
