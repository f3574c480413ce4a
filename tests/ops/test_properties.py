"""Every public op over whatever shapes, strides and dtypes hypothesis finds: right, or refused in one sentence."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pydit import ops
from pydit.testing import assert_accurate
from tests.ops import properties, test_hsic_matrix, test_second_moments

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
SENTENCE = r"\w+: [\w\[\] .,]+: expected .+, got .+|\w+: expected .+, got .+"


@pytest.fixture(autouse=True)
def own_kernel(monkeypatch):
    """On a GPU too this package's product runs, not the library's."""
    monkeypatch.setenv("PYDIT_GEMM", "pydit")


def each(value, change):
    """Arguments with every tensor in them changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each(part, change) for name, part in value.items()}
    return tuple(each(part, change) for part in value) if isinstance(value, tuple) else value


def scaled(x, factor):
    return x * factor if x.is_floating_point() else x


def plain_of(case, host):
    """Outputs of plain torch, in float64 and in the dtype of the arguments."""
    results = (case.plain(**each(host, lambda x: x.double() if x.is_floating_point() else x)), case.plain(**host))
    return [x if isinstance(x, tuple) else (x,) for x in results]


def assert_right(case, found):
    host = each(case.arguments, lambda x: x.detach().cpu())
    exact, same = plain_of(case, host)
    found = found if isinstance(found, tuple) else (found,)
    assert [x.shape for x in found] == [x.shape for x in exact]
    if any(0 < r.numel() < 16 for r in exact):
        # The largest error of so few values may be next to none, by chance: torch's is that of others like them too.
        others = [plain_of(case, each(host, lambda x, by=1 + number / 32: scaled(x, by))) for number in range(1, 9)]
        more_exact, more = zip(*others, strict=True)
        found, exact, same = ([torch.cat([first[i].cpu().flatten(), *(x[i].flatten() for x in rest)])
                               for i in range(len(exact))]
                              for first, rest in ((found, more), (exact, more_exact), (same, more)))
    for number, (a, r, t) in enumerate(zip(found, exact, same, strict=True)):
        assert a.dtype == t.dtype
        if a.dtype == torch.float32:  # of so few values torch's own largest error may be none, by chance: other tests judge
            a, t = a.bfloat16(), t.bfloat16()
        assert_accurate(a, r, t, name=f"output {number}")


def drawn(name, data, device):
    dtypes = HALF if name == "joint_attention" else DTYPES
    return getattr(properties, name)(properties.Draw(data, data.draw(st.sampled_from(dtypes), "dtype"), device))


def test_every_public_op_is_here():
    others = {"hsic_matrix", "second_moments", "pack_text", "unpack_text"}  # below, with bounds of their own
    assert set(ops.__all__) - {*properties.NAMES, *others, "in_one_launch", "reference"} == set()


@pytest.mark.parametrize("name", properties.NAMES)
@given(data=st.data())
def test_any_arguments_values(device, name, data):
    case = drawn(name, data, device)
    assert_right(case, case.call())


@given(data=st.data())
def test_any_statistics_values(device, data):
    draw = properties.Draw(data, data.draw(st.sampled_from(HALF), "dtype"), device)
    n, d, e = draw.number(0, 40, "n"), draw.number(0, 24, "d"), draw.number(0, 24, "e")
    test_second_moments.check(draw.tensor(n, d), draw.tensor(n, e) if e else None, device)
    n, layers = draw.number(4, 40, "rows"), draw.number(1, 3, "L")
    features = [draw.tensor(n, draw.number(1, 24, "d_l")) for _ in range(layers)]
    hsic = ops.hsic_matrix(features)
    if min(x.stride(0) for x in features) > 0:  # rows that are all alike have an HSIC of 0, exactly
        test_hsic_matrix.check(features)
    for x, row in zip(features, hsic, strict=True):
        assert x.stride(0) > 0 or not row.any()


@given(data=st.data())
def test_packed_text_comes_back(data):
    b, s = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 6))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=b * s, max_size=b * s)), dtype=torch.bool).view(b, s)
    x = properties.Draw(data, torch.float32, "cpu").tensor(b, s, data.draw(st.integers(0, 3)))
    lens, order, packed = ops.pack_text(mask, x)
    assert torch.equal(ops.unpack_text(order, packed), x) and torch.equal(lens, mask.sum(1).int())
    for sample in range(b):
        assert torch.equal(packed[sample, :lens[sample]], x[sample][mask[sample]])


@pytest.mark.parametrize(("order", "x", "error"), [
    (None, torch.zeros(1, 2), TypeError), (torch.zeros(1, 2), torch.zeros(1, 2), TypeError),
    (torch.zeros(2, dtype=torch.int64), torch.zeros(2), TypeError), (torch.zeros(1, 2, dtype=torch.int64), [1], TypeError),
    (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2), ValueError),
    (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3, 4), ValueError),
    (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, device="meta"), ValueError)])
def test_text_that_its_order_does_not_fit(order, x, error):
    with pytest.raises(error) as caught:
        ops.unpack_text(order, x)
    assert re.fullmatch(SENTENCE, str(caught.value))


