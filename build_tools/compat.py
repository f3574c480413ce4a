"""One build, many versions: tests under Python x torch x diffusers. ``python -m build_tools.compat --list``.

The source distribution is made once and, for each Python, a wheel is built from it in a clean environment. Every cell
of the matrix is an environment of its own with that wheel, so that all torch versions of one Python meet the same
pydit._C (compared by sha256). A cell imports every module of the package and runs the tests. Finished cells are kept
under --work, named by a digest of the sources: the same command goes on where it was stopped, and runs again what did
not pass. pip's settings hold: a package index with CPU builds of torch saves gigabytes (PIP_EXTRA_INDEX_URL).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

from build_tools import cmake

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
VERSIONS = ("lowest", "newest")
TESTS = ("tests/package/test_backend.py", "tests/package/test_files.py", "tests/ops/test_block.py",
         "tests/ops/test_qk_norm_rope.py", "tests/models/test_adapter.py", "tests/models/test_attention.py",
         "tests/models/test_pruned.py", "tests/inference/test_pipeline.py", "tests/inference/test_accelerate.py",
         "tests/inference/test_hooks.py")
SOURCES = ("csrc", "pydit", "build_tools", "tests", "benchmarks", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml",
           "setup.py")
BESIDE = ("tests", "benchmarks", "build_tools", "pyproject.toml")  # what tests read, without the package itself
LONGEST = 3600  # seconds that one step may take
OTHERS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYDIT_EXTENSION", "PYDIT_BACKEND")  # lead to another module

PROBE = """import ensurepip, json, os, sys, sysconfig, venv
headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print(json.dumps([sys.executable, sys.version.split()[0], headers]))"""
# pydit.__main__ would run the command line; all others must import.
IMPORT_ALL = """import importlib, importlib.metadata, json, pkgutil, pydit
for module in pkgutil.walk_packages(pydit.__path__, "pydit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
extension, error = pydit.backend.extension()
module = extension.__file__ if extension else error
print(json.dumps([*map(importlib.metadata.version, ("torch", "diffusers")), module]))
"""


@dataclasses.dataclass(frozen=True)
class Python:
    """An interpreter that was asked for: where it is, or why there is none."""

    name: str  # as it was asked for
    path: str = ""
    version: str = ""  # 3.11.7
    reason: str = ""


@dataclasses.dataclass
class Cell:
    """One combination of versions and what came of it."""

    python: str
    torch: str
    diffusers: str
    result: str = "to run"  # passed, failed, not run
    reason: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    extension: str = ""  # sha256 of the installed pydit._C
    tests: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, file: Path) -> Cell | None:
        """The cell in ``file``; None where there is none that can be read."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")
        os.replace(unfinished, file)


class Unavailable(Exception):
    """A cell cannot be run on this machine; says why."""


# What there is -------------------------------------------------------------------------------------------------------


def find_python(name: str) -> Python:
    """The interpreter of version ``name`` ("3.11") or at path ``name``, fit for building and for environments."""
    if os.sep in name:
        candidates = [name]
    else:
        folders = [folder for folder in os.get_exec_path() if folder]
        candidates = [str(Path(folder) / f"python{name}") for folder in folders]
        if root := os.environ.get("PYENV_ROOT"):
            candidates += sorted(map(str, Path(root).glob(f"versions/{name}.*/bin/python")))
    reason = "no such interpreter on PATH or under PYENV_ROOT" if os.sep not in name else "no such file"
    for path in filter(os.path.exists, candidates):
        try:
            done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, timeout=60)
            program, version, headers = json.loads(done.stdout) if done.returncode == 0 else (path, "", False)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            reason = f"{path} does not run: {error}"
            continue
        if headers:
            return Python(name, program, version)
        missing = "its headers (Python.h) are" if version else "the module venv or ensurepip is"
        reason = f"{path}: {missing} not installed"
    return Python(name, reason=reason)


