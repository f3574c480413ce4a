"""benchmarks/gpu_check.sh without a GPU: stand-ins for the tools, of which Python's logs what it is asked for."""

import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import compare, registry, runner
from pydit.files import read_json

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
# Benchmarks hand over the part that lies ready; one module hangs, another fails; only benchmarks.steps runs for real.
PYTHON = """#!/bin/bash
words="$*"
echo "${words//$'\\n'/ }" >>"$PLACE/calls"
case "$words" in
  "-c import pytest_timeout") exit 1 ;;
  *benchmarks.steps*) exec "$REAL" "$@" ;;
  *"-m pytest tests/ops"*-n*) echo "1 failed"; exit 1 ;;
  *"--module linear "*) exit 124 ;;
  *"--module collect "*) echo "no diffusers"; exit 2 ;;
  *benchmarks.runner*) cp "$PLACE/part.json" "${@: -1}" ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script; returns the process, the calls of Python and the steps by name."""
    place, tools = tmp_path / "place", tmp_path / "tools"
    place.mkdir()
    tools.mkdir()
    for name, text in {"nvidia-smi": "#!/bin/bash\necho NVIDIA H200\n", "python": PYTHON,
                       "timeout": '#!/bin/bash\nshift 3\nexec "$@"\n',  # its exit code comes from the command
                       "compute-sanitizer": '#!/bin/bash\nwhile [ "$1" != "$PYTHON" ]; do shift; done\n"$@"\n'}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(stat.S_IRWXU)
    row = {"case": registry.cases("full")[0].name, "wrong": "worst error"}
    (place / "part.json").write_text(json.dumps(
        {"format": compare.FORMAT, "version": compare.VERSION, "complete": False, "machine": {"device": "NVIDIA H200"},
         "limits": {}, "rows": [row], "not_run": []}))

    def call(*options, **variables):
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"),
                       "REAL": sys.executable, "PLACE": str(place), "OUT": str(place / "out" / "run.json"), **variables}
        done = subprocess.run(["bash", str(SCRIPT), *options], env=environment, capture_output=True, text=True, timeout=120)
        steps = {step["step"]: step["state"] for step in read_json(place / "out" / "run.json", what="out")["steps"]}
        return done, (place / "calls").read_text().splitlines(), steps

    call.out = place / "out"
    return call


def test_steps_their_states_and_what_is_left(check):
    done, calls, steps = check(MODULES="modulate linear collect", WITHOUT="math", FILTER="/x", T="32")
    assert done.returncode == 1
    assert steps == {"machine": "passed", "import": "passed", "side_stream": "passed", "tests": "failed (1)",
                     "other_tests": "passed", "memcheck": "passed", "racecheck": "passed", "bench_modulate": "passed",
                     "bench_linear": "out of time", "bench_collect": "failed (2)"}
    assert sorted(path.name for path in check.out.iterdir()) == ["run.json", "run.logs.tar.gz"]
    with tarfile.open(check.out / "run.logs.tar.gz") as logs:
        assert {"run.logs/tests.log", "run.logs/modulate.json", "run.logs/steps.tsv"} <= set(logs.getnames())
    data = compare.load(check.out / "run.json")
    assert len(data["rows"]) == 1 and len(data["not_run"]) == len(registry.cases("full")) - 1 and not data["complete"]
    asked = [line for line in calls if "pytest tests/" in line]
    assert sum("-n 8" in line for line in asked) == 2 and not any("--timeout" in line for line in asked)
    timed = [i for i, line in enumerate(calls) if "benchmarks.runner" in line]
    assert min(timed) > max(i for i, line in enumerate(calls) if "-m pytest" in line)  # nothing runs beside them
    assert "--module modulate --seconds 17 --without math --filter /x --json" in calls[timed[0]]


def test_steps_can_be_left_out(check):
    done, calls, steps = check("--no-sanitizer", "--no-bench")
    assert done.returncode == 1 and steps["bench"] == "not run: --no-bench" and steps["tests"] == "failed (1)"
    assert steps["memcheck"] == steps["racecheck"] == "not run: --no-sanitizer"
    assert not any("benchmarks.runner" in line for line in calls)


def test_no_module_begins_that_could_not_end(check):
    done, calls, steps = check(MODULES="modulate linear", LIMIT="25")
    assert done.returncode == 1 and steps["bench_modulate"] == steps["bench_linear"] == "out of time"
    assert not any("benchmarks.runner" in line for line in calls)


def test_without_a_gpu_it_says_so(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(stat.S_IRWXU)
    done = subprocess.run(["bash", str(SCRIPT)], env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "expected a GPU, got none" in done.stderr


def test_its_defaults_are_of_the_registry():
    """Every file of cases, and peers that there are."""
    modules, without = (re.search(rf"{name}=\$\{{{name}-([^}}]+)\}}", SCRIPT.read_text())[1]
                        for name in ("MODULES", "WITHOUT"))
    assert sorted(modules.split()) == sorted(set(registry.families().values()))
    assert runner._unwanted_peers(without) == tuple(without.split(","))
