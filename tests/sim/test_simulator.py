"""The simulator's own tests: C++ programs that launch small kernels, clean and with planted bugs.

The program is built with the host compiler alone, twice: as it is, and with the portable context switch that other
processors use. tests/gates/test_sanitizers.py builds it with AddressSanitizer and UBSan.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(Path(__file__).parent.glob("*.cpp")) + sorted((ROOT / "csrc" / "sim").glob("*.cpp"))
TESTS = sorted(name for path in SOURCES for name in re.findall(r"^TEST\((\w+)\)", path.read_text(), re.MULTILINE))
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror",
         "-pthread", "-DPYDIT_SIM"]
COMPILER = shutil.which("c++") or shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on PATH")


def build(program, *flags):
    """Compile the self test into ``program`` and return that path."""
    command = [COMPILER, *FLAGS, *flags, "-I", ROOT / "csrc", *SOURCES, "-o", program]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return program


def run(program, *names):
    """Run the named tests (none: all) and return what the program printed."""
    result = subprocess.run([str(program), *names], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sim") / "sim_selftest")


@pytest.mark.parametrize("name", TESTS)
def test_simulator(program, name):
    assert run(program, name) == "1 tests, 0 failed\n"


def test_program_fails_on_an_unknown_test(program):
    result = subprocess.run([str(program), "no_such_test"], capture_output=True, text=True)
    assert result.returncode == 1


@pytest.mark.slow
def test_portable_context_switch(tmp_path):
    assert f"{len(TESTS)} tests, 0 failed" in run(build(tmp_path / "sim_selftest", "-DPYDIT_SIM_UCONTEXT"))
