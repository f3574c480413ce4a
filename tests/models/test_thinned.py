"""Blocks that a plan thins out: what each computes, what is lossless, what is stored, what can be switched back."""

import copy
import json
import warnings

import pytest
import torch
from torch.nn import functional as F

import pydit
from pydit.errors import FormatError, UserError
from pydit.models import get_adapter
from pydit.models.qwen_image import PrunedQwenImageTransformer2DModel
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests.models import tiny

REGION = {"intervals": [(1, 2), (5, 6)], "text_linear": [(3, 6)]}  # the region goes on to a block with text
PLANS = {
    "ffn": {"linear_ffn": [2, 7]},
    "text ffn": {"intervals": [(1, 2)], "linear_text_ffn": [1, 5]},
    "ffn of an anchor and of a text-linear block": {**REGION, "linear_ffn": [3, 4]},
    "text": REGION,
    "text to the end": {"intervals": [(1, 2)], "text_linear": [(3, 7)]},
    "affine": {"intervals": [(2, 4)], "affine": [2, 6]},
    "affine end": {"affine": [6, 7]},
    "single": {"intervals": [(1, 2), (5, 6)], "single_stream": 4},
    "all": {"intervals": [(1, 2)], "affine": [1], "text_linear": [(3, 5)], "linear_ffn": [0, 5], "linear_text_ffn": [3],
            "single_stream": 6},
    "dead": {},
}


def plan(name, lean=False):
    made = PruningPlan("qwen-image", 8, **PLANS[name])
    return made.lean() if lean else made


@pytest.fixture(params=[False, True], ids=["one row", "two rows"])
def teacher(request):
    return tiny.transformer(8, zero_cond_t=request.param)


