"""Every `$ pydit` command and Python block of the documentation is run, in order, and shows the output it promises."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from benchmarks import tables
from pydit.cli import _parse, main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```(console|python)\n(.*?)```", re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "pydit", tmp_path / "pydit")  # pages name the demo's teacher from a checkout
    namespace = {"__name__": page.stem}
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(text, str(page), "exec"), namespace)
            continue
        for command, expected in commands(text):
            capfd.readouterr()
            try:
                code = main(shlex.split(command)[1:])
            except SystemExit as end:
                code = end.code
            out, err = capfd.readouterr()
            errors = [line for line in expected if line.startswith("pydit: error: ")]
            assert code == (2 if errors else 0), (command, err)
            wildcard = "\n".join(".*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") for line in expected)
            assert re.search(wildcard.replace("\n.*", "(?:\n.*)?"), err if errors else out, re.S), (command, out, err)


def commands(text):
    """(command, lines of output) of a console block."""
    found = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def shell_lines():
    """(page, command) of every line of a block that is neither console nor Python; comments left out."""
    for page in PAGES:
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            if kind not in ("console", "python"):
                yield from ((page, " ".join(shlex.split(line, comments=True))) for line in text.splitlines() if line.strip())


# Of commands that do not run here: the test that does.
ELSEWHERE = {"make demo": "tests/demo/test_run.py", "make test": "tests/conftest.py",
             "pip install .": "tests/package/test_distribution.py"}


def test_commands_that_take_long_run_when_smaller(tmp_path, monkeypatch, capfd):
    """And every other command stands in a test of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_out").mkdir()
    os.symlink(ROOT / "pydit" / "demo" / "assets" / "teacher", tmp_path / "demo_out" / "distilled")
    run = []
    for page, command in shell_lines():
        if page.name == "use_from_cpp.md":
            assert "use_from_cpp.md" in (ROOT / "tests/package/test_cpp.py").read_text()
        elif command.startswith("pydit "):
            run.append(command)
            smaller = command.replace("--prompts 2500", "--prompts 7 --steps 1")
            assert main(shlex.split(smaller)[1:]) == 0, (command, capfd.readouterr().err)
        else:
            assert (ROOT / ELSEWHERE[command]).exists(), (page, command)
    assert [command.split()[1] for command in run] == ["doctor", "eval", "eval"]


def test_make_demo_is_a_command():
    """Not run: what it would run is read as the command line reads it."""
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = (line for line in recipe.splitlines() if "pydit demo" in line)
    assert _parse(shlex.split(command)[1:]).command == "demo"


def test_commands_within_a_sentence_exist(capfd):
    """Their names, their options, and the modules and files that they name."""
    seen = set()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        prose = re.sub(r"^```\w*\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        for text in re.findall(r"`([^`]+)`", prose):
            words = text.split()
            if words[0] == "pydit" and len(words) > 1:
                with pytest.raises(SystemExit) as end:
                    main([words[1], "--help"])
                known = capfd.readouterr().out
                if words[1] == "bench":
                    module = words[2] if words[2:3] and not words[2].startswith("-") else "runner"
                    known += (ROOT / f"benchmarks/{module}.py").read_text()
            elif words[:2] == ["python", "-m"] and words[2] != "pytest":
                known, end = Path(importlib.util.find_spec(words[2]).origin).read_text(), None
            elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
                known, end = (ROOT / "tests/conftest.py").read_text(), None
                assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), (page, text)
            else:
                continue
            seen.add(words[0])
            assert end is None or end.value.code == 0, (page, text)
            for option in re.findall(r"--[a-z][\w-]+", text):
                assert re.search(rf"{option}\b", known), (page, text, option)
    assert seen == {"pydit", "python", "pytest"}


def test_names_in_a_sentence_are_found_behind_import_pydit():
    """`pydit.a.b` is what a reader types after ``import pydit``, where nothing else of pydit has been imported."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.S | re.M)
    names = sorted(set(re.findall(r"`[^`\n]*?\b(pydit(?:\.\w+){2,})[^`\n]*`", prose)))
    assert "pydit.models.attention.QwenImageAttnProcessor" in names and len(names) > 10
    each = ("import os, sys, torch, diffusers, pydit\n"  # what is the same for all, once
            "for name in sys.argv[1:]:\n"
            "    if os.fork() == 0:\n"
            "        eval(name)\n"
            "        os._exit(0)\n"
            "    if os.wait()[1]:\n"
            "        sys.exit(name)\n")
    subprocess.run([sys.executable, "-c", each, *names], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_every_error_page_is_listed_and_every_name_in_the_list_is_raised():
    index = (ROOT / "docs" / "errors" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs" / "errors").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\((\w+\.md)\)", index))
    source = "".join(path.read_text() for path in (ROOT / "pydit").rglob("*.py"))
    names = re.findall(r"`([\w ]+):`", index)
    files = {*re.findall(r'FormatError\(\s*f?"([\w ]+):', source), *re.findall(r'what="([\w ]+)"', source)}
    assert sorted(files - set(names)) == []  # where a file is at fault, the list says which
    assert {"stats", "plan", "out", "cache_dir"} <= set(names)
    assert [name for name in names if f"{name}: " not in source and f'what="{name}"' not in source] == []


def test_generated_tables_are_up_to_date():
    assert tables.main(["--check"]) == 0