def lowest(package: str) -> str:
    """The lowest version of ``package`` that pyproject.toml allows."""
    found = re.search(rf'"{package}>=([\d.]+)', (cmake.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise cmake.BuildError(f"pyproject.toml: expected a dependency {package}>=VERSION, got none")
    return found.group(1)


def digest() -> str:
    """Of everything a wheel is made of, the settings of its build, and the tests of it."""
    settings = sorted(f"{name}={value}" for name, value in os.environ.items()
                      if name.startswith("PYDIT_") and name not in (*OTHERS, "PYDIT_BUILD_DIR"))
    whole = hashlib.sha256("\n".join(settings).encode())
    for name in SOURCES:
        top = cmake.ROOT / name
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
                held = hashlib.sha256(file.read_bytes()).hexdigest()
                whole.update(f"{file.relative_to(cmake.ROOT)} {held}\n".encode())
    return whole.hexdigest()


def step(command: Sequence[object], log: Path, cwd: Path) -> tuple[int, str]:
    """Run a command into the log; return its exit code and what it printed."""
    variables = {name: value for name, value in os.environ.items() if name not in OTHERS}
    # With a base directory ccache knows a source again in the build for another Python.
    variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "CCACHE_BASEDIR": str(cwd), "CCACHE_NOHASHDIR": "1"}
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                              cwd=cwd, env=variables, timeout=LONGEST)
        code, output = done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        code, output = 124, (error.stdout or b"").decode(errors="replace") + f"\nno end after {LONGEST} s"
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(words)}\n{output}\n")
    return code, output


# Builds --------------------------------------------------------------------------------------------------------------


class Builds:
    """The source distribution, and a wheel for each Python; each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _must(self, what: str, *command: object, cwd: Path) -> None:
        log = self._folder / f"{what.replace(' ', '-')}.log"
        if step(command, log, cwd)[0] != 0:
            raise cmake.BuildError(f"{what}: expected it to succeed, got an error; see {log}")

    def source(self, python: Python) -> Path:
        """The unpacked source distribution."""
        folder = self._folder / "source"
        if folder.exists():
            return folder
        tools, out = self._folder / "tools", self._folder / "sdist"
        what, program, unpacked = "source distribution", tools / "bin" / "python", self._folder / "unpacked"
        self._must(what, python.path, "-m", "venv", "--clear", tools, cwd=self._folder)
        self._must(what, program, "-m", "pip", "install", "-q", "build", cwd=tools)
        self._must(what, program, "-m", "build", "--sdist", "--outdir", out, cmake.ROOT, cwd=tools)
        shutil.rmtree(tools)
        shutil.rmtree(unpacked, ignore_errors=True)
        shutil.unpack_archive(next(out.glob("*.tar.gz")), unpacked)
        os.rename(next(unpacked.iterdir()), folder)
        unpacked.rmdir()
        return folder

    def wheel(self, python: Python) -> Path:
        """The wheel of this Python, built from the source distribution with isolation."""
        out = self._folder / f"wheel-{python.version}"
        if not (found := sorted(out.glob("*.whl"))):
            source, tools = self.source(python), self._folder / "tools"
            what = f"wheel for Python {python.version}"
            print(f"{what} ...", flush=True)
            self._must(what, python.path, "-m", "venv", "--clear", tools, cwd=self._folder)
            self._must(what, tools / "bin" / "python", "-m", "pip", "wheel", "--no-deps", "-w", out, source, cwd=source)
            shutil.rmtree(tools)
            found = sorted(out.glob("*.whl"))
        return found[0]


# Cells ---------------------------------------------------------------------------------------------------------------


def requirement(package: str, version: str) -> str:
    return package if version == "newest" else f"{package}=={version}"


def install(environment: Path, python: Python, wheel: Path, cell: Cell, log: Path) -> None:
    """Make the cell's environment. ``Unavailable`` where a version is not to be had, ``BuildError`` where pip fails."""
    code, output = step([python.path, "-m", "venv", "--clear", environment], log, log.parent)
    if code != 0:
        raise Unavailable(f"{python.path} makes no environment: {output.strip().splitlines()[-1]}")
    wanted = [requirement("torch", cell.torch), requirement("diffusers", cell.diffusers)]
    # --no-compile: most of torch is never imported here.
    code, output = step([environment / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile",
                         f"{wheel}[demo,train]", *wanted, "pytest", "hypothesis"], log, log.parent)
    if missing := re.search(r"No matching distribution found for ((?:torch|diffusers)==\S+)", output):
        raise Unavailable(f"no {missing.group(1)} for Python {python.version} in the package index")
    if code != 0:
        errors = re.findall(r"^ERROR: (.*)", output, re.M)
        raise cmake.BuildError(f"pip install: {errors[-1] if errors else output.strip()[-200:]}")