def student_of(teacher, chosen, seed=0):
    """A student whose linear maps do something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        student = pydit.prune(teacher, chosen)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(student.named_parameters()):
        if name.split(".")[-2] in ("img_ffn", "txt_ffn", "txt_proj", "txt_out_proj", "img_map", "txt_map"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return student


@pytest.fixture(scope="module", params=[(rows, name, lean) for rows in (False, True) for name in PLANS for lean in (False, True)],
                ids=lambda drawn: "-".join((f"{'two rows' if drawn[0] else 'one row'}", drawn[1],
                                            "lean" if drawn[2] else "as published")))
def pair(request):
    """A teacher and its student of each plan, made once: tests leave both as they are."""
    rows, name, lean = request.param
    teacher = tiny.transformer(8, zero_cond_t=rows)
    return teacher, student_of(teacher, plan(name, lean))


def run(model, batch=None):
    with torch.no_grad():
        return model(**(batch or tiny.batch())).sample


def by_hand(student, batch):
    """The student's velocity in float64, from its weights and the formulas of PPCL Eq. 8 and 9 and Amber-Image."""
    model = copy.deepcopy(student).double()
    seen = {}
    handle = model.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    run(model, tiny.cast(batch, torch.float64))
    handle.remove()
    image, text = seen["hidden_states"], seen["encoder_hidden_states"]
    temb, mask, index = seen["temb"], seen["encoder_hidden_states_mask"], seen["modulate_index"]
    image_table, text_table = seen["image_rotary_emb"]
    temb_text = temb.chunk(2)[0] if model.zero_cond_t else temb
    told = {}

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def rows(mod, of_image):
        """[B, S or 1, C] chunks of a modulation."""
        if of_image and index is not None:
            mod = torch.where(index[..., None] == 0, *(half[:, None] for half in mod.chunk(2)))
        elif index is not None and len(mod) > len(temb_text):
            mod = mod.chunk(2)[0][:, None]
        else:
            mod = mod[:, None]
        return mod.split(model.inner_dim, dim=-1)

    def heads(x, linear, scale=None, table=None):
        x = linear(x).unflatten(-1, (-1, 32))
        if scale is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale.weight
        if table is not None:
            x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table.to(torch.complex128)[:, None])
            x = x.flatten(-2)
        return x

    def mlp(module, x):
        return F.linear(F.gelu(module.net[0].proj(x), approximate="tanh"), module.net[2].weight, module.net[2].bias)

    with torch.no_grad():
        for number, (spec, block) in enumerate(zip(student.plan.blocks, model.transformer_blocks, strict=True)):
            if spec.form == "affine":
                image = image + F.linear(image, block.img_map.weight, block.img_map.bias)
                if spec.text != "none":
                    text = text + F.linear(text, block.txt_map.weight, block.txt_map.bias)
                continue
            a = block.attn
            i_mod = rows(block.img_mod[1](F.silu(temb)), True)
            image_in = norm(image) * (1 + i_mod[1]) + i_mod[0]
            if spec.form == "single":
                t_mod, branch = rows(block.img_mod[1](F.silu(temb)), False), (a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k)
            elif spec.text != "linear":
                t_mod = rows(block.txt_mod[1](F.silu(temb_text)), False)
            if spec.form != "single":
                branch = (getattr(a, "add_q_proj", None), a.add_k_proj, a.add_v_proj,
                          getattr(a, "norm_added_q", None), a.norm_added_k)
            if spec.text == "linear":
                text_in = told[spec.anchor] + block.txt_proj(told[spec.anchor])
            else:
                text_in = norm(text) * (1 + t_mod[1]) + t_mod[0]
            told[number] = text_in
            q, k, v = (heads(image_in, a.to_q, a.norm_q, image_table), heads(image_in, a.to_k, a.norm_k, image_table),
                       heads(image_in, a.to_v))
            k = torch.cat((heads(text_in, branch[1], branch[4], text_table), k), 1)
            v = torch.cat((heads(text_in, branch[2]), v), 1)
            asks = spec.text == "full"
            if asks:
                q = torch.cat((heads(text_in, branch[0], branch[3], text_table), q), 1)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 32 ** 0.5
            if mask is not None:
                keep = torch.cat((mask.bool(), mask.new_ones(image.shape[:2], dtype=torch.bool)), 1)
                scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
            out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
            tokens = text.shape[1] if asks else 0
            image = image + i_mod[2] * a.to_out[0](out[:, tokens:])
            if spec.ffn == "linear":
                image = image + F.linear(image, block.img_ffn.weight, block.img_ffn.bias)
            else:
                image = image + i_mod[5] * mlp(block.img_mlp, norm(image) * (1 + i_mod[4]) + i_mod[3])
            if asks:
                last = a.to_out[0] if spec.form == "single" else a.to_add_out
                text = text + t_mod[2] * last(out[:, :tokens])
                if spec.ffn != "mlp":
                    text = text + F.linear(text, block.txt_ffn.weight, block.txt_ffn.bias)
                else:
                    module = block.img_mlp if spec.form == "single" else block.txt_mlp
                    text = text + t_mod[5] * mlp(module, norm(text) * (1 + t_mod[4]) + t_mod[3])
            elif spec.text_output:
                text = text + F.linear(text, block.txt_out_proj.weight, block.txt_out_proj.bias)
        return model.proj_out(model.norm_out(image, temb_text))


