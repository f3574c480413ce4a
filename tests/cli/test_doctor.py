"""pydit doctor: works whatever is missing, and says what that costs."""

import json
import subprocess
import sys

import pytest

from pydit import doctor
from pydit.cli import main


def _doctor_without(*blocked):
    """`pydit doctor --json` in a process where some modules cannot be imported -> (exit code, findings by name)."""
    code = ("import sys\nfor name in sys.argv[1:]: sys.modules[name] = None\n"
            "from pydit.cli import main\nsys.exit(main(['doctor', '--json']))")
    result = subprocess.run([sys.executable, "-c", code, *blocked], capture_output=True, text=True, check=False)
    assert result.stderr == ""
    report = json.loads(result.stdout)
    return result.returncode, report, {check["name"]: check for check in report["checks"]}


def test_here(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "torch", "diffusers", "pydit._C", "GPU", "nvcc", "C++ compiler", "demo teacher"):
        assert name in text
    assert "Ready" in text


def test_every_missing_thing_has_a_cost():
    for check in doctor.examine():
        assert check.status in ("ok", "missing", "problem")
        assert check.status == "ok" or check.note, check


@pytest.mark.parametrize("blocked", ["torch", "diffusers"])
def test_without_a_required_package(blocked):
    code, report, checks = _doctor_without(blocked)
    assert code == 1 and report["ok"] is False
    assert checks[blocked]["status"] == "problem" and f"pip install '{blocked}" in checks[blocked]["note"]
    assert checks["numpy"]["status"] == "ok"


def test_without_the_extension_and_the_extras():
    code, report, checks = _doctor_without("pydit._C", "transformers", "matplotlib", "rich", "pynvml")
    assert code == 0 and report["ok"] is True and report["backend"]["extension"] is False
    assert checks["pydit._C"]["status"] == "missing" and "slower" in checks["pydit._C"]["note"]
    assert checks["CUDA kernels"]["status"] == "missing"
    for name in ("transformers", "matplotlib", "rich", "nvidia-ml-py"):
        assert checks[name]["status"] == "missing" and "pip install" in checks[name]["note"]


def test_an_old_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    checks = doctor.examine()
    found = next(check for check in checks if check.name == "torch")
    assert found.status == "problem" and "2.10 or newer" in found.note and not doctor.healthy(checks)
    assert "Not usable yet: fix torch first." in doctor.describe(checks)


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("PYDIT_GEMM", "cublas")
    monkeypatch.setenv("PYDIT_BAKEND", "sim")
    checks = {check.name: check for check in doctor.examine()}
    assert checks["PYDIT_GEMM"].status == "problem"
    assert checks["PYDIT_GEMM"].found == "expected one of auto, pydit, library, got 'cublas'"
    assert checks["PYDIT_BAKEND"].status == "missing" and "does nothing" in checks["PYDIT_BAKEND"].note
    assert not doctor.healthy(list(checks.values()))


def test_missing_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    tools = [check for check in doctor.examine() if check.group == "Building from source"]
    assert len(tools) == 5 and all(check.status == "missing" and check.note for check in tools)
    assert doctor.healthy(doctor.examine())
