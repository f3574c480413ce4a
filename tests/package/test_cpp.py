"""The C++ package: the commands of docs/use_from_cpp.md, run as they stand there, on a prefix that was moved."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# cmake and ninja as the test extra installs them, whether or not the environment is activated
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def skip_without(*programs):
    if missing := [name for name in programs if shutil.which(name, path=ENVIRONMENT["PATH"]) is None]:
        assert not os.environ.get("CI"), f"CI must build the package: {missing}"
        pytest.skip(f"not installed: {', '.join(missing)}")


def cmake(*arguments):
    return subprocess.run(["cmake", *map(str, arguments), "-G", "Ninja"], env=ENVIRONMENT, capture_output=True, text=True,
                          check=False)


def commands():
    """(those that install, those that use what was installed)"""
    block = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "use_from_cpp.md").read_text(), re.S).group(1)
    lines = block.strip().splitlines()
    return lines[:3], lines[3:]


def run(lines, build, prefix):
    """With the document's build folder somewhere else; a line that fails fails the test."""
    for line in lines:
        line = re.sub(r"(\$PWD/)?build/prefix", str(prefix), line)
        line = re.sub(r"(?<![\w-])build/", f"{build}/", line)
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_documented_commands(tmp_path):
    skip_without("cmake", "ninja", "c++")
    install, use = commands()
    assert "--install" in install[-1] and "consumer" in use[-1]
    run(install, tmp_path, tmp_path / "first")
    prefix = (tmp_path / "first").rename(tmp_path / "moved")
    names = {path.relative_to(prefix).name for path in prefix.rglob("*") if path.is_file()}
    assert names == {"pydit.h", "libpydit_sim.a", "pyditConfig.cmake", "pyditConfigVersion.cmake",
                     "pydit-sim-targets.cmake", "pydit-sim-targets-release.cmake"}
    for path in prefix.rglob("*.cmake"):
        assert str(tmp_path) not in path.read_text() and str(ROOT) not in path.read_text(), path
    assert re.match(r"largest error \S+, bound \S+", run(use, tmp_path, prefix))
    # What was not built is named; so is a version that this one cannot stand for.
    consumer = (ROOT / "tests" / "package" / "consumer" / "CMakeLists.txt").read_text()
    for backend, version, words in (("cuda", "0.1", "pydit: component cuda was not built"), ("sim", "9.9", '"9.9"')):
        project = tmp_path / backend
        project.mkdir()
        (project / "CMakeLists.txt").write_text(consumer.replace("pydit 0.1", f"pydit {version}"))
        done = cmake("-S", project, "-B", project / "b", f"-Dpydit_ROOT={prefix}", f"-DBACKEND={backend}")
        assert done.returncode != 0 and words in done.stderr, done.stderr


@pytest.mark.parametrize(("defines", "words"), [
    (["-DPYDIT_FAMILIES=block"], "PYDIT_FAMILIES: expected all for the Python module, got block"),
    (["-DPYDIT_FAMILIES=blocks", "-DPYDIT_PYTHON=off"], "PYDIT_FAMILIES: expected directories of csrc/kernels, got blocks")])
def test_families_are_checked(tmp_path, defines, words):
    skip_without("cmake", "ninja", "c++")
    done = cmake("-S", ROOT, "-B", tmp_path, "-DPYDIT_CUDA=off", *defines)
    assert done.returncode != 0 and words in " ".join(done.stderr.split())
