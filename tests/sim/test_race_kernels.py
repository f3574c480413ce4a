"""The project's kernels in a race build of the extension: the op tests stay silent, and bytes match the kernels' model.

The build goes to ``build/race`` and is reused. To run any test under the detector by hand:
``PYDIT_EXTENSION=build/race/_C<suffix> PYDIT_BACKEND=sim pytest tests/ops -k sim``.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")]

COUNT = """
import json
from benchmarks import registry
from pydit import backend
module, _ = backend.extension()
assert module.sim.race_build
for case in registry.cases("small"):
    case.run(*case.make("cpu"))
    print(json.dumps([case.name, case.work.bytes, case.work.flops, case.reread, module.sim.counters()]))
"""


@pytest.fixture(scope="module")
def environment():
    folder = Path(os.environ.get("PYDIT_RACE_BUILD", ROOT / "build" / "race"))
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on PATH")
    for command in (["cmake", "-S", ROOT, "-B", folder, "-DPYDIT_CUDA=off", "-DPYDIT_SIM_RACE=on",
                     f"-DPython_EXECUTABLE={sys.executable}"], ["cmake", "--build", folder]):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    extension = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return {**os.environ, "PYDIT_EXTENSION": str(extension), "PYDIT_BACKEND": "sim"}


@pytest.mark.parametrize(("seed", "copies"), [(0, "lazy"), (1, "eager")])
def test_kernels_are_free_of_races(environment, seed, copies):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops", "-k",
               "sim and (values or layouts or split or expanded)"]
    settings = {"PYDIT_SIM_SEED": str(seed), "PYDIT_SIM_ASYNC": copies}
    done = subprocess.run(command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True,
                          timeout=600)
    line = " ".join(f"{name}={value}" for name, value in settings.items())
    assert done.returncode == 0, (f"PYDIT_EXTENSION={environment['PYDIT_EXTENSION']} PYDIT_BACKEND=sim {line} "
                                  f"{' '.join(command)}\n{done.stdout[-4000:]}")
    assert " passed" in done.stdout


def test_counts_match_the_models_of_the_benchmarks(environment):
    """A kernel that reads a tensor once more than its case says, or multiplies more than 5 % too much, fails."""
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modelled = 0
    for name, size, flops, reread, counts in map(json.loads, done.stdout.splitlines()):
        if reread is not None:
            modelled += 1
            assert counts["global_loaded"] + counts["global_stored"] == pytest.approx(size + reread, rel=0.05), name
        if counts["tensor_ops"]:
            assert 2 * counts["tensor_ops"] == pytest.approx(flops, rel=0.05), name
        assert counts["bank_conflicts"] <= 0.05 * counts["shared_requests"], (name, counts)
    assert modelled >= 4
