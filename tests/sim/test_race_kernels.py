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

# Loaded: x (and y) once; gate, scale and shift once per token, from cache on a GPU. Stored: each output once.
COUNT = """
import json, torch
from pydit import backend, ops
module, _ = backend.extension()
assert module.sim.race_build
b, s, c = 2, 3, 96
x, y = (torch.randn(b, s, c).bfloat16() for _ in range(2))
gate, scale, shift = (torch.randn(b, c).bfloat16() for _ in range(3))
size = x.numel() * 2
found = {}
def count(name, run):
    run()
    counts = module.sim.counters()
    found[name] = [counts["global_loaded"] / size, counts["global_stored"] / size]
count("ada_layer_norm", lambda: ops.ada_layer_norm(x, scale, shift))
count("gated_residual", lambda: ops.gated_residual(x, y, gate))
count("gated_residual_ada_layer_norm", lambda: ops.gated_residual_ada_layer_norm(x, y, gate, scale, shift))
q, k = (torch.randn(2, 4, 3, 32).bfloat16() for _ in range(2))
size = 2 * q.numel() * 2
count("qk_norm_rope", lambda: ops.qk_norm_rope(q, k, None, None, None))
print(json.dumps(found))
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


def test_global_bytes_match_the_model(environment):
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"ada_layer_norm": [3, 1], "gated_residual": [3, 1],
                                       "gated_residual_ada_layer_norm": [5, 2], "qk_norm_rope": [1, 1]}
