"""What is shipped: the source distribution, the wheel, the module's symbols and stubs, and one version for all of it."""

import ast
import inspect
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pydit
from pydit import backend
from tests.package.test_cpp import cmake, skip_without

ROOT = Path(__file__).resolve().parents[2]
BUILT = {"__pycache__", "build", "dist", "demo_out"}
TEACHER = "pydit/demo/assets/teacher/"

# setuptools' own hooks; the module that the tests run takes the place of another build.
HOOK = """
import shutil, sys
from pathlib import Path
sys.path.insert(0, ".")
from build_tools import build_ext

name, out, module = sys.argv[1:]  # setuptools puts its own there

def run(self):
    target = Path(self.get_ext_fullpath("pydit._C"))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(module, target)

build_ext.CMakeBuild.run = run
import setuptools.build_meta
print(getattr(setuptools.build_meta, name)(out))
"""


def hook(name, source, out):
    module, _ = backend.extension()
    done = subprocess.run([sys.executable, "-c", HOOK, name, str(out), getattr(module, "__file__", "")], cwd=source,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """(names in the archive without its top folder, the folder it was unpacked to)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for item in ("csrc", "pydit", "build_tools", "CMakeLists.txt", "MANIFEST.in", "Makefile", "LICENSE", "README.md",
                 "constraints.txt", "pyproject.toml", "setup.py"):
        if (ROOT / item).is_dir():
            shutil.copytree(ROOT / item, source / item, ignore=lambda _, names: BUILT & set(names))
        else:
            shutil.copy2(ROOT / item, source / item)
    with tarfile.open(hook("build_sdist", source, out)) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
        archive.extractall(out, filter="data")
    return names, next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    module, error = backend.extension()
    if module is None:
        pytest.skip(f"pydit._C is not built: {error}")
    return zipfile.ZipFile(hook("build_wheel", sdist[1], tmp_path_factory.mktemp("wheel")))


def test_sdist_has_every_source_and_nothing_built(sdist):
    names, folder = sdist
    wanted = {str(path.relative_to(ROOT)) for top in ("csrc", "pydit", "build_tools") for path in (ROOT / top).rglob("*")
              if path.is_file() and not BUILT & set(path.parts) and path.suffix not in (".so", ".pyc")}
    assert not wanted - names, sorted(wanted - names)
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py", "constraints.txt", "Makefile"} <= names
    assert not [name for name in names if name.endswith((".so", ".a", ".o", ".pyc"))]
    skip_without("cmake", "ninja", "c++")
    done = cmake("-S", folder, "-B", folder / "b", "-DPYDIT_CUDA=off", "-DPYDIT_PYTHON=off")
    assert done.returncode == 0, done.stderr  # a missing source fails here


def test_wheel(wheel):
    """Nothing of the build in it, types for checkers, and a size that code and kernels keep to beside the teacher."""
    names = wheel.namelist()
    assert not [name for name in names if name.endswith((".a", ".o", ".h", ".cu", ".cuh", ".cmake", ".pyc"))]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"pydit"}
    assert {"pydit/py.typed", "pydit/_C.pyi", f"{TEACHER}model_index.json"} <= set(names)
    assert sum(name.startswith("pydit/_C.") and name.endswith(".so") for name in names) == 1
    code = sum(item.compress_size for item in wheel.infolist() if not item.filename.startswith(TEACHER))
    assert code < 4e6, f"{code / 1e6:.1f} MB beside the demo's teacher"


def test_one_version(wheel, sdist):
    version = pydit.__version__
    metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    assert re.search(r"^Version: (.*)$", metadata, re.M).group(1) == version == backend.extension()[0].version
    written = [name for name in sdist[0] if not name.startswith("pydit.egg-info") and name != "PKG-INFO"
               and Path(name).suffix in (".py", ".txt", ".toml", ".h", ".cpp", ".in", ".pyi")
               and re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", (sdist[1] / name).read_text())]
    assert written == ["pydit/version.py"]


def versions(name, listing):
    return [tuple(map(int, found.split("."))) for found in re.findall(rf"\b{name}_([\d.]+)", listing)]


def test_module_is_fit_for_manylinux():
    """Libraries of every Linux alone, and no symbol newer than manylinux_2_34 (PEP 600) allows."""
    module, error = backend.extension()
    if module is None:
        pytest.skip(f"pydit._C is not built: {error}")
    if shutil.which("objdump") is None:
        pytest.skip("binutils (objdump) is not installed")
    headers = subprocess.run(["objdump", "-p", module.__file__], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED\s+(\S+)", headers))
    assert needed <= {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "libdl.so.2",
                      "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert not re.search(r"R(UN)?PATH", headers)
    libc = tuple(map(int, re.findall(r"\d+", platform.libc_ver()[1])))
    if libc > (2, 36):
        pytest.skip(f"libraries are right; symbols: built on glibc {libc}, newer than the images that wheels come from")
    symbols = subprocess.run(["objdump", "-T", module.__file__], capture_output=True, text=True, check=True).stdout
    for name, newest in (("GLIBC", (2, 34)), ("GLIBCXX", (3, 4, 29)), ("CXXABI", (1, 3, 13))):
        found = versions(name, symbols)
        assert found and max(found) <= newest, (name, max(found))


# Stubs --------------------------------------------------------------------------------------------------------------


def stub_members(tree, name=None):
    """Names in the stub, of the module or of a class and its bases in the stub -> function node or None."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {}
    if name is not None:
        for base in classes[name].bases:
            found |= stub_members(tree, base.id) if base.id in classes else {}
    for node in tree.body if name is None else classes[name].body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = None
    return found


def public(module):
    return {name for name in dir(module) if not name.startswith("_")}


def test_stub_has_the_names_of_the_module():
    module, error = backend.extension()
    if module is None:
        pytest.skip(f"pydit._C is not built: {error}")
    tree = ast.parse((ROOT / "pydit" / "_C.pyi").read_text())
    assert set(stub_members(tree)) - {"cuda", "sim"} == public(module) - {"cuda", "sim"}
    for backend_name, stub in (("cuda", "_Kernels"), ("sim", "_Simulator")):
        kernels = getattr(module, backend_name, None)
        if kernels is None:
            continue
        members = stub_members(tree, stub)
        assert set(members) == public(kernels)
        for name, node in members.items():
            function = getattr(kernels, name)
            assert inspect.isbuiltin(function) == (node is not None), name
            if node is not None:
                signature, result = re.match(r"\w+\((.*)\) -> (\w+)", function.__doc__).groups()
                assert len(node.args.posonlyargs + node.args.args) - 1 == len(re.findall(r"arg\d+:", signature)), name
                assert ast.unparse(node.returns).split("[")[0] == result, name
