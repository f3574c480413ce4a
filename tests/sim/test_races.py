"""The race detector: 17 planted bugs that must be reported, their clean twins that must not, and every kernel test.

The kernels are compiled with -fsanitize=thread, whose calls csrc/sim/race_observe.cpp takes; the sanitizer's own library
is not linked. See csrc/sim/race.h.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).parent / "races" / "sim_races.cpp"
TESTS = re.findall(r"^TEST\((\w+)\)", CASES.read_text(), re.MULTILINE)
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread", "-DPYDIT_SIM",
         "-DPYDIT_SIM_RACE", f"-I{ROOT / 'csrc'}"]
OBSERVED = ["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"]
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ on PATH")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("races")
    objects = []
    for source in [*sorted((ROOT / "csrc" / "sim").glob("*.cpp")), CASES]:
        objects.append(folder / f"{source.stem}.o")
        extra = OBSERVED if source == CASES else []
        compiled = subprocess.run([COMPILER, *FLAGS, *extra, "-c", source, "-o", objects[-1]], capture_output=True,
                                  text=True)
        assert compiled.returncode == 0, compiled.stderr
    # The runtime's objects come first, so that inline functions of both are taken from them, unobserved.
    subprocess.run([COMPILER, *objects, "-pthread", "-ldl", "-o", folder / "races"], check=True)
    return folder / "races"


def test_enough_bugs_are_planted():
    assert len(TESTS) >= 16


@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize("name", TESTS)
def test_planted_bug_and_clean_twin(program, name, copies):
    result = subprocess.run([str(program), name], capture_output=True, text=True, timeout=120,
                            env={"PATH": "/usr/bin:/bin", "PYDIT_SIM_ASYNC": copies})
    assert result.returncode == 0, f"PYDIT_SIM_ASYNC={copies} {program} {name}\n{result.stderr}{result.stdout}"
    assert result.stdout == "1 tests, 0 failed\n"
