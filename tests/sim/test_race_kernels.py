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
    beyond = case.beyond and [case.beyond.bytes, case.beyond.flops]
    print(json.dumps([case.name, case.work.bytes, case.work.flops, beyond, module.sim.counters()]))
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


# Every op with late copies and with early ones, each with one of its dtypes. Left out: what asks the same shapes once
# more for other numbers, which no race depends on.
@pytest.mark.parametrize(("seed", "copies", "left_out"), [(0, "lazy", "dtype1"), (1, "eager", "dtype0")])
def test_kernels_are_free_of_races(environment, seed, copies, left_out):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops", "-k",
               "sim and (values or layouts or split or expanded or gradients) and not (run_to_run or any_shape or extreme) "
               f"and not {left_out}"]
    settings = {"PYDIT_SIM_SEED": str(seed), "PYDIT_SIM_ASYNC": copies}
    done = subprocess.run(command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True,
                          timeout=600)
    line = " ".join(f"{name}={value}" for name, value in settings.items())
    assert done.returncode == 0, (f"PYDIT_EXTENSION={environment['PYDIT_EXTENSION']} PYDIT_BACKEND=sim {line} "
                                  f"{' '.join(command)}\n{done.stdout[-4000:]}")
    assert " passed" in done.stdout


def counts(environment, arch):
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, env={**environment, "PYDIT_SIM_ARCH": arch},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


def test_counts_match_the_models_of_the_benchmarks(environment):
    """A kernel that reads a tensor once more than its case says, or multiplies more, fails."""
    modelled = 0
    for name, (size, flops, beyond, found) in counts(environment, "80").items():
        assert found["bank_conflicts"] <= 0.05 * found["shared_requests"], (name, found)
        if beyond is None:
            continue
        modelled += 1
        assert found["global_loaded"] + found["global_stored"] == pytest.approx(size + beyond[0], rel=0.05), name
        if found["tensor_ops"]:
            assert 2 * found["tensor_ops"] == pytest.approx(flops + beyond[1], rel=0.05), name
    assert modelled >= 5


def test_the_hopper_kernel_reads_what_its_model_says(environment):
    """At D = 128 its tiles have as many queries as the portable kernel's, so it reads keys and values as often."""
    size, _, beyond, found = counts(environment, "90a")["joint_attention/tiny/1x200+40x1x128/bf16"]
    assert found["global_loaded"] + found["global_stored"] == pytest.approx(size + beyond[0], rel=0.05)
    assert found["bank_conflicts"] == 0