def test_equals_the_formulas(pair):
    _, student = pair
    for batch in (tiny.batch(), tiny.batch(images=2, seed=1, masked=False)):
        expected = by_hand(student, batch)
        assert torch.allclose(run(student, batch).double(), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", PLANS)
def test_lean_changes_nothing_but_the_size(teacher, name):
    full = student_of(teacher, plan(name))
    lean = student_of(teacher, plan(name, lean=True))
    kept = full.state_dict()
    for key, tensor in lean.state_dict().items():  # modulations lose their last rows
        tensor.copy_(kept[key][:len(tensor)])
    assert torch.allclose(run(lean), run(full), rtol=1e-5, atol=1e-6)
    dead = set(kept) - set(lean.state_dict())
    assert name == "single" or dead
    with torch.no_grad():  # and what went was dead
        for key in dead:
            full.get_parameter(key).normal_()
    assert torch.allclose(run(lean), run(full), rtol=1e-5, atol=1e-6)


def test_count_equals_the_model(pair):
    teacher, student = pair
    assert student.plan.num_parameters(dict(teacher.config)) == sum(p.numel() for p in student.parameters())


def test_flops_are_those_counted_by_torch():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    teacher, batch = tiny.transformer(8), tiny.batch(images=1, masked=False)

    def counted(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(**batch)
        return counter.get_total_flops()

    outside = counted(teacher) - PruningPlan("qwen-image", 8).num_flops(dict(teacher.config), image_tokens=16,
                                                                        text_tokens=7)
    for name in PLANS:
        for lean in (False, True):
            chosen = plan(name, lean)
            expected = chosen.num_flops(dict(teacher.config), image_tokens=16, text_tokens=7)
            assert counted(student_of(teacher, chosen)) - outside == expected, (name, lean)


def test_every_unit_can_be_switched_back(pair):
    teacher, student = pair
    everything = run(student)
    expected = run(teacher)
    student.set_active([])
    assert torch.allclose(run(student), expected, rtol=1e-5, atol=1e-6)
    for unit in student.plan.units:
        student.set_active([unit])
        one = run(student)
        assert student.active == [unit] and torch.isfinite(one).all() and not torch.allclose(one, expected, rtol=1e-3), unit
    student.set_active(student.plan.units)
    assert torch.equal(run(student), everything)


def test_units():
    assert plan("text").units == ((1, 2), (4, 6))
    assert plan("text to the end").units == ((1, 2), (4, 7))
    assert plan("text to the end", lean=True).units == ((1, 2), (3, 7))  # the anchor's text output is gone too
    assert plan("affine end", lean=True).units == ((5, 7),)  # block 5 keeps no text output for layer 6
    assert plan("affine end").units == ((6, 6), (7, 7))
    assert plan("dead", lean=True).units == ()
    assert plan("ffn of an anchor and of a text-linear block").units == ((1, 2), (3, 6))  # layer 3 hands nothing on
    assert plan("ffn", lean=True).units == ((2, 2), (7, 7))
    region = PruningPlan("qwen-image", 8, text_linear=[(0, 5)], affine=[6, 7])
    assert region.units == ((1, 5), (6, 6), (7, 7))
    assert region.lean().units == ((0, 7),)  # the region leaves no text for layers 6 and 7
    assert PruningPlan.from_intervals(8, [(1, 3), (5, 6)]).units == ((1, 3), (5, 6))
    teacher = tiny.transformer(8)
    student = student_of(teacher, plan("text"))
    student.set_active([(5, 6)])  # an interval inside the region stands for it
    assert student.active == [(4, 6)]
    student.set_active(student.plan.intervals)
    assert student.active == [(1, 2), (4, 6)]
    with pytest.raises(UserError, match=r"expected intervals of the plan \[\(1, 2\), \(4, 6\)\], got \[\(4, 5\)\]"):
        student.set_active([(4, 5)])


def test_files(tmp_path, pair):
    teacher, student = pair
    student.save_pretrained(tmp_path, with_teacher=bool(student.plan.units))
    loaded, report = PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(run(loaded), run(student)) and loaded.plan == student.plan
    loaded.set_active([])
    assert torch.allclose(run(loaded), run(teacher), rtol=1e-5, atol=1e-6)
    data = json.loads(json.dumps(student.plan.to_dict()))
    assert PruningPlan.from_dict(data) == student.plan and data["version"] == (
        1 if student.plan.is_stock else 3 if student.plan.linear_text_ffn else 2)


@pytest.mark.parametrize("name", ["all", "text to the end"])
def test_gradient_checkpointing(name):
    student = student_of(tiny.transformer(8), plan(name))
    batch = tiny.batch()
    student(**batch).sample.square().sum().backward()
    plain = {key: p.grad.clone() for key, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    student.enable_gradient_checkpointing()
    student(**batch).sample.square().sum().backward()
    assert plain.keys() == {key for key, p in student.named_parameters() if p.grad is not None}
    assert all(torch.equal(student.get_parameter(key).grad, gradient) for key, gradient in plain.items())


@pytest.mark.slow  # importing the compiler
def test_compiles_in_one_graph():
    chosen = PruningPlan("qwen-image", 7, [(1, 2)], affine=[1], text_linear=[(3, 4)], linear_ffn=[0, 4], single_stream=5)
    student = student_of(tiny.transformer(7), chosen)
    assert [spec.form for spec in chosen.blocks] == ["stock", "affine", "stock", "stock", "single", "single"]
    assert torch.equal(run(torch.compile(student, backend="eager", fullgraph=True)), run(student))


def test_no_stock_class_carries_it():
    with pytest.raises(UserError, match=r"to_stock: expected a plan with intervals alone, got one whose blocks \[2, 7\]"):
        student_of(tiny.transformer(8), plan("ffn")).to_stock()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    student = student_of(tiny.transformer(8).to(dtype), plan("all")).to(dtype)
    assert run(student, tiny.cast(tiny.batch(), dtype)).dtype == dtype


# Fits of the linear maps.

def fit(teacher, chosen, batches=6, **options):
    return pydit.prune(teacher, chosen, batches=[tiny.batch(images=16, seed=seed) for seed in range(batches)], **options)


def velocity_error(teacher, student):
    batch = tiny.batch(images=16, seed=99)
    return float((run(student, batch) - run(teacher, batch)).square().mean())


@pytest.mark.parametrize("name", ["ffn", "text", "text to the end", "affine"])
def test_fitting_lowers_the_error(name):
    teacher = tiny.transformer(8)
    with pytest.warns(UserWarning, match="start as the identity"):
        identity = pydit.prune(teacher, plan(name))
    student = fit(teacher, plan(name))
    assert velocity_error(teacher, student) < velocity_error(teacher, identity)
    assert len(student.fits) == sum(key.endswith(".weight") and key.split(".")[-2] in
                                    ("img_ffn", "txt_ffn", "txt_proj", "txt_out_proj", "img_map", "txt_map")
                                    for key in student.state_dict())
    assert all(one.inputs == 65 and one.r2 > 0 for one in student.fits)


def test_a_fit_is_least_squares_on_all_rows_of_all_batches_without_padding():
    teacher, chosen = tiny.transformer(8), plan("text")
    student = fit(teacher, chosen, batches=3, ridge=0.0)
    adapter = get_adapter(teacher)
    rows, targets, tokens = [], [], 0
    for seed in range(3):
        capture = adapter.capture(teacher, tiny.batch(images=16, seed=seed), range(9))
        keep = capture.kwargs["encoder_hidden_states_mask"].bool()
        tokens += int(keep.sum())
        rows.append(capture.states[4][1][keep].double())  # the anchor's text output
        targets.append(capture.states[7][1][keep].double())
    x = torch.cat((torch.cat(rows), torch.ones(tokens, 1, dtype=torch.float64)), 1)
    solution = torch.linalg.lstsq(x, torch.cat(targets) - x[:, :-1]).solution
    last = student.transformer_blocks[chosen.blocks.index(next(s for s in chosen.blocks if s.text_output))]
    assert torch.allclose(last.txt_out_proj.weight.double(), solution[:-1].T, atol=1e-4)
    assert torch.allclose(last.txt_out_proj.bias.double(), solution[-1], atol=1e-4)
    assert {one.rows for one in student.fits} == {tokens}


def test_every_text_map_gets_its_own_fit():
    """The authors' export fills every output map from the first one."""
    teacher = tiny.transformer(8)
    student = fit(teacher, PruningPlan("qwen-image", 8, text_linear=[(0, 1), (2, 3), (4, 7)]))
    maps = [block.txt_out_proj.weight for block in student.transformer_blocks if hasattr(block, "txt_out_proj")]
    assert len(maps) == 3 and not any(torch.allclose(maps[0], other, rtol=1e-2) for other in maps[1:])
    singles = [block.txt_proj.weight for block in student.transformer_blocks if hasattr(block, "txt_proj")]
    assert len(singles) == 5 and not any(torch.allclose(singles[0], other, rtol=1e-2) for other in singles[1:])


def test_a_text_map_aims_at_the_modulation_of_its_own_block():
    """Not of the teacher's layer at that place: keys and values read what their own block was made for."""
    teacher, chosen = tiny.transformer(8), PruningPlan("qwen-image", 8, [(4, 6)], text_linear=[(3, 6)])
    student = fit(teacher, chosen, init="middle", ridge=0.0)
    adapter, layers = get_adapter(teacher), teacher.transformer_blocks
    told, own, place = [], [], []
    for seed in range(6):
        capture = adapter.capture(teacher, tiny.batch(images=16, seed=seed), range(9))
        keep = capture.kwargs["encoder_hidden_states_mask"].bool()
        for rows, layer, boundary in ((told, 3, 3), (own, 5, 4), (place, 4, 4)):
            with torch.no_grad():
                text = adapter.modulated_text(layers[layer], capture.states[boundary][1], capture.kwargs)
            rows.append(text[keep].double())
    x = torch.cat(told)
    x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
    found = student.transformer_blocks[4].txt_proj.weight.double()
    expected, wrong = (torch.linalg.lstsq(x, torch.cat(y) - x[:, :-1]).solution[:-1].T for y in (own, place))
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, wrong, atol=1e-2)


def test_the_fit_is_exact_where_the_teacher_is_linear():
    teacher = tiny.transformer(8)
    with torch.no_grad():
        for k in range(3, 7):  # the text passes these layers as it is, under one modulation
            block = teacher.transformer_blocks[k]
            block.txt_mod[1].load_state_dict(teacher.transformer_blocks[3].txt_mod[1].state_dict())
            for chunk in (2, 5):
                block.txt_mod[1].weight[64 * chunk:64 * (chunk + 1)] = 0
                block.txt_mod[1].bias[64 * chunk:64 * (chunk + 1)] = 0
        for modulation in (teacher.transformer_blocks[1].img_mod, teacher.transformer_blocks[1].txt_mod):
            modulation[1].weight.zero_(), modulation[1].bias.zero_()
    student = fit(teacher, PruningPlan("qwen-image", 8, text_linear=[(3, 6)], affine=[1]), ridge=1e-9)
    assert velocity_error(teacher, student) < 1e-8 * float(run(teacher).square().mean())


def test_too_few_tokens_are_named():
    with pytest.warns(UserWarning, match=r"2 of 2 linear maps have more unknowns than tokens \(the first, block 2 "
                                         r"\(layers 2-2\) img_ffn: 65 for 16\)"):
        pydit.prune(tiny.transformer(4), PruningPlan("qwen-image", 4, linear_ffn=[2]),
                    batches=[tiny.batch(images=1)])


def test_no_batches_at_all():
    with pytest.raises(UserError, match="batches: expected at least one calibration batch to fit linear maps to"):
        pydit.prune(tiny.transformer(8), plan("ffn"), batches=[])


# Plans.

@pytest.mark.parametrize("fields, message", [
    ({"linear_ffn": [2, 2]}, "linear_ffn: expected each layer once"),
    ({"linear_ffn": [8]}, r"linear_ffn: expected the first layer of a block \(0, 1, 2, 3, 4, 5, 6, 7\), got 8"),
    ({"intervals": [(1, 2)], "linear_ffn": [2]}, r"linear_ffn: .* \(0, 1, 3, 4, 5, 6, 7\), got 2"),
    ({"linear_ffn": "23"}, "linear_ffn: expected numbers of layers, got '23'"),
    ({"affine": [1.5]}, "affine: expected numbers of layers"),
    ({"affine": [3], "linear_ffn": [3]}, "affine: expected blocks that linear_ffn leaves alone, got 3 in both"),
    ({"affine": [3], "linear_text_ffn": [3]}, "affine: expected blocks that linear_text_ffn leaves alone, got 3 in both"),
    ({"linear_text_ffn": [2, 3], "linear_ffn": [3]}, "linear_text_ffn: expected blocks that linear_ffn leaves alone, got 3"),
    ({"linear_text_ffn": [4], "text_linear": [(3, 5)]}, "linear_text_ffn: expected blocks that text_linear leaves alone, got 4"),
    ({"linear_text_ffn": [5], "single_stream": 4}, "single_stream: expected blocks from layer 4 on .* got 5 in text_linear, linear_ffn"),
    ({"affine": [4], "text_linear": [(3, 5)]}, "affine: expected blocks that text_linear leaves alone, got 4 in both"),
    ({"intervals": [(2, 3)], "text_linear": [(3, 5)]}, r"text_linear: expected an anchor that is kept whole, got 3"),
    ({"intervals": [(4, 6)], "text_linear": [(3, 5)]}, r"text_linear: expected the last layer of a block .* got 5"),
    ({"text_linear": [(1, 3), (3, 5)]}, "text_linear: expected disjoint intervals"),
    ({"text_linear": [(3, 3)]}, "text_linear: .* which replaces nothing"),
    ({"single_stream": 4, "text_linear": [(3, 5)]}, "single_stream: expected blocks from layer 4 on"),
    ({"single_stream": 9}, "single_stream: expected the first layer of a block"),
    ({"dead_tensors": 0}, "dead_tensors: expected true or false, got 0"),
])
def test_plans_that_contradict_themselves(fields, message):
    with pytest.raises(UserError, match=message):
        PruningPlan("qwen-image", 8, **fields)


@pytest.mark.parametrize("change", [lambda d: d.pop("affine"), lambda d: d.update(kinds=1), lambda d: d.update(version=1)])
def test_a_file_with_more_or_less_is_refused(change):
    data = plan("all").to_dict()
    change(data)
    with pytest.raises(FormatError, match="expected the entries"):
        PruningPlan.from_dict(data)


def test_lean_sizes():
    """Dead tensors of the last block, diffusers' facts: 132,154,496; of the 10B's text queries, as published: 151 M."""
    teacher = PruningPlan("qwen-image", 60)
    assert teacher.num_parameters() - teacher.lean().num_parameters() == 132_154_496
    ten = PruningPlan.preset("ppcl-qwen-image-10b")
    queries = 8 * (2 * 9_440_256 + 128)
    anchor = 132_154_496  # layer 50: after it, no text is read but through its keys and values
    assert ten.num_parameters() - ten.lean().num_parameters() == queries + anchor + 9_440_256
    assert ten.lean().lean() == ten.lean() != ten


def test_student_index_map_of_the_published_10b():
    """The layout that PPCL publishes, written out."""
    blocks = PruningPlan.preset("ppcl-qwen-image-10b").blocks
    first = [0, 1, 2, 3, 5, 8, 11, 13, 14, 15, 25, 28, 29, *range(31, 37), 37, 38, 39, 40, 41, 42, 44, 45, 48, 50, 51,
             52, 54, 56, 58, 59]
    assert [spec.source[0] for spec in blocks] == first and len(blocks) == 35
    student = [i for i, spec in enumerate(blocks) if len(spec.source) > 1]
    assert student == [3, 4, 5, 6, 9, 10, 12, 24, 26, 27, 30, 31, 32]
    assert [i for i, spec in enumerate(blocks) if spec.text == "linear"] == [19, 23, 29, 30, 31, 32, 33, 34]
    assert [i for i, spec in enumerate(blocks) if spec.ffn == "linear"] == [2, 33, 34]
    assert [i for i, spec in enumerate(blocks) if spec.text_output] == [19, 23, 34]


def test_describe_says_what_a_block_is():
    text = PruningPlan.preset("ppcl-qwen-image-10b").describe()
    assert "20,430,401,088 parameters -> 10,603,653,184" in text and "predicted, not measured" in text
    assert "   33  58                122,723,840  kept, text linear from block 28, linear FFN" in text
    assert "6.84 B, Amber-style" in PruningPlan.preset("amber-qwen-image-6b").describe()


# The rest of the package with such a model.

@pytest.mark.parametrize("lean", [False, True], ids=["as published", "lean"])
@pytest.mark.parametrize("name", ["all", "text to the end", "single", "dead"])
def test_accelerated_within_the_tolerance_policy(name, lean, device):
    batch = tiny.batch()
    student = student_of(tiny.transformer(8), plan(name, lean))
    exact = run(copy.deepcopy(student).double(), tiny.cast(batch, torch.float64))
    student = student.to(device, torch.bfloat16)
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value
              for key, value in tiny.cast(batch, torch.bfloat16).items()}
    stock = run(student, inputs)
    pydit.accelerate(student)
    assert_accurate(run(student, inputs), exact.to(device), stock)
    attention = {row["path"]: row["count"] for row in pydit.report(student)["model"]["attention"]}
    assert attention == {"pydit": sum(spec.form != "affine" for spec in student.plan.blocks)}
    assert torch.equal(run(pydit.restore(student), inputs), stock)


@pytest.mark.parametrize("name", ["all", "text to the end", "single"])
def test_baked_schedule_is_bit_equal(teacher, name):
    student = student_of(teacher, plan(name, lean=True))
    batch = {**tiny.batch(images=1), "timestep": torch.tensor([0.5])}
    expected = run(student, batch)
    assert torch.equal(run(pydit.bake_schedule(student, [0.5, 0.25]), batch), expected)
    assert torch.equal(run(pydit.restore(student), batch), expected)


@pytest.mark.parametrize("name", ["all", "ffn of an anchor and of a text-linear block", "text", "single"])
def test_distillation_trains_what_was_thinned_out(name):
    """Teacher-fed: every block that is not the teacher's own gets nearer to its target, and no other one moves."""
    teacher = tiny.transformer(8)
    student = student_of(teacher, plan(name))
    before = tiny.fingerprint(student)
    config = pydit.distill.DistillConfig(layers_steps=30, layers_lr=3e-3, log_every=1)
    result = pydit.distill.distill(teacher, student, lambda start: (tiny.batch(seed=start + n) for n in range(10**6)),
                                   config, progress=False)
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < 0.8 * first["loss"]
    labels = {f"{start}-{end}" for _, start, end in student.plan.replaced}
    assert set(first["intervals"]) == labels
    for label in labels:
        assert sum(last["intervals"][label].values()) < sum(first["intervals"][label].values()), label
    moved = {int(key.split(".")[1]) for key, tensor in student.state_dict().items()
             if key.startswith("transformer_blocks.") and not torch.equal(tensor, before[key])}
    assert moved == {block for block, _, _ in student.plan.replaced}


def test_the_output_phase_trains_maps_on_what_the_student_feeds_them():
    """Anchors made by the pruned model itself, as at run time; every map moves and the error falls."""
    teacher = tiny.transformer(8)
    student = student_of(teacher, plan("ffn of an anchor and of a text-linear block"))
    before, error = tiny.fingerprint(student), velocity_error(teacher, student)
    config = pydit.distill.DistillConfig(layers_steps=0, output_steps=15, output_lr=3e-3)
    pydit.distill.distill(teacher, student, lambda start: (tiny.batch(seed=start + n) for n in range(10**6)), config,
                          progress=False)
    maps = [key for key in before if key.split(".")[-2] in ("img_ffn", "txt_ffn", "txt_proj", "txt_out_proj")]
    assert len(maps) == 2 * 6 and not any(torch.equal(student.state_dict()[key], before[key]) for key in maps)
    assert velocity_error(teacher, student) < 0.8 * error


def test_the_text_of_a_region_is_matched_where_something_reads_it():
    student = student_of(tiny.transformer(8), plan("text"))
    result = pydit.distill.distill(
        tiny.transformer(8), student, lambda start: (tiny.batch(seed=start + n) for n in range(10**6)),
        pydit.distill.DistillConfig(layers_steps=1, output_steps=1, boundary_weight=0.1, log_every=1), progress=False)
    for row in result.history:
        streams = {label: set(losses) for label, losses in row["intervals"].items()}
        assert streams == {"1-2": {"image", "text"}, "4-4": {"image"}, "5-6": {"image", "text"}}


def test_a_pipeline_with_thinned_out_blocks(tmp_path):
    from pydit.inference.pipeline import load_pipeline, save_pipeline
    from tests.demo.pipelines import untrained

    pipe = load_pipeline(untrained(), dtype=torch.float32)
    chosen = PruningPlan("qwen-image", 6, [(1, 2)], text_linear=[(3, 5)], linear_ffn=[0])
    student = student_of(pipe.transformer, chosen)
    pipe.register_modules(transformer=student)
    save_pipeline(pipe, tmp_path / "out")
    loaded = load_pipeline(tmp_path / "out", dtype=torch.float32).transformer
    assert type(loaded) is PrunedQwenImageTransformer2DModel and loaded.plan == chosen
    before = student.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())


