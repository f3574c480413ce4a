"""The static gates on this project's kernels: those of the module's build, or of one in ``build/gates``. No GPU needed.

``python -m build_tools.gates`` prints the table.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from build_tools import cmake, gates
from build_tools.cuda_logs import parse_ptxas
from build_tools.device_functions import device_functions
from build_tools.kernel_limits import HOPPER, Rule
from pydit import backend

ROOT = Path(__file__).resolve().parents[2]
PLANTED = Path(__file__).parent / "recorded" / "planted.cu"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="module")
def built():
    """Objects, log, and the library they were linked to with ``-z defs``."""
    folder, objects, log = gates.build()
    library = folder / "libkernels.so"
    gates.link(objects, library)
    return objects, log, library


@pytest.fixture(scope="module")
def sass(built):
    listing = gates.read_sass(built[2])
    if listing is None:
        pytest.skip("cuobjdump is neither on PATH nor installed by the test extra")
    return listing


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_file_is_compiled_and_linked(built):
    objects, _, library = built
    sources = {path.name for path in (ROOT / "csrc").rglob("*.cu")}
    assert {path.name.removesuffix(".o") for path in objects} == sources
    assert library.exists()


@needs_nvcc
@pytest.mark.slow
def test_registers_stack_and_notes(built):
    kernels = parse_ptxas(built[1])
    assert {kernel.arch for kernel in kernels} == {"sm_80", "sm_90", "sm_90a"}
    declared = {function.name for path in (ROOT / "csrc" / "kernels").rglob("*.cu")
                for function in device_functions(path.read_text()) if function.kernel}
    assert {kernel.name.split("<")[0] for kernel in kernels} == declared
    failed = [f"{kernel.name} {kernel.arch}: {'; '.join(found)}" for kernel in kernels
              if (found := gates.problems(kernel, None))]
    assert not failed, "\n".join(failed)
    assert not gates.unused(kernels)


@needs_nvcc
@pytest.mark.slow
def test_instructions(built, sass):
    failed = [f"{kernel.name} {kernel.arch}: {'; '.join(found)}" for kernel in parse_ptxas(built[1])
              if (found := gates.problems(kernel, sass))]
    assert not failed, "\n".join(failed)


@needs_nvcc
def test_an_undefined_symbol_does_not_link(tmp_path):
    (tmp_path / "planted.cpp").write_text("int nowhere(); int here() { return nowhere(); }\n")
    cmake.run("nvcc", "-c", "-Xcompiler=-fPIC", tmp_path / "planted.cpp", "-o", tmp_path / "planted.o")
    with pytest.raises(cmake.BuildError, match="undefined reference to `nowhere"):
        gates.link([tmp_path / "planted.o"], tmp_path / "planted.so")


@needs_nvcc
def test_planted_faults_are_found_with_this_nvcc(tmp_path):
    """The recorded log is of one release; this holds the parser against the installed one."""
    cubin = tmp_path / "planted.cubin"
    log = cmake.run("nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-I", ROOT / "csrc", "-Xptxas=-v",
                    "-cubin", "-o", cubin, PLANTED)
    kernels = {kernel.name: kernel for kernel in parse_ptxas(log)}
    assert any("spill stores" in reason for reason in gates.problems(kernels["too_many_values<float, 64>"], None))
    assert any("(C75" in reason for reason in gates.problems(kernels["touched_early"], None))
    listing = gates.read_sass(cubin)
    if listing is None:
        pytest.skip("the logs are as recorded; SASS: cuobjdump is neither on PATH nor installed by the test extra")
    assert any("local memory" in reason for reason in gates.problems(kernels["too_many_values<float, 64>"], listing,
                                                                      [Rule("too_many", "", spill=9999)]))
    assert "SASS: expected UTMALDG (planted), got none" in gates.problems(
        kernels["touched_early"], listing, [Rule("touched_early", "planted", requires=HOPPER)])


def test_module_leaves_only_python_undefined():
    """What ``-z defs`` is to the kernels: a Python module may leave Python's own symbols to its process, no others."""
    module, error = backend.extension()
    if module is None:
        pytest.skip(f"pydit._C is not built: {error}")
    if shutil.which("nm") is None:
        pytest.skip("binutils (nm) is not installed")
    listing = subprocess.run(["nm", "-D", "--undefined-only", module.__file__], capture_output=True, text=True, check=True)
    # "U name@VERSION" is found in a library of the system; weak ones ("w") may be absent.
    unversioned = re.findall(r"^\s+U (\w+)$", listing.stdout, re.M)
    assert unversioned and not [name for name in unversioned if not re.match("_?Py", name)]
