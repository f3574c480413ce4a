"""The compatibility run on recorded answers of pip and pytest: what each makes of a cell. Nothing is installed."""

import json
import sys
from pathlib import Path

import pytest

from build_tools import compat

PYTHON = compat.Python("3.11", sys.executable, "3.11.7")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A machine with one Python whose commands answer from ``answers``: the first key found in a command counts."""
    module = tmp_path / "_C.so"
    module.write_bytes(b"module")
    answers = {"import importlib": (0, json.dumps(["2.10.0", "0.39.0", str(module)])),
               "pytest -q": (0, "496 passed, 12 skipped in 88.70s (0:01:28)"), "pip install": (0, ""), "venv": (0, "")}
    commands = []

    def step(command, log, cwd):
        commands.append(" ".join(map(str, command)))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        return next(answer for key, answer in answers.items() if key in commands[-1])

    monkeypatch.setattr(compat, "step", step)
    monkeypatch.setattr(compat, "find_python", lambda name: PYTHON if name == "3.11" else compat.Python(name, reason="none"))
    monkeypatch.setattr(compat.Builds, "wheel", lambda self, python: Path("pydit.whl"))
    monkeypatch.setattr(compat, "digest", lambda: "0" * 64)
    return tmp_path, answers, commands


def run(work, *options):
    return compat.main(["--work", str(work[0] / "work"), "--python", "3.11", *options])


def test_a_cell_that_passes_is_kept_and_its_environment_is_not(work, capsys):
    """In step by default, by the lowest versions of pyproject.toml first; a second run starts nothing."""
    assert run(work) == 0
    printed = capsys.readouterr().out
    assert "3.11.7  2.10.0  0.39.0     passed  496     0" in printed
    assert "Python 3.11.7: one pydit._C (sha256 " in printed and "under torch 2.10.0" in printed
    installs = [command for command in work[2] if "pip install" in command]
    assert [command.split("[demo,train] ")[1] for command in installs] == [
        f"torch=={compat.lowest('torch')} diffusers=={compat.lowest('diffusers')} pytest hypothesis",
        "torch diffusers pytest hypothesis"]
    assert not list((work[0] / "work").rglob("*.venv"))
    work[2].clear()
    assert run(work) == 0 and not work[2]
    assert capsys.readouterr().out.count("passed") == 3  # a column and two cells


@pytest.mark.parametrize(("key", "answer", "code", "expected"), [
    ("pytest -q", (1, "FAILED tests/a.py::test_b - E\n1 failed, 3 passed in 2.1s"), 1,
     "pytest: tests/a.py::test_b - E"),
    ("pytest -q", (2, "ERROR tests/a.py\n1 error in 2.1s"), 1, "pytest: tests/a.py"),
    ("pytest -q", (0, "5 skipped in 2.1s"), 1, "pytest: exit code 0"),
    ("import importlib", (1, "Traceback\nSyntaxError: invalid syntax"), 1, "import: SyntaxError: invalid syntax"),
    ("import importlib", (0, '["2.10.0", "0.39.0", "undefined symbol"]'), 1, "import of pydit._C: undefined symbol"),
    ("pip install", (1, "ERROR: Cannot install a and b\nERROR: ResolutionImpossible: for help"), 1,
     "pip install: ResolutionImpossible"),
    ("pip install", (1, "ERROR: No matching distribution found for torch==9.0"), 2,
     "no torch==9.0 for Python 3.11.7"),
    ("venv", (1, "Error: no space left on device"), 2, "makes no environment: Error: no space left on device"),
])
def test_a_cell_that_does_not_pass(work, capsys, key, answer, code, expected):
    before, work[1][key] = work[1][key], answer
    options = ("--torch", "9.0", "--diffusers", "lowest")
    assert run(work, *options) == code
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("3.11.7 "))
    assert ("failed" if code == 1 else "not run") in row and expected in row
    work[1][key] = before
    assert run(work, *options) == 0  # what did not pass is run again


def test_two_modules_under_one_python_fail(work, capsys):
    assert run(work, "--torch", "2.10", "--diffusers", "0.39") == 0
    (work[0] / "_C.so").write_bytes(b"another")
    assert run(work, "--torch", "2.10", "newest", "--diffusers", "0.39") == 1
    assert "Python 3.11.7: not one pydit._C" in capsys.readouterr().out


def test_a_missing_python_is_listed(work, capsys):
    assert run(work, "--python", "3.11", "3.99", "--torch", "newest", "--diffusers", "newest") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["3.99", "newest", "newest", "not", "run", "0", "0", "0", "none"] in lines
    assert run(work, "--python", "3.99") == 2


def test_list_runs_nothing(work, capsys):
    assert run(work, "--list", "--torch", "2.10", "2.11", "--diffusers", "0.39", "0.40", "--all-pairs") == 0
    assert capsys.readouterr().out.count("to run") == 4
    assert not work[2] and not (work[0] / "work").exists()


@pytest.mark.parametrize(("options", "expected"), [
    (["--torch", ">=2"], "argument --torch: expected a version, lowest or newest, got '>=2'"),
    (["--tests", "pydit"], "argument --tests: expected a path under tests, got 'pydit'"),
    (["--tests", "tests/none.py"], "argument --tests: expected a path under tests, got 'tests/none.py'"),
])
def test_wrong_options(work, capsys, options, expected):
    with pytest.raises(SystemExit, match="2"):
        run(work, *options)
    assert expected in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(work, capsys):
    (work[0] / "work").write_text("a file")
    assert run(work) == 2
    assert "expected a folder to write in, got: Not a directory" in capsys.readouterr().err


def test_pythons(tmp_path, monkeypatch):
    """By path, on PATH past one that does not run, and under PYENV_ROOT; without headers it is none."""
    found = compat.find_python(sys.executable)
    if found.reason:
        assert "Python.h" in found.reason
        pytest.skip(found.reason)
    assert found.version == ".".join(map(str, sys.version_info[:3]))
    shim, pyenv = tmp_path / "bin" / "python3.99", tmp_path / "pyenv" / "versions" / "3.99.1" / "bin" / "python"
    for file, text in ((shim, "exit 127"), (pyenv, f'exec "{sys.executable}" "$@"')):
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    assert compat.find_python("3.99").reason.startswith(f"{shim}: ")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert compat.find_python("3.99").version == found.version
    assert compat.find_python("3.98").reason == "no such interpreter on PATH or under PYENV_ROOT"
    monkeypatch.setattr(compat, "PROBE", 'print(\'["python", "3.99.1", false]\')')
    assert compat.find_python("3.99").reason == f"{pyenv}: its headers (Python.h) are not installed"
