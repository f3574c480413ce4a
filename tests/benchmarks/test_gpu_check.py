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

from benchmarks import compare, machine, registry, runner
from pydit.files import read_json

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
# Benchmarks hand over the part that lies ready; one module hangs, another fails; only benchmarks.steps runs for real.
PYTHON = """#!/bin/bash
words="$*"
echo "${words//$'\\n'/ }" >>"$PLACE/calls"
case "$words" in
  "-c import pytest_timeout") exit 1 ;;
  "-c import sys, pydit"*) exit ${IMPORT:-0} ;;
  *benchmarks.steps*) exec "$REAL" "$@" ;;
  *"-m pytest tests/ops"*-n*) echo "1 failed"; exit 1 ;;
  *"--module linear "*) exit 124 ;;
  *"--module collect "*) echo "no diffusers"; exit 2 ;;
  *"--module attention "*) # the first process ends in a case, the second in another, the third gets to the end
    ends=$(($(cat "$PLACE/ends" 2>/dev/null || echo 2) - 1))
    echo $ends >"$PLACE/ends"
    sed "s/.complete.:/'running': 'case $ends', &/" "$PLACE/part.json" | tr "'" '"' >"${@: -1}"
    ((ends < 0)) && cp "$PLACE/part.json" "${@: -1}" || exit 1 ;;
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
    row = runner._row(registry.cases("full")[0], {}) | {"wrong": "worst error"}
    (place / "part.json").write_text(json.dumps(
        {"format": compare.FORMAT, "version": compare.VERSION, "complete": False, "machine": machine.describe("cpu"),
         "limits": {}, "rows": [row], "not_run": []}))

    def call(*options, **variables):
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"),
                       "REAL": sys.executable, "PLACE": str(place), "OUT": str(place / "out" / "run.json"), **variables}
        done = subprocess.run(["bash", str(SCRIPT), *options], env=environment, capture_output=True, text=True, timeout=120)
        written = re.search(r"wrote (\S+)$", done.stdout)
        assert written, done.stdout + done.stderr
        steps = {step["step"]: step["state"] for step in read_json(written[1], what="out")["steps"]}
        return done, (place / "calls").read_text().splitlines(), steps

    call.out = place / "out"
    return call


def test_steps_their_states_and_what_is_left(check):
    done, calls, steps = check(MODULES="modulate linear collect", WITHOUT="math", FILTER="/x", T="32")
    assert done.returncode == 1
    assert steps == {"machine": "passed", "import": "passed", "needs": "passed", "side_stream": "passed", "tests": "failed (1)",
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
    assert "--module modulate --resume --seconds 17 --case-seconds 25 --without math --filter /x --json" in calls[timed[0]]


def test_a_module_goes_on_after_a_case_that_ended_it(check):
    done, calls, steps = check("--no-tests", MODULES="attention modulate", T="60", CASE="9")
    assert done.returncode == 1 and sum("benchmarks.runner" in line for line in calls) == 4
    assert {step: state for step, state in steps.items() if "bench" in step} == {
        "bench_attention": "failed (1)", "bench_attention_2": "failed (1)", "bench_attention_3": "passed",
        "bench_modulate": "passed"}
    assert all("--resume" in line and "--case-seconds 9" in line for line in calls if "benchmarks.runner" in line)
    assert steps["tests"] == steps["racecheck"] == "not run: --no-tests" and not any("pytest tests" in c for c in calls)


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
    """As where the tool says on its output that it has failed: that is no GPU's name."""
    (tmp_path / "nvidia-smi").write_text('#!/bin/bash\necho "NVIDIA-SMI has failed because it could not"\nexit 9\n')
    (tmp_path / "nvidia-smi").chmod(stat.S_IRWXU)
    done = subprocess.run(["bash", str(SCRIPT)], env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}",
                                                      "OUT": str(tmp_path / "out"), "PYTHON": "true"},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "expected a GPU, got none" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("code, begun", [("1", False), ("124", True)])
def test_nothing_is_begun_where_the_gpu_cannot_be_used(check, code, begun):
    """But where its modules are merely slow to load, as from a cold disk."""
    done, calls, steps = check("--no-sanitizer", MODULES="modulate", IMPORT=code)
    assert done.returncode == 1 and steps["import"] == ("out of time" if begun else "failed (1)")
    assert any("benchmarks.runner" in line or "-m pytest" in line for line in calls) == begun
    assert steps["side_stream"] == ("passed" if begun else "not run: import failed")
    assert ("bench_modulate" in steps) == begun


def test_results_that_are_there_are_kept(check):
    for _ in range(2):
        check("--no-tests", MODULES="modulate")
        (check.out / "run.json").write_text("mine")
    assert (check.out / "run.json").read_text() == "mine"
    assert sorted(path.name for path in check.out.iterdir()) == ["run-2.json", "run-2.logs.tar.gz", "run.json",
                                                                 "run.logs.tar.gz"]


def test_steps_join_no_file_that_is_none(check):
    check.out.mkdir()
    (check.out / "run.json").write_text("mine")
    check("--no-tests", "--no-bench")
    assert (check.out / "run.json").read_text() == "mine"
    assert read_json(check.out / "run.steps.json", what="out")["steps"][0]["step"] == "machine"


def test_the_later_visits_have_cases_in_every_module_and_peers_that_there_are():
    """The calls in the script's head."""
    head = SCRIPT.read_text().partition("set -uo")[0]
    second, third = re.findall(r"WITHOUT=(\S+) .*?FILTER=\"?([^\"\n]+?)\"? benchmarks/gpu_check", head, re.S)
    modules = set(registry.families().values())
    for (without, text), names in ((second, modules), (third, {"linear"})):
        assert runner.unwanted_peers(without) == tuple(without.split(","))
        for name in names:
            peers = {peer.name for case in registry.find(text, "full", name) for peer in case.peers}
            assert any("compile" in peer for peer in peers if not any(part in peer for part in without.split(",")))


def test_the_commit_may_come_from_outside(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", "/")
    monkeypatch.delenv("COMMIT", raising=False)
    assert machine._commit() == {"commit": "unknown", "dirty": None}
    monkeypatch.setenv("COMMIT", "abc1234")
    assert machine._commit() == {"commit": "abc1234", "dirty": None}


def test_its_defaults_are_of_the_registry():
    """Every file of cases, and peers that there are."""
    modules, without = (re.search(rf"{name}=\$\{{{name}-([^}}]+)\}}", SCRIPT.read_text())[1]
                        for name in ("MODULES", "WITHOUT"))
    assert sorted(modules.split()) == sorted(set(registry.families().values()))
    assert runner.unwanted_peers(without) == tuple(without.split(","))