def test_the_linear_loss_is_the_squared_error_of_what_the_maps_stand_for():
    """PPCL's L_linear by hand, on the first step, and only where a block has linear maps."""
    teacher, chosen = tiny.transformer(8), PruningPlan("qwen-image", 8, [(1, 2)], text_linear=[(3, 5)], linear_ffn=[6])
    student = student_of(teacher, chosen)
    batch = tiny.batch()
    adapter, layers = get_adapter(teacher), teacher.transformer_blocks
    capture = adapter.capture(teacher, batch, range(9))
    keep = capture.kwargs["encoder_hidden_states_mask"].bool()
    with torch.no_grad():
        told = adapter.modulated_text(layers[3], capture.states[3][1], capture.kwargs)
        expected = {}
        for block, layer in ((3, 4), (4, 5)):
            own = student.transformer_blocks[block]
            z = told + own.txt_proj(told) - adapter.modulated_text(layers[layer], capture.states[layer][1], capture.kwargs)
            expected[f"{layer}-{layer}"] = z[keep].square().mean()
        text = capture.states[4][1]
        h = text + student.transformer_blocks[4].txt_out_proj(text) - capture.states[6][1]
        expected["5-5"] += h[keep].square().mean()
        image, text = adapter.call_block(student.transformer_blocks[5], *capture.states[6], capture.kwargs)
        expected["6-6"] = ((image - capture.states[7][0]).square().mean()
                           + (text - capture.states[7][1])[keep].square().mean())
    result = pydit.distill.distill(teacher, student, [batch], pydit.distill.DistillConfig(
        layers_steps=1, linear_weight=0.5, log_every=1), progress=False)
    found = {label: losses.pop("linear", None) for label, losses in result.history[0]["intervals"].items()}
    assert found.pop("1-2") is None and found.keys() == expected.keys()
    for label, value in expected.items():
        assert found[label] == pytest.approx(float(value), rel=1e-5), label
    total = sum(sum(losses.values()) for losses in result.history[0]["intervals"].values()) + 0.5 * sum(found.values())
    assert result.history[0]["loss"] == pytest.approx(total, rel=1e-6)
