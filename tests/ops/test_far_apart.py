"""Tensors whose elements lie more than 2^31 elements apart, as long sequences of many heads in large batches do."""

import mmap

import pytest
import torch

from pydit import ops

every_kernel = pytest.mark.parametrize("device", ["sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)],
                                       indirect=True)
FAR = (1 << 31) + 64


@pytest.fixture
def spread(device):
    """A function that lays the rows of a tensor so far apart. On a CPU, pages that nobody touches do not exist."""
    if device.type == "cuda":
        room = torch.zeros(2 * FAR, dtype=torch.bfloat16, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        room = torch.frombuffer(mmap.mmap(-1, 2 * FAR * 2, flags=flags), dtype=torch.bfloat16)
    used = [0]

    def lay(x):
        stride = (FAR, *x[0].contiguous().stride())
        y = room.as_strided(x.shape, stride, used[0])
        used[0] += x[0].numel()
        assert used[0] <= FAR and len(x) <= 2
        return y.copy_(x)

    return lay


def draw(*shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device, torch.bfloat16)


@every_kernel
def test_joint_attention_and_its_gradients(spread, device):
    near = [draw(2, tokens, 2, 32, device=device) + i / 8 for i, tokens in enumerate((24, 24, 24, 8, 8, 8))]
    lens = torch.tensor([8, 3], dtype=torch.int32, device=device)
    found = []
    for tensors in (near, [spread(x) for x in near]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        outs = ops.joint_attention(*leaves, txt_lens=lens, return_lse=True)
        sum(out.float().square().sum() for out in outs[:2]).backward()
        found.append([*outs, *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@every_kernel
def test_joint_qk_norm_rope_in_place(spread, device):
    near = [draw(2, tokens, 2, 32, device=device) for tokens in (5, 5, 3, 3)]
    far = [spread(x) for x in near]
    expected = ops.joint_qk_norm_rope(*near, None, None, None)
    ops.joint_qk_norm_rope(*far, None, None, None, out=far)
    assert all(torch.equal(a, b) for a, b in zip(far, expected, strict=True))


@every_kernel
def test_statistics(spread, device):
    x, y = draw(2, 24, device=device), draw(2, 8, device=device)
    for a, b in zip(ops.second_moments(x, y), ops.second_moments(spread(x), spread(y)), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
