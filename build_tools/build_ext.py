"""Drives CMake from setuptools: configure once into a persistent directory, build, copy the module in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.command.build_ext import build_ext

from build_tools import cmake

# Read from the environment, see docs/environment.md.
CMAKE_VARIABLES = ("PYDIT_CUDA", "PYDIT_SIM", "PYDIT_SIM_RACE", "PYDIT_CUDA_ARCHS")


class CMakeBuild(build_ext):
    """``build_ext`` whose one extension is the CMake target ``_C``."""

    def run(self) -> None:
        """Configure and build; CMake's own lines are shown, so that what was found is never a secret."""
        build_dir = cmake.MODULE
        build_dir.mkdir(parents=True, exist_ok=True)
        self._forget_moved_cache(build_dir)
        configure = ["cmake", "-S", str(cmake.ROOT), "-B", str(build_dir), "-G", "Ninja",
                     f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={self._pybind11_dir()}"]
        configure += [f"-D{name}={os.environ[name]}" for name in CMAKE_VARIABLES if os.environ.get(name)]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "--target", "_C"], check=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        target = Path(self.get_ext_fullpath("pydit._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_dir / f"_C{suffix}", target)

    @staticmethod
    def _pybind11_dir() -> str:
        import pybind11

        return pybind11.get_cmake_dir()

    @staticmethod
    def _forget_moved_cache(build_dir: Path) -> None:
        """Drop a cache that names a ninja or cmake of an earlier, deleted isolated build environment."""
        found = cmake.cached(build_dir)
        if any(name in found and not Path(found[name]).exists() for name in ("CMAKE_MAKE_PROGRAM", "CMAKE_COMMAND")):
            (build_dir / "CMakeCache.txt").unlink()
