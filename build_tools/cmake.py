"""Builds of the project for its own checks: gates, coverage and sanitizers each have a folder of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("PYDIT_BUILD_DIR") or ROOT / "build")
MODULE = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"  # of pydit._C, kept between installations


class BuildError(RuntimeError):
    """A tool is missing, or said no; the message holds what it printed."""


class MissingTool(BuildError):
    """What a build needs is not installed."""


def find_tool(name: str) -> str:
    """The program beside this Python or on PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise MissingTool(f"{name}: expected it on PATH or beside {sys.executable}, got nothing")
    return found


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a program and return what it printed, both streams together."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          cwd=cwd)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(str(part) for part in command)}\n{done.stdout[-8000:]}")
    return done.stdout


def build(folder: Path, target: str, definitions: dict[str, str]) -> str:
    """Configure ``folder`` and build ``target``; return the compilers' output."""
    cmake = find_tool("cmake")
    try:
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}"]
    except MissingTool:
        generator = []
    folder.mkdir(parents=True, exist_ok=True)
    run(cmake, "-S", ROOT, "-B", folder, *generator, f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-D{name}={value}" for name, value in definitions.items()))
    return run(cmake, "--build", folder, "--target", target)


def cached(folder: Path) -> dict[str, str]:
    """The variables of a build folder's cache, without their types; none where there is no cache."""
    cache = folder / "CMakeCache.txt"
    lines = cache.read_text(errors="replace").splitlines() if cache.exists() else []
    pairs = (line.partition("=") for line in lines if not line.startswith(("#", "//")))
    return {name.partition(":")[0]: value for name, equals, value in pairs if equals}


def extension(folder: Path) -> Path:
    """Where a build of ``_C`` in ``folder`` lies."""
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
