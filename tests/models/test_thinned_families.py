"""FLUX.1 and SD3.5 thinned out: the formulas in float64, sizes, files, switching back, fits, fused forms."""

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F

import pydit
from pydit.errors import UserError
from pydit.models import get_adapter
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests.models import tiny
from tests.models.test_thinned import student_of


def flux():
    return enlarged(tiny.flux(num_layers=4, num_single_layers=5))


def sd3():
    return enlarged(tiny.sd3(num_layers=7, dual_attention_layers=(0, 1, 2)))


def enlarged(model):
    """With gates that let every block do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm1" in name or ".norm.linear" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model


MADE = {"flux.1": (flux, tiny.flux_batch, 9), "sd3.5": (sd3, tiny.sd3_batch, 7)}
# Dual blocks of FLUX.1 are layers 0-3; a text region of it goes from dual to single blocks. Layers 0-2 of SD3.5 attend
# twice, and its layer 6 has no text output.
PLANS = {
    ("flux.1", "ffn"): {"linear_ffn": [1, 5]},
    ("flux.1", "text ffn"): {"intervals": [(1, 2)], "linear_text_ffn": [1, 3], "linear_ffn": [6]},
    ("flux.1", "text"): {"intervals": [(1, 2)], "text_linear": [(3, 5)], "linear_ffn": [3, 5]},
    ("flux.1", "text to the end"): {"text_linear": [(0, 2), (6, 8)], "affine": [4]},
    ("flux.1", "single"): {"intervals": [(1, 2)], "single_stream": (1, 3), "linear_ffn": [8]},
    ("flux.1", "affine end"): {"affine": [4, 5, 6, 7, 8]},
    ("flux.1", "dead"): {},
    ("sd3.5", "ffn"): {"linear_ffn": [1, 4, 6]},
    ("sd3.5", "text ffn"): {"intervals": [(2, 3)], "linear_text_ffn": [1, 2, 5]},
    ("sd3.5", "text"): {"intervals": [(2, 3)], "text_linear": [(1, 4)], "linear_ffn": [1, 2]},
    ("sd3.5", "text to the end"): {"text_linear": [(4, 6)], "linear_ffn": [6]},
    ("sd3.5", "single"): {"intervals": [(5, 6)], "single_stream": 2, "affine": [4]},
    ("sd3.5", "affine end"): {"affine": [6]},
    ("sd3.5", "dead"): {},
}
EACH = pytest.mark.parametrize("family, name, lean", [(*key, lean) for key in PLANS for lean in (False, True)
                                                     if lean == (key[1] != "text to the end")],
                               ids=lambda value: {True: "lean", False: "whole"}.get(value, value))


def plan(family, name, lean=False):
    made = PruningPlan(family, MADE[family][2], **PLANS[family, name])
    return made.lean() if lean else made


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def tokens_out(model, batch):
    """What ``proj_out`` makes of the image tokens."""
    seen = {}
    handle = model.proj_out.register_forward_hook(lambda module, args, out: seen.update(out=out))
    run(model, batch)
    handle.remove()
    return seen["out"]


def by_hand(student, batch):
    """The student's tokens in float64, from its weights and the formulas of FLUX.1, SD3.5, PPCL and Amber-Image."""
    model, seen = copy.deepcopy(student).double(), {}
    first = get_adapter(model).blocks(model)[0]
    handle = first.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    run(model, tiny.cast(batch, torch.float64))
    handle.remove()
    image, text, temb = seen["hidden_states"], seen["encoder_hidden_states"], seen["temb"]
    tables, tokens, told = seen.get("image_rotary_emb"), seen["encoder_hidden_states"].shape[1], {}

    def norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def rows(linear):
        return F.linear(F.silu(temb), linear.weight, linear.bias)[:, None].split(64, dim=-1)

    def heads(x, linear, scale, where):
        x = linear(x).unflatten(-1, (-1, 32))
        if scale is None:
            return x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale.weight
        if tables is None:
            return x
        cosine, sine = (table[where].double()[:, None] for table in tables)
        return x * cosine + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sine

    def mlp(module, x):
        return F.linear(F.gelu(module.net[0].proj(x), approximate="tanh"), module.net[2].weight, module.net[2].bias)

    def affine(x, linear):
        return x + x @ linear.weight.T + linear.bias

    def attention(q, k, v):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 32 ** 0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    of_image, of_text = slice(tokens, None), slice(tokens)
    with torch.no_grad():
        for number, (spec, block) in enumerate(zip(student.plan.blocks, get_adapter(model).blocks(model), strict=True)):
            if spec.form == "affine":
                image = affine(image, block.img_map)
                text = text if spec.text == "none" else affine(text, block.txt_map)
                continue
            a, parallel = block.attn, hasattr(block, "proj_out")
            shared = parallel or spec.form == "single"
            i_mod = rows(block.norm.linear if parallel else block.norm1.linear)
            if shared:
                t_mod = i_mod
            elif spec.text != "linear":
                t_mod = rows(block.norm1_context.linear)
                if "Continuous" in type(block.norm1_context).__name__:
                    t_mod = t_mod[::-1]
            names = ("to_q", "to_k", "to_v", "norm_q", "norm_k") if shared else (
                "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
            q_of, k_of, v_of, q_norm, k_norm = (getattr(a, each, None) for each in names)
            image_in = norm(image, *i_mod[:2])
            text_in = affine(told[spec.anchor], block.txt_proj) if spec.text == "linear" else norm(text, *t_mod[:2])
            told[number] = text_in
            asks = spec.text == "full" and not getattr(block, "context_pre_only", False)
            q = heads(image_in, a.to_q, a.norm_q, of_image)
            k = torch.cat((heads(text_in, k_of, k_norm, of_text), heads(image_in, a.to_k, a.norm_k, of_image)), 1)
            v = torch.cat((heads(text_in, v_of, None, None), heads(image_in, a.to_v, None, None)), 1)
            out = attention(q, k, v)
            text_out = attention(heads(text_in, q_of, q_norm, of_text), k, v) if asks else None
            if parallel:
                def after(x, given, made, linear, mod=i_mod, block=block, spec=spec):
                    if spec.ffn == "linear":
                        return affine(x + mod[2] * block.proj_out(made), linear())
                    hidden = F.gelu(block.proj_mlp(given), approximate="tanh")
                    return x + mod[2] * block.proj_out(torch.cat((made, hidden), -1))
                image = after(image, image_in, out, lambda block=block: block.img_ffn)
                text = after(text, text_in, text_out, lambda block=block: block.txt_ffn) if asks else text
            else:
                before = image
                image = image + i_mod[2] * a.to_out[0](out)
                if getattr(block, "attn2", None) is not None:
                    second, b = norm(before, *i_mod[-3:-1]), block.attn2
                    made = attention(heads(second, b.to_q, b.norm_q, None), heads(second, b.to_k, b.norm_k, None),
                                     heads(second, b.to_v, None, None))
                    image = image + i_mod[-1] * b.to_out[0](made)
                image = affine(image, block.img_ffn) if spec.ffn == "linear" else \
                    image + i_mod[5] * mlp(block.ff, norm(image, *i_mod[3:5]))
                if asks:
                    text = text + t_mod[2] * (a.to_out[0] if shared else a.to_add_out)(text_out)
                    text = affine(text, block.txt_ffn) if spec.ffn != "mlp" else \
                        text + t_mod[5] * mlp(block.ff if shared else block.ff_context, norm(text, *t_mod[3:5]))
            if spec.text == "linear" and spec.text_output:
                text = affine(text, block.txt_out_proj)
        return model.proj_out(model.norm_out(image, temb))


@EACH
def test_formulas_sizes_and_switching_back(family, name, lean):
    make, batches, _ = MADE[family]
    teacher, batch = make(), batches()
    student = student_of(teacher, plan(family, name, lean))
    expected = by_hand(student, batch)
    assert torch.allclose(tokens_out(student, batch).double(), expected, atol=1e-4 * float(expected.abs().max()))
    assert student.plan.num_parameters(dict(teacher.config)) == sum(p.numel() for p in student.parameters())
    for unit in student.plan.units:
        student.set_active([unit])
        assert student.active == [unit] and torch.isfinite(run(student, batch)).all()
        assert not torch.allclose(run(student, batch), run(teacher, batch), rtol=1e-3), unit
    student.set_active([])
    assert torch.allclose(run(student, batch), run(teacher, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family, name", PLANS)
def test_lean_is_lossless_and_files_are_exact(tmp_path, family, name):
    make, batches, _ = MADE[family]
    teacher, batch = make(), batches()
    full, lean = student_of(teacher, plan(family, name)), student_of(teacher, plan(family, name, lean=True))
    kept = full.state_dict()
    for key, tensor in lean.state_dict().items():
        tensor.copy_(kept[key][:len(tensor)])
    assert torch.allclose(run(lean, batch), run(full, batch), rtol=1e-4, atol=1e-5)
    saved = full.plan.num_parameters(dict(teacher.config)) - lean.plan.num_parameters(dict(teacher.config))
    # A single block stores nothing for its text alone but the map of a linear FFN.
    assert (saved > 0) == (name in ("text to the end", "affine end", "single") if family == "flux.1" else name != "single")
    lean.save_pretrained(tmp_path, with_teacher=bool(lean.plan.units))
    loaded = type(lean).from_pretrained(tmp_path)
    assert (run(loaded, batch) - run(lean, batch)).abs().max() == 0 and loaded.plan == lean.plan
    loaded.set_active([])
    assert torch.allclose(run(loaded, batch), run(teacher, batch), rtol=1e-4, atol=1e-5)


def test_whole_attention_in_the_order_of_the_stock_processor():
    """SD3.5's has the image first; the other order would change the last bits."""
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    attn = student_of(sd3(), plan("sd3.5", "ffn")).transformer_blocks[1].attn
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2, tokens, 64, generator=generator) for tokens in (150, 70))
    with torch.no_grad():
        for found, expected in zip(attn.processor(attn, image, text), JointAttnProcessor2_0()(attn, image, text), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("family", MADE)
def test_flops_are_those_counted_by_torch(family):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    make, batches, depth = MADE[family]
    teacher, batch = make(), batches()
    one = {key: value[:1] if key not in ("img_ids", "txt_ids") else value for key, value in batch.items()}
    tokens = {"image_tokens": 20 if family == "flux.1" else 16, "text_tokens": 7}

    def counted(model):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(**one)
        return counter.get_total_flops()

    outside = counted(teacher) - PruningPlan(family, depth).num_flops(dict(teacher.config), **tokens)
    for key in PLANS:
        for lean in (key[1] != "text",) if key[0] == family else ():
            chosen = plan(*key, lean)
            expected = chosen.num_flops(dict(teacher.config), **tokens)
            assert counted(student_of(teacher, chosen)) - outside == expected, (key, lean)


@pytest.mark.parametrize("family, name, lean", [("flux.1", "text", False), ("flux.1", "single", True),
                                                ("sd3.5", "text", True), ("sd3.5", "single", False)])
def test_accelerated_within_the_tolerance_policy(family, name, lean, device):
    make, batches, _ = MADE[family]
    student = student_of(make(), plan(family, name, lean))
    batch = batches()
    exact = run(copy.deepcopy(student).double(), tiny.cast(batch, torch.float64))
    student = student.to(device, torch.bfloat16)
    inputs = {key: value.to(device) for key, value in tiny.cast(batch, torch.bfloat16).items()}
    stock = run(student, inputs)
    pydit.accelerate(student)
    assert_accurate(run(student, inputs), exact.to(device), stock)
    report = pydit.report(student)["model"]
    assert {row["path"] for kind in ("attention", "blocks") for row in report[kind]} == {"pydit"}
    assert torch.equal(run(pydit.restore(student), inputs), stock)


@pytest.mark.parametrize("family, name", [("flux.1", "text"), ("sd3.5", "text"), ("sd3.5", "ffn")])
def test_fitting_and_distilling_lower_the_error(family, name):
    make, batches, _ = MADE[family]
    teacher, chosen = make(), plan(family, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        identity = pydit.prune(teacher, chosen)
    student = pydit.prune(teacher, chosen, batches=[batches(seed) for seed in range(12)])
    maps = [key for key in student.state_dict() if key.endswith("weight") and key.split(".")[-2] in
            ("img_ffn", "txt_ffn", "txt_proj", "txt_out_proj")]
    assert len(student.fits) == len(maps) and all(one.rows >= one.inputs for one in student.fits)

    config = pydit.distill.DistillConfig(layers_steps=3, layers_lr=3e-3, linear_weight=1.0, loss="mse", log_every=1)

    def losses(model):
        result = pydit.distill.distill(teacher, model, [batches()], config, progress=False)
        return [row["loss"] for row in result.history]

    assert losses(student)[0] < losses(identity)[0]
    trained = losses(student_of(teacher, chosen))
    assert trained[-1] < 0.95 * trained[0]


def test_published_sizes_of_thinned_blocks():
    """By hand, from width 3072 (FLUX.1) and 2432 (SD3.5 large): what each means saves of one block."""
    flux_size, square = PruningPlan("flux.1", 57).num_parameters(), 3072 * 3072 + 3072
    mlp = (3072 * 4 * 3072 + 4 * 3072) + (4 * 3072 * 3072 + 3072)
    saved = flux_size - PruningPlan("flux.1", 57, linear_ffn=[18]).num_parameters()
    assert saved == 2 * (mlp - square + 3 * square)  # the MLP and half of the modulation, of both streams
    saved = flux_size - PruningPlan("flux.1", 57, linear_ffn=[19]).num_parameters()
    assert saved == mlp - 3072 - 2 * square  # proj_out keeps its bias
    assert flux_size - PruningPlan("flux.1", 57, single_stream=(18, 18)).num_parameters() == 169_915_648
    assert flux_size - PruningPlan("flux.1", 57, text_linear=[(19, 25)]).num_parameters() == -7 * square
    large, square = PruningPlan("sd3.5", 38), 2432 * 2432 + 2432
    assert large.num_parameters() - large.lean().num_parameters() == square + 64  # the last block's text query
    text = PruningPlan("flux.1", 57, linear_ffn=[19], text_linear=[(30, 56)]).describe()
    assert "linear FFN" in text and "text linear from block 30, text output" in text and "on an H200" in text


@pytest.mark.parametrize("fields, message", [
    ({"single_stream": 1}, r"single_stream: expected \[first, last\], because flux.1 has single-stream blocks"),
    ({"single_stream": (1, 9)}, r"single_stream: expected the last layer of a block to end it, got 9 of \[1, 9\]"),
    ({"single_stream": (1, 2), "linear_ffn": [2]}, r"single_stream: expected blocks of \[1, 2\] to be thinned out by"),
])
def test_single_stream_of_flux(fields, message):
    with pytest.raises(UserError, match=message):
        PruningPlan("flux.1", 9, **fields)
    data = PruningPlan("flux.1", 9, single_stream=[1, 3]).to_dict()
    assert PruningPlan.from_dict(data) == PruningPlan("flux.1", 9, single_stream=(1, 3))
    with pytest.raises(UserError, match=r"single_stream: expected dual blocks, which are layers 0 to 3, got \[3, 4\]"):
        pydit.prune(flux(), PruningPlan("flux.1", 9, single_stream=(3, 4)))


def test_text_that_has_no_ffn_of_its_own():
    with pytest.raises(UserError, match="linear_text_ffn: expected blocks whose text has an FFN, got 5, the last of sd3.5"):
        PruningPlan("sd3.5", 7, [(5, 6)], linear_text_ffn=[5])
    with pytest.raises(UserError, match="linear_text_ffn: expected dual blocks, which are layers 0 to 18, got 19, whose text"):
        PruningPlan("flux.1", 57, linear_text_ffn=[18, 19])
    with pytest.raises(UserError, match="linear_text_ffn: expected dual blocks, which are layers 0 to 3, got 4, whose text"):
        pydit.prune(flux(), PruningPlan("flux.1", 9, linear_text_ffn=[4]))


@pytest.mark.filterwarnings("ignore:.*start as the identity")
def test_flux_without_a_text_token():
    batch = tiny.flux_batch()
    batch["encoder_hidden_states"], batch["txt_ids"] = batch["encoder_hidden_states"][:, :0], batch["txt_ids"][:0]
    student = pydit.prune(tiny.flux(), PruningPlan("flux.1", 4, text_linear=[(0, 1)], linear_ffn=[3]))
    with torch.no_grad():
        expected = student(**batch).sample
        assert expected.isfinite().all()
        torch.testing.assert_close(pydit.accelerate(student)(**batch).sample, expected, rtol=1e-4, atol=1e-4)
