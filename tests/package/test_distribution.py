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
from build_tools import wheel as check
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
    """What build_tools/wheel.py asks of every wheel, and a size that code and kernels keep to beside the teacher."""
    assert check.contents(Path(wheel.filename), largest=1 << 30) == []
    code = sum(item.compress_size for item in wheel.infolist() if not item.filename.startswith(TEACHER))
    assert code < 4e6, f"{code / 1e6:.1f} MB beside the demo's teacher"


WHEEL = {"pydit/py.typed": "", "pydit/_C.pyi": "", f"{TEACHER}model_index.json": "{}", "pydit/_C.abi3.so": "",
         "pydit/version.py": '__version__ = "1.2.3"', "pydit-1.2.3.dist-info/METADATA": "Version: 1.2.3\n"}


@pytest.mark.parametrize(("change", "expected"), [
    ({}, None),
    ({"pydit/py.typed": None}, "files: expected pydit/py.typed, got none"),
    ({"pydit/_C.so.o": ""}, "files: expected nothing of the build, got pydit/_C.so.o"),
    ({"tests/test_a.py": ""}, "files: expected the package pydit alone, got tests beside it"),
    ({"pydit/_C.abi3.so": None}, "pydit._C: expected one module, got 0"),
    ({"pydit/version.py": '__version__ = "1.2.4"'},
     "version: expected one, got 1.2.3 in file name, 1.2.3 in METADATA, 1.2.4 in pydit/version.py"),
    ({"pydit/large.bin": "0" * 20_000}, "size: expected under 20,000 bytes, got 20,"),
])
def test_a_wrong_wheel_is_named(tmp_path, change, expected):
    file = tmp_path / "pydit-1.2.3-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in (WHEEL | change).items():
            if text is not None:
                archive.writestr(name, text)
    found = check.contents(file, largest=20_000)
    assert len(found) == (expected is not None) and all(reason.startswith(expected) for reason in found), found


def test_a_wrong_module_is_named(tmp_path):
    """A module that needs CUDA's runtime, looks for it in a folder and exports a function beside its init."""
    skip_without("cc", "objdump")
    (tmp_path / "a.c").write_text("int cudaFree(void *p) { return p != 0; }")
    (tmp_path / "b.c").write_text("int cudaFree(void *); int PyInit__C(void) { return cudaFree(0); } int other;")
    runtime, module = tmp_path / "libcudart.so.13", tmp_path / "_C.so"
    build = ["cc", "-shared", "-fPIC", "-o"]
    subprocess.run([*build, runtime, tmp_path / "a.c", "-Wl,-soname,libcudart.so.13"], check=True)
    subprocess.run([*build, module, tmp_path / "b.c", runtime, "-Wl,--no-as-needed,-rpath,/cuda"], check=True)
    assert check.linkage(module) == ["libraries: expected those of every Linux, got libcudart.so.13",
                                     "library path: expected none, got /cuda",
                                     "exported symbols: expected PyInit__C alone, got PyInit__C, other"]


def test_a_symbol_too_new_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(check.cmake, "find_tool", lambda name: name)
    monkeypatch.setattr(check.cmake, "run", lambda *_: "0 DF *UND* 0 (GLIBC_2.38) f\n0 DF *UND* 0 (GLIBCXX_3.4.9) g\n")
    assert check.symbols(tmp_path / "_C.so") == ["symbols: expected GLIBC up to 2.34, got 2.38"]


def test_wheel_command(tmp_path, capsys):
    """One sentence for what is no wheel; 1 and the reasons for one that is wrong."""
    file = tmp_path / "pydit-1.2.3-cp311-cp311-linux_x86_64.whl"
    assert check.main([str(file)]) == 2
    assert "expected a wheel, got" in capsys.readouterr().err
    file.write_bytes(b"PK")
    assert check.main([str(file)]) == 2
    assert "expected a wheel, got File is not a zip file" in capsys.readouterr().err
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pydit/version.py", WHEEL["pydit/version.py"])
    assert check.main([str(file)]) == 1
    assert "pydit._C: expected one module, got 0" in capsys.readouterr().out


def test_one_version(wheel, sdist):
    version = pydit.__version__
    metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    assert re.search(r"^Version: (.*)$", metadata, re.M).group(1) == version == backend.extension()[0].version
    written = [name for name in sdist[0] if not name.startswith("pydit.egg-info") and name != "PKG-INFO"
               and Path(name).suffix in (".py", ".txt", ".toml", ".h", ".cpp", ".in", ".pyi")
               and re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", (sdist[1] / name).read_text())]
    assert written == ["pydit/version.py"]


def test_module_is_fit_for_manylinux():
    """Libraries of every Linux alone, its init symbol alone, no symbol newer than manylinux_2_34 (PEP 600) allows."""
    module, error = backend.extension()
    if module is None:
        pytest.skip(f"pydit._C is not built: {error}")
    if shutil.which("objdump") is None:
        pytest.skip("binutils (objdump) is not installed")
    assert check.linkage(Path(module.__file__)) == []
    libc = tuple(map(int, re.findall(r"\d+", platform.libc_ver()[1])))
    if libc > (2, 36):
        pytest.skip(f"libraries are right; symbols: built on glibc {libc}, newer than the images that wheels come from")
    assert check.symbols(Path(module.__file__)) == []


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
                assert len(node.args.posonlyargs + node.args.args) - 1 == len(re.findall(r"\w+: ", signature)), name
                assert ast.unparse(node.returns).split("[")[0] == result, name
