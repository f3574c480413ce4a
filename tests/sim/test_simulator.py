"""The simulator's own tests: C++ programs that launch small kernels, clean and with planted bugs.

The program is built with the host compiler alone, twice: as it is, and with the portable context switch that other
processors use. tests/gates/test_sanitizers.py builds it with AddressSanitizer and UBSan.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.sim import build

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
TESTS = sorted(name for path in SOURCES for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.MULTILINE))

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="no C++ compiler on PATH")


def run(program, *names):
    """Run the named tests (none: all) and return what the program printed."""
    result = subprocess.run([str(program), *names], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build.program(tmp_path_factory, "sim_selftest", SOURCES)


@pytest.mark.parametrize("name", TESTS)
def test_simulator(program, name):
    assert run(program, name) == "1 tests, 0 failed\n"


def test_program_fails_on_an_unknown_test(program):
    result = subprocess.run([str(program), "no_such_test"], capture_output=True, text=True)
    assert result.returncode == 1


@pytest.mark.slow
def test_portable_context_switch(program, tmp_path, tmp_path_factory):
    """All that is known of it elsewhere is an address: one file is compiled anew."""
    fiber = build.ROOT / "csrc/sim/fiber.cpp"
    rest = [part for part in build.runtime(tmp_path_factory) if part.stem != f"{fiber.parent.name}_{fiber.stem}"]
    parts = [*rest, *program.parent.glob("*.o"), *build.objects(tmp_path / "portable", [fiber], "-DPYDIT_SIM_UCONTEXT")]
    build.compile_with([build.COMPILER, "-pthread", *parts, "-o", tmp_path / "sim_selftest"])
    assert "swapcontext" in build.compile_with(["nm", "-u", parts[-1]])
    assert f"{len(TESTS)} tests, 0 failed" in run(tmp_path / "sim_selftest")
