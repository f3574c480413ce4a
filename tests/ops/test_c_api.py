"""The C API behind the ops: what a caller without pydit/ops in front is told, and what a dying kernel leaves behind."""

import pytest
import torch

from pydit import backend


class Shaped:
    """What the binding asks of a tensor, without memory behind it."""

    def __init__(self, *shape, pointer=1 << 20):
        self.shape, self.pointer = shape, pointer

    def data_ptr(self):
        return self.pointer

    def stride(self):
        return tuple(0 if size > 1 << 20 else 64 for size in self.shape)


@pytest.fixture(params=["sim", "cuda"])
def kernels(request):
    """A backend's functions. Arguments are checked before anything is launched, so cuda needs no GPU."""
    module, error = backend.extension()
    if not hasattr(module, request.param):
        pytest.skip(f"no {request.param} kernels in pydit._C ({error or 'not built'})")
    return getattr(module, request.param)


def _modulate(kernels, shape, dtype=0):
    x, row = Shaped(*shape), Shaped(shape[0], 1, shape[2])
    kernels.ada_layer_norm(x, row, row, x, 1e-6, -1, dtype, 0)


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 2, 0), "channels: expected 1 to 8192, got 0"),
    ((1, 2, 8193), "channels: expected 1 to 8192, got 8193"),
    ((-1, 2, 8), "batch x tokens: expected 0 to 2^31 - 1, got -1 x 2"),
    ((2, 1 << 30, 8), "batch x tokens: expected 0 to 2^31 - 1, got 2 x 1073741824"),
    ((1 << 62, 1 << 62, 8), "batch x tokens: expected 0 to 2^31 - 1, got 4611686018427387904 x 4611686018427387904"),
], ids=str)
def test_modulate_arguments(kernels, shape, message):
    with pytest.raises(RuntimeError) as caught:
        _modulate(kernels, shape)
    assert str(caught.value) == f"ada_layer_norm: {message}"


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 2, 3, 7), "head_dim: expected an even number from 2 to 256, got 7"),
    ((1, 2, 3, 258), "head_dim: expected an even number from 2 to 256, got 258"),
    ((1 << 31, 2, 3, 8), "batch: expected 0 to 2^31 - 1, got 2147483648"),
    ((1, 1 << 31, 3, 8), "tokens: expected 0 to 2^31 - 1, got 2147483648"),
], ids=str)
def test_qk_norm_rope_arguments(kernels, shape, message):
    x = Shaped(*shape)
    with pytest.raises(RuntimeError) as caught:
        kernels.qk_norm_rope(x, x, None, None, None, None, x, x, 1e-6, 0, 0)
    assert str(caught.value) == f"qk_norm_rope: {message}"


def _attend(kernels, image, text, scale=1.0, dtype=2):
    i, t = Shaped(*image), Shaped(*text)
    kernels.joint_attention(i, i, i, t, t, t, None, i, t, None, None, scale, dtype, 0)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(image=(1, 2, 3, 48)), "head_dim: expected 32, 64 or 128, got 48"),
    (dict(image=(1, 1 << 31, 3, 64)), "tokens: expected 0 to 2^30, got 2147483648"),
    (dict(image=(-1, 2, 3, 64)), "batch, heads: expected 0 or more, got -1, 3"),
    (dict(image=(1, 2, 3, 64), scale=0.0), "scale: expected more than 0, got 0"),
    (dict(image=(1, 2, 3, 64), scale=float("nan")), "scale: expected more than 0, got nan"),
    (dict(image=(1, 2, 3, 64), dtype=0), "dtype: expected float16 (1) or bfloat16 (2), got 0"),
    (dict(image=(1 << 30, 200, 4, 64)), "expected at most 2^31 - 1 tiles, got more")], ids=str)
def test_joint_attention_arguments(kernels, arguments, message):
    with pytest.raises(RuntimeError) as caught:
        _attend(kernels, **{"text": (1, 2, 3, 64), **arguments})
    assert str(caught.value) == f"joint_attention: {message}"