def _spoil(data, x):
    """(what, x with that wrong)."""
    what = data.draw(st.sampled_from(("type", "integer", "dtype", "device", "layout", "fewer dimensions", "more dimensions",
                                      "another size", "another size", "last stride", "nothing left")), "what is wrong")
    if what == "type":
        return data.draw(st.sampled_from((1.5, "x", [1], object)))
    if what == "integer":
        return x.to(torch.int64)
    if what == "dtype":
        return x.to(torch.float64 if x.dtype != torch.float64 else torch.float32)
    if what == "device":
        return x.to("meta")
    if what == "layout":
        return x.to_sparse()
    if what == "fewer dimensions":
        return x.flatten() if x.ndim > 1 else x.sum()
    if what == "more dimensions":
        return x[None]
    if what == "last stride":
        return x.mT.contiguous().mT if x.ndim > 1 else torch.stack((x, x), 1)[:, 0]
    place = data.draw(st.integers(0, x.ndim - 1))
    size = 0 if what == "nothing left" else x.shape[place] + data.draw(st.sampled_from((1, 2, 7)))
    return x.new_zeros([size if i == place else n for i, n in enumerate(x.shape)])


# What is refused is refused before a backend is chosen.
@pytest.mark.parametrize("device", ["reference", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("name", properties.NAMES)
@given(data=st.data())
def test_mismatches_values(device, name, data):
    """One tensor that does not fit: a TypeError or ValueError of one sentence; whatever is taken all the same is right."""
    case = drawn(name, data, device)
    places = [(key, number) for key, value in case.arguments.items() for number, x in enumerate(
        value if isinstance(value, tuple) else (value,)) if isinstance(x, torch.Tensor)]
    key, number = data.draw(st.sampled_from(places), "argument")
    value = case.arguments[key]
    if isinstance(value, tuple):
        case.arguments[key] = tuple(_spoil(data, x) if i == number else x for i, x in enumerate(value))
    else:
        case.arguments[key] = _spoil(data, value)
    try:
        found = case.call()
    except (TypeError, ValueError) as error:
        assert re.fullmatch(SENTENCE, str(error)), str(error)
        return
    assert_right(case, found)


OTHERS = {"second_moments": lambda x, y: ops.second_moments(x, y),
          "second_moments, shifts": lambda x, y: ops.second_moments(x, shift_x=y),
          "hsic_matrix": lambda x, y: ops.hsic_matrix((x, y)),
          "hsic_matrix, features": lambda x, _y: ops.hsic_matrix(x),
          "pack_text": lambda x, y: ops.pack_text(x, y), "unpack_text": lambda x, y: ops.unpack_text(x, y),
          "merge_attention, outs": lambda x, y: ops.merge_attention(x, (y,)),
          "merge_attention, lses": lambda x, y: ops.merge_attention((x,), y)}


@pytest.mark.parametrize("device", ["reference"], indirect=True)
@pytest.mark.parametrize("name", OTHERS)
@given(data=st.data())
def test_mismatches_of_the_others_values(device, name, data):
    """As above, of ops whose values are not compared here: they are refused in one sentence, or run."""
    x, y = (torch.ones(4, 3) for _ in range(2))
    if "text" in name:
        x, y = (torch.ones(4, 3, dtype=torch.bool) if name == "pack_text" else torch.zeros(4, 3, dtype=torch.int64)), x
    if "shifts" in name:
        y = torch.ones(3)
    if "attention" in name:
        x, y = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 2)
    if data.draw(st.booleans(), "the first"):
        x = _spoil(data, x)
    else:
        y = _spoil(data, y)
    try:
        OTHERS[name](x, y)
    except (TypeError, ValueError) as error:
        assert re.fullmatch(SENTENCE, str(error)), str(error)


@given(data=st.data())
def test_outputs_in_any_memory_values(device, data):
    """out= in place, in new memory, and where it may not be: on another input, on itself, shifted by an element.

    Memory is memory: whether it comes as a view or by DLPack, as a storage of its own.
    """
    draw = properties.Draw(data, data.draw(st.sampled_from(DTYPES), "dtype"), device)
    b, s, h, d = draw.number(1, 2, "B"), draw.number(1, 4, "S"), draw.number(1, 2, "H"), 2 * draw.number(1, 8, "D/2")
    together = torch.randn(b, s, 3, h, d + 1, generator=draw.generator).to(device, draw.dtype)
    q, k = together[:, :, 0, :, :d], together[:, :, 1, :, :d]
    places = {"q": q, "k": k, "v": together[:, :, 2, :, :d], "new": torch.empty_like(q).contiguous(),
              "shifted": together[:, :, 0, :, 1:], "expanded": torch.empty_like(q)[:1, :1].expand(b, s, h, d),
              "other strides": torch.empty(s, b, h, d, dtype=q.dtype, device=device).transpose(0, 1)}
    places |= {f"{name} by DLPack": torch.from_dlpack(places[name]) for name in ("q", "k", "v", "shifted")}
    first, second = (data.draw(st.sampled_from(list(places)), name) for name in ("out[0]", "out[1]"))
    case = properties.Case(ops.qk_norm_rope, {"q": q.clone(), "k": k.clone(), "q_weight": None, "k_weight": None,
                                              "freqs": None}, None)
    expected = case.call()
    one, two = (name.removesuffix(" by DLPack") for name in (first, second))
    legal = one in ("q", "v", "new", "other strides") and two in ("k", "v", "new", "other strides") and one != two
    alone = b * s == 1  # of one token nothing is repeated
    try:
        found = ops.qk_norm_rope(q, k, None, None, None, out=(places[first], places[second]))
    except ValueError as error:
        assert re.fullmatch(SENTENCE, str(error)), str(error)
        assert not legal, (first, second)
        return
    assert legal or alone, (first, second)
    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
