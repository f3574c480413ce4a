"""The simulated kernels under AddressSanitizer and UBSan, what the tests execute of them, and proof that both
sanitizers would speak up.

The build goes to ``build/sanitize``. By hand: ``python -m build_tools.sanitize``, and ``python -m build_tools.coverage``
for the table.
"""

import subprocess
import sys

import pytest

from build_tools import cmake, coverage, sanitize

pytestmark = pytest.mark.slow

# Tensors that lie to the binding, which asks for nothing but shape, strides and address.
PLANTED = """
import torch
from pydit import backend
module, error = backend.extension()
class Lie:
    def __init__(self, tensor, tokens, offset=0):
        self.tensor, self.shape, self.offset = tensor, (1, tokens, 8), offset
    def data_ptr(self):
        return self.tensor.data_ptr() + self.offset
    def stride(self):
        return (8 * self.shape[1], 8, 1)
def run(tokens, offset):
    x, gate = torch.zeros(1, 3, 8), torch.zeros(1, 1, 8)
    out = torch.zeros(1, 64, 8)
    module.sim.gated_residual(Lie(x, tokens, offset), Lie(out, tokens), gate, Lie(out, tokens), -1, False, 0, 0)
    print("ran to its end")
"""


@pytest.fixture(scope="module")
def environment():
    try:
        return sanitize.environment(sanitize.build(cmake.BUILD / "sanitize"))
    except cmake.MissingTool as error:
        pytest.skip(str(error))


def _planted(environment, call):
    return subprocess.run([sys.executable, "-c", PLANTED + call], cwd=cmake.ROOT, env=environment, capture_output=True,
                          text=True)


def test_an_honest_call_is_silent(environment):
    result = _planted(environment, "run(tokens=3, offset=0)")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran to its end\n", "")


def test_a_planted_read_past_a_tensor_is_found(environment):
    result = _planted(environment, "run(tokens=4, offset=0)")
    assert result.returncode != 0 and "ran to its end" not in result.stdout
    assert "heap-buffer-overflow" in result.stderr and "modulate_kernel" in result.stderr


def test_a_planted_misaligned_access_is_found(environment):
    result = _planted(environment, "run(tokens=2, offset=2)")
    assert result.returncode != 0 and "ran to its end" not in result.stdout
    assert "misaligned address" in result.stderr and "vector.cuh" in result.stderr


def test_the_simulator_is_clean(environment):
    """Its own tests, but for those of memory faults: a sanitizer takes those for itself."""
    program = sanitize.program(cmake.BUILD / "sanitize", "selftest", (cmake.ROOT / "tests/sim").glob("*.cpp"))
    result = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    assert ", 0 failed" in result.stdout


def test_ops_are_clean_and_execute_the_kernels(environment, capsys):
    """No report, every __global__ and __device__ function, and 95 % of the lines."""
    status = coverage.main([])
    captured = capsys.readouterr()
    assert status == 0, captured.out + captured.err