def outcome(output: str) -> dict[str, int]:
    """The counts in pytest's closing line."""
    closing = re.compile(r"\d+ (passed|failed|skipped|errors?)\b.* in [\d.]+s")
    lines = [line for line in output.splitlines() if closing.search(line)]
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []:
        counts["failed" if word == "error" else word] += int(number)
    return counts


def test(environment: Path, cell: Cell, log: Path) -> None:
    """Fill in the cell: versions and module as installed, then what the tests say."""
    beside = environment / "checkout"
    beside.mkdir()
    for name in BESIDE:
        source = cmake.ROOT / name
        copy: Callable[..., object] = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, beside / name)
    program = environment / "bin" / "python"
    code, output = step([program, "-c", IMPORT_ALL], log, beside)
    lines = output.strip().splitlines() or ["no output"]
    if code != 0:
        raise cmake.BuildError(f"import: {lines[-1]}")
    cell.torch, cell.diffusers, module = json.loads(lines[-1])
    if not Path(module).is_file():
        raise cmake.BuildError(f"import of pydit._C: {module}")
    cell.extension = hashlib.sha256(Path(module).read_bytes()).hexdigest()
    code, output = step([program, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cell.tests], log, beside)
    for name, number in outcome(output).items():
        setattr(cell, name, number)
    if code != 0 or cell.passed == 0:
        first = re.search(r"^(?:FAILED|ERROR) (.*)", output, re.M)
        raise cmake.BuildError(f"pytest: {first.group(1) if first else f'exit code {code}'}")


def run(cell: Cell, python: Python, builds: Builds, log: Path, keep: bool) -> None:
    """Fill in what comes of the cell; its environment is deleted again."""
    started, environment = time.monotonic(), log.with_suffix(".venv")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    try:
        install(environment, python, builds.wheel(python), cell, log)
        test(environment, cell, log)
        cell.result = "passed"
    except Unavailable as error:
        cell.result, cell.reason = "not run", str(error)
    except cmake.BuildError as error:
        cell.result, cell.reason = "failed", f"{error}"
    finally:
        cell.seconds = round(time.monotonic() - started, 1)
        if not keep:
            shutil.rmtree(environment, ignore_errors=True)


# The matrix ----------------------------------------------------------------------------------------------------------


def pairs(first: Sequence[str], second: Sequence[str], every: bool) -> list[tuple[str, str]]:
    """Each of both with each, or in step, where the last of the shorter goes on."""
    if every:
        return list(product(first, second))
    length = max(len(first), len(second))
    return [(first[min(i, len(first) - 1)], second[min(i, len(second) - 1)]) for i in range(length)]


def table(cells: Sequence[Cell]) -> str:
    """The table for a person."""
    head = ("python", "torch", "diffusers", "result", "passed", "failed", "seconds")
    rows = [(c.python, c.torch, c.diffusers, c.result, str(c.passed), str(c.failed), f"{c.seconds:.0f}") for c in cells]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() + (f"  {cell.reason}" if cell and cell.reason else "")
                     for line, cell in zip(lines, [None, *cells], strict=True))


def same_module(cells: Sequence[Cell]) -> Iterator[tuple[bool, str]]:
    """For each Python whether its cells had the same module, and a line that says so."""
    for python in dict.fromkeys(cell.python for cell in cells if cell.extension):
        having = [cell for cell in cells if cell.python == python and cell.extension]
        modules = sorted({cell.extension for cell in having})
        torches = ", ".join(dict.fromkeys(cell.torch for cell in having))
        yield len(modules) == 1, (f"Python {python}: {'one' if len(modules) == 1 else 'not one'} pydit._C "
                                  f"(sha256 {', '.join(m[:12] for m in modules)}) under torch {torches}")