@pytest.mark.parametrize(("image", "scale", "dtype", "message"), [
    ((1, 2, 3, 48), 1.0, 2, "head_dim: expected 32, 64 or 128, got 48"),
    ((1, 1 << 31, 3, 64), 1.0, 2, "tokens: expected 0 to 2^30, got 2147483648"),
    ((-1, 2, 3, 64), 1.0, 2, "batch, heads: expected 0 or more, got -1, 3"),
    ((1, 2, 3, 64), 0.0, 2, "scale: expected more than 0, got 0"),
    ((1, 2, 3, 64), float("nan"), 2, "scale: expected more than 0, got nan"),
    ((1, 2, 3, 64), 1.0, 0, "dtype: expected float16 (1) or bfloat16 (2), got 0")], ids=str)
def test_joint_attention_backward_arguments(kernels, image, scale, dtype, message):
    i, t = Shaped(*image), Shaped(1, 2, 3, 64)
    with pytest.raises(RuntimeError) as caught:
        kernels.joint_attention_backward((i, i, i, t, t, t), None, (i, t), (i, t), (i, t), (i, t), (i, i, i, t, t, t),
                                         scale, False, Shaped, dtype, 0)
    assert str(caught.value) == f"joint_attention_backward: {message}"


@pytest.mark.parametrize(("image", "text", "message"), [
    ((1, 2, 3, 8), (1, 2, 4, 8), "expected the same batch, heads, head_dim, dtype and stream for both streams"),
    ((1, (1 << 31) - 1, 3, 8), (1, 2, 3, 8),
     "tokens: expected at most 2^31 - 1 in both streams together, got 2147483649"),
    ((1, 2, 3, 8), (1, 2, 3, 7), "head_dim: expected an even number from 2 to 256, got 7")], ids=str)
def test_joint_qk_norm_rope_arguments(kernels, image, text, message):
    i, t = Shaped(*image), Shaped(*text)
    with pytest.raises(RuntimeError) as caught:
        kernels.joint_qk_norm_rope(i, i, t, t, (None,) * 4, None, None, None, None, (i, i, t, t), 1e-6, 0, 0)
    assert str(caught.value) == f"joint_qk_norm_rope: {message}"


@pytest.mark.parametrize(("tokens", "message"), [
    ((1 << 31) - 255, "tokens of layer 1: expected 0 to 2^31 - 256, got 2147483393"),
    ((1 << 31) - 256, "features of layer 1: expected 1 to 2^24, got 0")])  # so many are none too many
def test_grouped_linear_tokens(kernels, tokens, message):
    """The last tile's rows begin below 2^31 too."""
    def layer(tokens, features):
        return Shaped(1, tokens, features), Shaped(8, features), None, None, None, -1, None, None, None, 0, Shaped(1, tokens, 8)

    with pytest.raises(RuntimeError) as caught:
        kernels.grouped_linear([layer(3, 8), layer(tokens, 0)], 0, 0.0, Shaped, 0, 1, 2, 0)
    assert str(caught.value) == f"grouped_linear: {message}"


def test_cosine_needs_its_sine(kernels):
    x = Shaped(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match="qk_norm_rope: cos, sin: expected both or neither, got one"):
        kernels.qk_norm_rope(x, x, None, None, Shaped(2, 4), None, x, x, 1e-6, 0, 0)


def test_unknown_dtype(kernels):
    with pytest.raises(RuntimeError) as caught:
        _modulate(kernels, (1, 2, 8), dtype=3)
    assert str(caught.value) == "ada_layer_norm: dtype: expected float32 (0), float16 (1) or bfloat16 (2), got 3"


def test_a_simulated_kernel_that_dies_raises_and_the_next_launch_works():
    module, error = backend.extension()
    if not hasattr(module, "sim"):
        pytest.skip(f"the simulator is not built ({error or 'PYDIT_SIM=off'})")
    nowhere = Shaped(1, 2, 8, pointer=16)
    with pytest.raises(RuntimeError, match=r"gated_residual: launch failed: .*modulate_kernel"):
        module.sim.gated_residual(nowhere, nowhere, Shaped(1, 1, 8, pointer=16), nowhere, -1, False, 0, 0)
    x = torch.arange(16.0).view(1, 2, 8)
    gate, out = torch.full((1, 1, 8), 2.0), torch.empty_like(x)
    module.sim.gated_residual(x, x, gate, out, -1, False, 0, 0)
    assert torch.equal(out, 3 * x)
