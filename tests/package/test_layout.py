"""House rules that a machine can check: imports point one way, torch stops at the binding, one table of variables."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pydit import env
from pydit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# A module may import from its own layer and from layers above it in this list.
LAYERS = [
    {"arguments", "errors", "version", "env", "lazy", "files", "weights", "testing", "backend"},
    {"ops"},
    {"stats"},
    {"families"},
    {"presets"},
    {"plan"},
    {"models"},
    {"linear_maps"},
    {"analysis", "pruning", "distill", "inference", "data"},
    {"reporting"},
    {"demo", "doctor"},
    {"cli", "__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    wrong = []
    for path in (ROOT / "pydit").rglob("*.py"):
        unit = path.relative_to(ROOT / "pydit").parts[0].removesuffix(".py")
        assert unit in LEVEL, f"pydit/{unit}: give it a layer in this test"
        for name in _imports(path):
            target = name.split(".")[1] if name.startswith("pydit.") else None
            if target in LEVEL and LEVEL[target] > LEVEL[unit]:
                wrong.append(f"{path.relative_to(ROOT)} imports pydit.{target}")
    assert not wrong, "\n".join(wrong)


def test_torch_and_python_stop_at_the_binding():
    pattern = re.compile(r'#include\s*[<"](torch|ATen|c10|Python|pybind11)')
    wrong = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file() and "binding" not in p.parts
             and pattern.search(p.read_text())]
    assert not wrong


def test_kernels_reach_cuda_only_through_the_platform_header():
    wrong = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu*") if p.name != "platform.cuh"
             and ("<<<" in p.read_text() or "cuda_runtime" in p.read_text())]
    assert not wrong


def test_only_env_reads_the_environment():
    wrong = [str(p.relative_to(ROOT)) for p in (ROOT / "pydit").rglob("*.py")
             if p.name != "env.py" and re.search(r"os\.environ|getenv", p.read_text())]
    assert not wrong


def test_environment_table_equals_the_code():
    table = (ROOT / "docs" / "environment.md").read_text()
    rows = dict(re.findall(r"^\| `(PYDIT_\w+)` \| (.*) \|$", table, re.M))
    expected = {v.name: f"`{v.default}` | {', '.join(v.values) or 'text'} | {v.read} | {v.effect}" for v in env.VARIABLES}
    assert rows == expected


def test_environment_value_is_checked(monkeypatch):
    monkeypatch.setenv("PYDIT_BACKEND", "gpu")
    with pytest.raises(UserError, match="PYDIT_BACKEND: expected one of auto, reference, sim, got 'gpu'"):
        env.get("PYDIT_BACKEND")
    monkeypatch.setenv("PYDIT_SIM_SEED", "-1")
    with pytest.raises(UserError, match="PYDIT_SIM_SEED: expected a non-negative integer, got '-1'"):
        env.get_int("PYDIT_SIM_SEED")


@pytest.mark.parametrize("blocked", ["diffusers", "pydit._C", "transformers"])
def test_import_without(blocked):
    """`import pydit` and the ops work where a heavy or optional part cannot be imported."""
    code = (f"import sys; sys.modules[{blocked!r}] = None; import torch, pydit; "
            "x = torch.ones(1, 2, 8); print(pydit.ops.ada_layer_norm(x, x[:, 0], x[:, 0]).shape, pydit.backend_info())")
    result = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 2, 8])" in result.stdout


def test_import_is_light():
    """Neither the libraries around it nor torch's compiler, which alone takes as long as torch, come with the ops."""
    code = ("import sys, torch, pydit; x = torch.ones(1, 2, 8); pydit.ops.joint_linear(x, x, x[0], x[0]); pydit.stats; "
            "print(sorted({'diffusers', 'transformers', 'matplotlib', 'torch._dynamo'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_size_limits():
    """setup.py stays at 60 lines, CONTRIBUTING at 150, Python modules at 500, kernels at 600."""
    limits = {"setup.py": 60, "CONTRIBUTING.md": 150}
    for path in (ROOT / "pydit").rglob("*.py"):
        limits[str(path.relative_to(ROOT))] = 500
    for path in (ROOT / "csrc").rglob("*.cu"):
        limits[str(path.relative_to(ROOT))] = 600
    over = [f"{name}: {n} lines" for name, limit in limits.items()
            if (n := len((ROOT / name).read_text().splitlines())) > limit]
    assert not over


def test_the_committed_teacher_names_no_path_of_a_machine():
    for file in (ROOT / "pydit" / "demo" / "assets").rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8"), file