def version(text: str) -> str:
    """A version as the command line takes it."""
    if not re.fullmatch(r"lowest|newest|\d+(\.\w+)*(\+\w+)?", text):
        raise argparse.ArgumentTypeError(f"expected a version, lowest or newest, got {text!r}")
    return text


def test_path(text: str) -> str:
    """A test of this project, as pytest takes it."""
    if not text.startswith("tests") or not (cmake.ROOT / text.split("::")[0]).exists():
        raise argparse.ArgumentTypeError(f"expected a path under tests, got {text!r}")
    return text


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m build_tools.compat", description=__doc__.split("\n")[0], epilog=__doc__.split("\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--python", nargs="+", default=PYTHONS, metavar="X.Y|PATH",
                      help=f"interpreters, found on PATH and under PYENV_ROOT (default: {' '.join(PYTHONS)})")
    for package in ("torch", "diffusers"):
        made.add_argument(f"--{package}", nargs="+", default=VERSIONS, metavar="VERSION", type=version,
                          help=f"{package} versions; lowest: what pyproject.toml allows, {lowest(package)}; newest: "
                               f"what pip chooses (default: {' '.join(VERSIONS)})")
    made.add_argument("--all-pairs", action="store_true",
                      help="every torch with every diffusers; otherwise first with first, second with second")
    made.add_argument("--tests", nargs="+", default=TESTS, metavar="PATH", type=test_path,
                      help=f"tests to run in each cell (default: {' '.join(TESTS)})")
    made.add_argument("--work", type=Path, default=cmake.BUILD / "compat", metavar="DIR",
                      help="folder of builds, results and logs (%(default)s)")
    made.add_argument("--keep", action="store_true",
                      help="keep the environments (gigabytes each with CUDA's libraries)")
    made.add_argument("--list", action="store_true", help="print the cells and what is known of them; run nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no cell failed. 1: a cell failed. 2: nothing could be run."""
    try:
        options = parser().parse_args(arguments)
        folder = options.work.resolve() / digest()[:12]
        if not options.list:
            folder.mkdir(parents=True, exist_ok=True)
        builds, cells = Builds(folder), []
        for name in options.python:
            python = find_python(name)
            for torch, diffusers in pairs(options.torch, options.diffusers, options.all_pairs):
                cells.append(one_cell(python, torch, diffusers, options, folder, builds))
    except cmake.BuildError as error:
        print(f"compat: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"compat: {error.filename}: expected a folder to write in, got: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compat: interrupted; the same command goes on with what is left", file=sys.stderr)
        return 130
    print(table(cells))
    if options.list:
        return 0
    same = list(same_module(cells))
    print(*(line for _, line in same), f"logs: {folder}", sep="\n")
    if any(cell.result == "failed" for cell in cells) or not all(agree for agree, _ in same):
        return 1
    return 0 if any(cell.result == "passed" for cell in cells) else 2


def one_cell(python: Python, torch: str, diffusers: str, options: argparse.Namespace, folder: Path,
             builds: Builds) -> Cell:
    """The cell as it was recorded, or as it now comes out."""
    names = {"torch": torch, "diffusers": diffusers}
    names = {package: lowest(package) if name == "lowest" else name for package, name in names.items()}
    cell = Cell(python.version or python.name, **names, tests=list(options.tests))
    if python.reason:
        cell.result, cell.reason = "not run", python.reason
        return cell
    file = folder / f"py{python.version}-torch{cell.torch}-diffusers{cell.diffusers}.json"
    known = Cell.load(file)
    if known is not None and known.tests == cell.tests and (known.result == "passed" or options.list):
        return known
    if options.list:
        return cell
    print(f"Python {cell.python}, torch {cell.torch}, diffusers {cell.diffusers} ...", flush=True)
    run(cell, python, builds, file.with_suffix(".log"), options.keep)
    print(f"  {cell.result} after {cell.seconds:.0f} s", flush=True)
    if cell.result != "not run":
        cell.save(file)
    return cell


if __name__ == "__main__":
    sys.exit(main())
