"""A failing simulated case prints the line that runs it again, and that line leads to the same settings."""

import re

pytest_plugins = ["pytester"]

CASE = """
import os
import pytest
from pydit import backend

@pytest.mark.parametrize("case", range(8))
def test_fails(device, case):
    if os.environ["PYDIT_BACKEND"] == "sim":
        pytest.fail("settings " + " ".join(os.environ[f"PYDIT_SIM_{name}"] for name in ("SEED", "ASYNC", "ARCH")))
"""


def test_a_failing_case_prints_its_environment(pytester, request, monkeypatch):
    for name in ("SEED", "ASYNC", "ARCH"):
        monkeypatch.delenv(f"PYDIT_SIM_{name}", raising=False)
    pytester.makeconftest((request.config.rootpath / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = cuda: needs a CUDA device")
    pytester.makepyfile(CASE)
    output = pytester.runpytest_subprocess("-p", "no:cacheprovider").stdout.str()
    pattern = r"PYDIT_BACKEND=sim PYDIT_SIM_SEED=(\d+) PYDIT_SIM_ASYNC=(\w+) PYDIT_SIM_ARCH=(\w+) python -m pytest '(.*)'"
    lines = re.findall(pattern, output)
    assert len(lines) == 8
    assert len({seed for seed, *_ in lines}) == 8 and {copies for _, copies, *_ in lines} == {"lazy", "eager"}
    assert set(re.findall(r"settings (\d+ \w+ \w+)", output)) == {" ".join(line[:3]) for line in lines}
    monkeypatch.setenv("PYDIT_SIM_SEED", "7")
    again = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-k", "sim and 3").stdout.str()
    assert "PYDIT_SIM_SEED=7 " in again and "settings 7 " in again
