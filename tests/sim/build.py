"""The simulator's runtime as object files, which several programs of tests are linked with."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-pthread",
         "-DPYDIT_SIM", "-I", ROOT / "csrc"]
COMPILER = shutil.which("c++") or shutil.which("g++")


def compile_with(command):
    """Run a compiler and return what it said; an error is the test's."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def objects(folder, sources, *flags, compiler=COMPILER):
    """An object of each source in ``folder``; what is there already stays."""
    launcher = [ccache] if (ccache := shutil.which("ccache")) else []
    folder.mkdir(exist_ok=True)
    targets = []
    for source in sources:
        targets.append(folder / f"{source.parent.name}_{source.stem}.o")
        if not targets[-1].exists():
            begun = targets[-1].with_suffix(f".{os.getpid()}.o")  # another process may be at the same
            compile_with([*launcher, compiler, *FLAGS, *flags, "-c", source, "-o", begun])
            begun.replace(targets[-1])
    return targets


def runtime(tmp_path_factory):
    """Compiled once for all processes of this run of the tests."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sim_runtime"
    return objects(shared, sorted((ROOT / "csrc/sim").glob("*.cpp")))


def program(tmp_path_factory, name, sources):
    """``sources`` and the runtime."""
    folder = tmp_path_factory.mktemp(name)
    parts = runtime(tmp_path_factory) + objects(folder, sources)
    compile_with([COMPILER, "-pthread", *parts, "-o", folder / name])
    return folder / name
