"""The instructions of csrc/device/ptx.cuh: in the simulator against independent references, and through nvcc.

The kernels under tests/sim/ptx are the shapes real ones have. g++ builds them with the simulator into one program;
nvcc must compile the same kernels for sm_80 (the portable ones) and sm_90a (all).
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sim import build

ROOT = build.ROOT
PTX = Path(__file__).parent / "ptx"
SOURCES = sorted(PTX.glob("*.cpp"))
TESTS = sorted(name for path in SOURCES for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.M))
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if build.COMPILER is None:
        pytest.skip("no C++ compiler on PATH")
    return build.program(tmp_path_factory, "sim_ptx", SOURCES)


@pytest.mark.parametrize("name", TESTS)
def test_instruction(program, name):
    result = subprocess.run([str(program), name], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout == "1 tests, 0 failed\n"


@pytest.mark.parametrize(("setting", "value"), [("PYDIT_SIM_ASYNC", "eager"), ("PYDIT_SIM_ARCH", "90a")])
def test_settings_are_read_from_the_environment(program, setting, value):
    result = subprocess.run([str(program), f"environment_{setting.lower()}"], capture_output=True, text=True,
                            env={setting: value, "EXPECTED": value})
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_nvcc_compiles_the_same_kernels(arch, tmp_path):
    source = PTX / f"instances_{arch[:2]}.cu"
    log = build.compile_with([NVCC, "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-I", ROOT / "csrc",
                        "-Xptxas", "-v", "-cubin", "-o", tmp_path / "kernels.cubin", source])
    assert "Compiling entry function" in log
    # ptxas only mentions a wgmma it serialised (C7510 to C7519) or a register budget it ignored (C7508).
    assert not re.findall(r"\(C75\d\d\).*", log)
    assert not re.findall(r"[1-9]\d* bytes spill.*", log)
