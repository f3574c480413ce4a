"""Every `$ pydit` command and Python block of the documentation is run, in order, and shows the output it promises."""

import os
import re
import shlex
import warnings
from pathlib import Path

import pytest

from benchmarks import tables
from pydit.cli import main

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_generated_tables_are_up_to_date():
    assert tables.main(["--check"]) == 0
