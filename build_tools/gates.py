"""The static gates: what nvcc makes of every kernel, checked without a GPU. ``python -m build_tools.gates``.

The kernels are those of the module that ``pip install -e .`` built here, brought up to date, or where it built none,
of a build of their own: for sm_80, sm_90 and, with TMA and wgmma, sm_90a. They are linked with ``-z defs``. What ptxas
said of them (build_tools/keep_log.sh keeps it) must hold no spills, no stack frame and no remark about wgmma; the SASS
no local memory, and in Hopper kernels the instructions they were written for, in attention with exponentials where a
product runs. Exceptions are the rules of kernel_limits.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from build_tools import cmake
from build_tools.cuda_logs import Kernel, parse_ptxas, parse_sass
from build_tools.kernel_limits import RULES, Rule

ARCHS = ("80", "90")  # the default of CMakeLists.txt
Sass = dict[tuple[str, str], Counter[str]]


def build(folder: Path | None = None) -> tuple[Path, list[Path], str]:
    """The folder, the object of every kernel file, compiled where it is not up to date, and what ptxas said of them.

    folder : of the build; None is the module's own, or ``gates`` beside it.
    """
    cmake.find_tool("nvcc")
    definitions, module = {}, cmake.cached(cmake.MODULE)
    if folder is None and module.get("PYDIT_CUDA_ARCHS") == ";".join(ARCHS) and module["PYDIT_CUDA"] != "off" and (
            cmake.MODULE / "libpydit_cuda.a").exists():
        folder = cmake.MODULE
    else:
        folder = folder or cmake.BUILD / "gates"
        definitions = {"PYDIT_CUDA": "on", "PYDIT_SIM": "off", "PYDIT_CUDA_ARCHS": ";".join(ARCHS)}
    for path in _objects(folder):
        if not _log(path).exists():
            path.unlink()  # and is made anew, with its log
    cmake.build(folder, "pydit_cuda", definitions)
    objects = _objects(folder)
    return folder, objects, "".join(_log(path).read_text() for path in objects)


def _objects(folder: Path) -> list[Path]:
    """Of the kernel files that there are; those of others may lie there from before."""
    targets = [folder / "CMakeFiles" / f"{target}.dir" for target in ("pydit_cuda", "pydit_hopper")]
    return sorted(path for target in targets for path in target.rglob("*.cu.o")
                  if (cmake.ROOT / path.relative_to(target).with_suffix("")).exists())


def _log(path: Path) -> Path:
    """Of an object, by build_tools/keep_log.sh."""
    return path.with_name(f"{path.name}.log")


def link(objects: Sequence[Path], library: Path) -> None:
    """Make a shared library in which nothing may be left undefined."""
    options = ["-shared", "-cudart=static", "-Xlinker=-z", "-Xlinker=defs"]
    cmake.run(cmake.find_tool("nvcc"), *options, "-o", library, *objects)


def cuobjdump() -> str | None:
    """Path of cuobjdump, from PATH or from the ``test`` extra; None without it."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(folder).glob("cu*/bin/cuobjdump")):
            if (found.parent / "nvdisasm").exists():
                return str(found)
    return None


def read_sass(library: Path) -> Sass | None:
    """The instructions of every kernel in a library, object or cubin; None without cuobjdump."""
    program = cuobjdump()
    if program is None:
        return None
    # cuobjdump asks nvdisasm, which the extra puts into the same folder, outside of PATH.
    return parse_sass(cmake.run("env", f"NVDISASM_PATH={Path(program).parent}", program, "-sass", library))


def problems(kernel: Kernel, sass: Sass | None, rules: Sequence[Rule] = RULES) -> list[str]:
    """Why the kernel fails; empty: it passes."""
    named = [rule for rule in rules if rule.covers(kernel.name, kernel.arch)]
    spill = max((rule.spill for rule in named), default=0)
    stack = max((rule.stack for rule in named), default=0)
    found = []
    for what, size, limit in (("spill stores", kernel.spill_stores, spill), ("spill loads", kernel.spill_loads, spill),
                              ("stack frame", kernel.stack, stack)):
        if size > limit:
            found.append(f"{what}: expected at most {limit} bytes, got {size}")
    found += kernel.notes
    found += [f"registers: expected {rule.registers} ({rule.reason}), got {kernel.registers}"
              for rule in named if rule.registers not in (0, kernel.registers)]
    if sass is None:
        return found
    if (kernel.symbol, kernel.arch) not in sass:
        return [*found, "SASS: expected a listing, got none"]
    instructions = sass[kernel.symbol, kernel.arch]
    local = {name: instructions[name] for name in ("LDL", "STL") if instructions[name]}
    if local and stack == 0:
        found.append("local memory: expected none, got " + ", ".join(f"{n} {name}" for name, n in local.items()))
    for rule in named:
        if missing := sorted(name for name in rule.requires if not instructions[name]):
            found.append(f"SASS: expected {' and '.join(missing)} ({rule.reason}), got none")
        if present := sorted(name for name in rule.forbids if instructions[name]):
            found.append(f"SASS: expected no {' or '.join(present)} ({rule.reason}), got "
                         f"{', '.join(str(instructions[name]) for name in present)}")
        if (count := instructions["MUFU under HGMMA"]) < rule.overlapped:
            found.append(f"SASS: expected {rule.overlapped} exponentials under HGMMA ({rule.reason}), got {count}")
        if (early := instructions["LDG before HGMMA"]) < rule.early:
            found.append(f"SASS: expected {rule.early} loads before the first wgmma ({rule.reason}), got {early}")
    return found


def unused(kernels: Sequence[Kernel], rules: Sequence[Rule] = RULES) -> list[str]:
    """Rules that name no kernel: what they allowed is gone, or its name has changed."""
    return [f"rule {rule.kernel!r}: expected a kernel of that name, got none" for rule in rules
            if not any(rule.covers(kernel.name, kernel.arch) for kernel in kernels)]


def table(kernels: Sequence[Kernel], sass: Sass | None) -> tuple[str, int]:
    """The table for a person, and how many kernels fail."""
    width = max(len(kernel.name) for kernel in kernels)
    lines = [f"{'kernel':{width}}  arch    registers  spill  stack  shared  verdict"]
    failed = 0
    for kernel in sorted(kernels, key=lambda k: (k.name, k.arch)):
        reasons = problems(kernel, sass)
        failed += bool(reasons)
        lines.append(f"{kernel.name:{width}}  {kernel.arch:6}  {kernel.registers:9}  "
                     f"{kernel.spill_stores + kernel.spill_loads:5}  {kernel.stack:5}  {kernel.shared:6}  "
                     f"{'; '.join(reasons) or 'pass'}")
    return "\n".join(lines), failed


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all pass. 1: a gate fails. 2: the gates could not run."""
    parser = argparse.ArgumentParser(prog="python -m build_tools.gates", description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, help="build folder (the module's, or build/gates)")
    try:
        folder, objects, log = build(parser.parse_args(arguments).build)
        link(objects, folder / "libkernels.so")
        sass = read_sass(folder / "libkernels.so")
    except cmake.BuildError as error:
        print(f"gates: {error}", file=sys.stderr)
        return 2
    kernels = parse_ptxas(log)
    text, failed = table(kernels, sass)
    print(text)
    stale = unused(kernels)
    for line in stale:
        print(line)
    print(f"{len(kernels)} kernels, {failed} fail; SASS "
          + ("read" if sass is not None else "not read: no cuobjdump (pip install -c constraints.txt '.[test]')"))
    return 1 if failed or stale else 0


if __name__ == "__main__":
    sys.exit(main())
