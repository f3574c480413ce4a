"""What a wheel must be before it is published, checked on the file. ``python -m build_tools.wheel FILE ...``.

Package data and types are in it and nothing of the build, one version everywhere, under 10 MB; the module needs the
libraries of every Linux alone, no symbol newer than manylinux_2_34 (PEP 600) allows, and exports its init function
only. CUDA's runtime is inside the module, so that a wheel meets whatever CUDA the machine's torch brings.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from build_tools import cmake

LARGEST = 10_000_000  # bytes
LIBRARIES = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "libdl.so.2",
             "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}  # manylinux_2_34
BUILT = (".a", ".o", ".h", ".cu", ".cuh", ".cpp", ".cmake", ".pyc")
WANTED = ("pydit/py.typed", "pydit/_C.pyi", "pydit/demo/assets/teacher/model_index.json")


def contents(wheel: Path, largest: int = LARGEST) -> list[str]:
    """What is wrong with the files in the wheel, its version and its size in bytes."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = [name for name in names if name.endswith(".dist-info/METADATA")]
        versions = {"file name": {wheel.name.split("-")[1]} if wheel.name.count("-") >= 4 else set(),
                    "METADATA": set(re.findall(r"^Version: (\S+)$", "".join(archive.read(name).decode()
                                                                          for name in metadata), re.M))}
        if "pydit/version.py" in names:
            versions["pydit/version.py"] = set(re.findall(r"__version__ = \"(\S+)\"",
                                                          archive.read("pydit/version.py").decode()))
    if missing := [name for name in WANTED if name not in names]:
        found.append(f"files: expected {', '.join(missing)}, got none")
    if built := [name for name in names if name.endswith(BUILT)]:
        found.append(f"files: expected nothing of the build, got {', '.join(built[:3])}")
    if beside := sorted({name.split("/")[0] for name in names if ".dist-info/" not in name} - {"pydit"}):
        found.append(f"files: expected the package pydit alone, got {', '.join(beside)} beside it")
    if len(modules := extensions(names)) != 1:
        found.append(f"pydit._C: expected one module, got {len(modules)}")
    if len(set.union(*versions.values())) != 1 or not all(versions.values()):
        found.append("version: expected one, got " + ", ".join(f"{' and '.join(sorted(v)) or 'none'} in {where}"
                                                               for where, v in versions.items()))
    if (size := wheel.stat().st_size) >= largest:
        found.append(f"size: expected under {largest:,} bytes, got {size:,}")
    return found


def extensions(names: Sequence[str]) -> list[str]:
    """The files among a wheel's names that are the module ``pydit._C``."""
    return [name for name in names if name.startswith("pydit/_C.") and name.endswith(".so")]


def linkage(module: Path) -> list[str]:
    """What is wrong with the libraries a module needs and with the symbols it exports."""
    headers = cmake.run(cmake.find_tool("objdump"), "-p", module)
    found = []
    if foreign := sorted(set(re.findall(r"NEEDED\s+(\S+)", headers)) - LIBRARIES):
        found.append(f"libraries: expected those of every Linux, got {', '.join(foreign)}")
    if paths := re.findall(r"(?:RPATH|RUNPATH)\s+(\S+)", headers):
        found.append(f"library path: expected none, got {', '.join(paths)}")
    table = cmake.run(cmake.find_tool("objdump"), "-T", module)
    exported = sorted(line.split()[-1] for line in table.splitlines()
                      if re.match(r"[0-9a-f]{8,} [gwu]", line) and "*UND*" not in line)
    if exported != ["PyInit__C"]:
        found.append(f"exported symbols: expected PyInit__C alone, got {', '.join(exported[:5]) or 'none'}")
    return found


def symbols(module: Path) -> list[str]:
    """The families of versioned symbols in which a module needs newer ones than manylinux_2_34 has."""
    table = cmake.run(cmake.find_tool("objdump"), "-T", module)
    found = []
    for family, newest in NEWEST.items():
        used = [tuple(map(int, version.split("."))) for version in re.findall(rf"\b{family}_([\d.]+)", table)]
        if used and max(used) > newest:
            allowed, got = (".".join(map(str, version)) for version in (newest, max(used)))
            found.append(f"symbols: expected {family} up to {allowed}, got {got}")
    return found


def problems(wheel: Path) -> list[str]:
    """Why the wheel fails; empty: it passes. ``BuildError`` where it is no wheel, or objdump is missing."""
    try:
        found = contents(wheel)
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
            for name in extensions(archive.namelist()):
                module = Path(archive.extract(name, folder))
                found += [*linkage(module), *symbols(module)]
    except (OSError, zipfile.BadZipFile) as error:
        raise cmake.BuildError(f"{wheel}: expected a wheel, got {error}") from error
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all pass. 1: a wheel fails. 2: the checks could not run."""
    parser = argparse.ArgumentParser(prog="python -m build_tools.wheel", description=__doc__.split("\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path, metavar="FILE", help="the wheel, such as pip wheel makes")
    failed = 0
    try:
        for wheel in parser.parse_args(arguments).wheels:
            reasons = problems(wheel)
            failed += bool(reasons)
            print(f"{wheel.name}  {wheel.stat().st_size:,} bytes  {'fail' if reasons else 'pass'}",
                  *reasons, sep="\n  ")
    except cmake.BuildError as error:
        print(f"wheel: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
