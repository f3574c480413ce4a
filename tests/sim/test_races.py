"""The race detector: planted bugs that must be reported, their clean twins that must not, and every kernel test.

The kernels are compiled with -fsanitize=thread, whose calls csrc/sim/race_observe.cpp takes; the sanitizer's own library
is not linked. See csrc/sim/race.h.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sim import build

HERE = Path(__file__).parent
CASES = sorted((HERE / "races").glob("*.cpp"))
TESTS = [name for path in CASES for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.MULTILINE)]
FLAGS = ["-g1", "-DPYDIT_SIM_RACE"]
COMPILER = shutil.which("g++")  # the calls of its -fsanitize=thread are known
OBSERVED = ["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1", "-fno-tree-sra"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ on PATH")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    """The simulator's own objects, which are not observed."""
    folder = tmp_path_factory.mktemp("races")
    return folder, build.objects(folder, sorted((build.ROOT / "csrc/sim").glob("*.cpp")), *FLAGS, compiler=COMPILER)


def linked(runtime, name, *sources):
    folder, objects = runtime
    # The runtime's objects come first, so that inline functions of both are taken from them, unobserved.
    objects = [*objects, *build.objects(folder, sources, *FLAGS, *OBSERVED, compiler=COMPILER)]
    build.compile_with([COMPILER, *objects, "-pthread", "-ldl", "-o", folder / name])
    return folder / name


@pytest.fixture(scope="module")
def program(runtime):
    return linked(runtime, "races", *CASES)


@pytest.fixture(scope="module")
def products(runtime):
    """The matrix products of test_ptx.py, observed."""
    return linked(runtime, "products", HERE / "ptx" / "test_gemm.cpp")


def test_enough_bugs_are_planted():
    assert len(TESTS) >= 16


@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize("name", TESTS)
def test_planted_bug_and_clean_twin(program, name, copies):
    result = subprocess.run([str(program), name], capture_output=True, text=True, timeout=120,
                            env={"PATH": "/usr/bin:/bin", "PYDIT_SIM_ASYNC": copies})
    assert result.returncode == 0, f"PYDIT_SIM_ASYNC={copies} {program} {name}\n{result.stderr}{result.stdout}"
    assert result.stdout == "1 tests, 0 failed\n"


@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize("name", ["gemm_by_mma_sync", "gemm_by_wgmma_swizzle_128", "gemm_by_wgmma_without_swizzle",
                                  "gemm_by_wgmma_wide", "gemm_by_wgmma_for_several_seeds"])
def test_products_with_asynchronous_operands_are_silent(products, name, copies):
    result = subprocess.run([str(products), name], capture_output=True, text=True, timeout=120,
                            env={"PATH": "/usr/bin:/bin", "PYDIT_SIM_ASYNC": copies})
    assert result.returncode == 0, f"PYDIT_SIM_ASYNC={copies} {products} {name}\n{result.stderr}{result.stdout}"


@pytest.mark.parametrize("name", ["bug_wrong_wait_depth", "bug_missing_syncthreads_between_stages"])
def test_bugs_that_only_some_orders_show_always_fail_a_launch(products, name):
    """Unobserved these launches succeed, with wrong numbers in some orders; the detector ends every one of them."""
    result = subprocess.run([str(products), name], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "expected 0, got 719" in result.stderr
