"""The simulated kernels under AddressSanitizer and UBSan. ``python -m build_tools.sanitize [pytest options]``.

Builds pydit._C with both sanitizers and runs the op tests on it. An access outside a tensor, a misaligned vector
access or a signed overflow ends the process with a report of the source line. The kernels have gcov's counters as well,
so that one build and one run serve build_tools/coverage.py too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from build_tools import cmake

# Of UBSan not what AddressSanitizer finds at the access too (null, and addresses that wrap), a third of the time.
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize=null,pointer-overflow",
         "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
COUNTERS = ["--coverage", "-O0"]  # of kernels; -O0 keeps every line apart and compiles in a third of the time of -O1
# Left out: the same lines once more (another dtype, other numbers, copies that land at once, torch.compile), and a
# fault on purpose, which the sanitizer would take for its own.
COMMAND = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=slow", "tests/ops",
           "-m", "not again", "-k",
           "sim and not (run_to_run or any_shape or any_statistics or extreme or dies or dtype1 or eager or opcheck "
           "or compiles or offset or float32_sums or exactly or float16)")


def build(folder: Path) -> Path:
    """The path of the sanitized extension."""
    # RelWithDebInfo, because pybind11 strips a Release module, and the report would name no function. Its -O0 is the
    # binding's, which takes 12 s to compile so and 29 s at -O1; the simulator's library brings its own -O2.
    cmake.build(folder, "_C", {"PYDIT_CUDA": "off", "CMAKE_CXX_FLAGS": " ".join(FLAGS),
                               "CMAKE_BUILD_TYPE": "RelWithDebInfo", "CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O0 -g1",
                               "PYDIT_SIM_KERNEL_FLAGS": ";".join(COUNTERS), "CMAKE_MODULE_LINKER_FLAGS": "--coverage"})
    for counted in folder.rglob("*.gcda"):  # by an object that is no more: the new one would complain on its way out
        if counted.stat().st_mtime < counted.with_suffix(".gcno").stat().st_mtime:
            counted.unlink()
    return cmake.extension(folder)


def program(folder: Path, name: str, sources: Iterable[Path], flags: Sequence[str] = ("-O1", "-g1")) -> Path:
    """A program of ``sources`` around the simulator that was built for the extension in ``folder``."""
    compiler, objects = cmake.find_tool("c++"), []
    (folder / name).mkdir(exist_ok=True)
    for source in sorted(sources):
        objects.append(folder / name / f"{source.stem}.o")
        cmake.run(compiler, "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-DPYDIT_SIM", *FLAGS, *flags,
                  "-I", cmake.ROOT / "csrc", "-c", source, "-o", objects[-1])
    cmake.run(compiler, *FLAGS, "--coverage", "-pthread", *objects, folder / "libpydit_sim.a", "-ldl", "-o",
              folder / name / "program")
    return folder / name / "program"


def environment(extension: Path) -> dict[str, str]:
    """Variables under which a Python that was built without sanitizers can load ``extension``."""
    compiler = cmake.find_tool("c++")
    # The runtime must come before everything else in the process; libstdc++ beside it, because the runtime looks for
    # the function that throws when it starts, and Python alone does not bring one.
    libraries = [cmake.run(compiler, f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    for path in libraries:
        if not Path(path).is_absolute():
            raise cmake.MissingTool(f"{path}: expected it among the libraries of {compiler}, got nothing")
    # One thread of the simulator, because the counters are not atomic. Python keeps memory to its end, which is no leak
    # of ours.
    return {**os.environ, "PYDIT_EXTENSION": str(extension), "PYDIT_BACKEND": "sim", "PYDIT_SIM_THREADS": "1",
            "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of pytest, or 2 where the sanitizers cannot be built."""
    options = sys.argv[1:] if arguments is None else list(arguments)
    try:
        variables = environment(build(cmake.BUILD / "sanitize"))
    except cmake.BuildError as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 2
    return subprocess.run([*COMMAND, *options], cwd=cmake.ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
