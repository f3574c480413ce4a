"""Finds the __global__ and __device__ functions of a source file, as the simulator's build sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    """One function: its name, the lines from its head to its closing brace (from 1), and whether it is a kernel."""

    name: str
    first: int
    last: int
    kernel: bool


# Qualifier, what may stand before the name (attributes, launch bounds, return type), name, opening parenthesis.
_HEAD = re.compile(r"\b(__global__|__device__)\s[^;{}]*?\{")
_ATTRIBUTE = re.compile(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)")
_NAME = re.compile(r"(operator\s*[^\s\w]+|\w+)\s*(?:<[^()]*>\s*)?\(")


def device_functions(source: str) -> list[Function]:
    """The functions that have a body, in their order; those that only nvcc sees (#ifndef PYDIT_SIM) are left out."""
    text = _simulated(source)
    functions = []
    for head in _HEAD.finditer(text):
        name = _NAME.search(_ATTRIBUTE.sub("", head[0]))
        if name is None:  # a __device__ variable
            continue
        end = _closing_brace(text, head.end() - 1)
        functions.append(Function(name[1], text.count("\n", 0, head.start()) + 1, text.count("\n", 0, end) + 1,
                                  head[1] == "__global__"))
    return functions


def _simulated(source: str) -> str:
    """The source with comments, strings, directives and what PYDIT_SIM leaves out blanked; lines keep their numbers."""
    source = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", lambda m: re.sub(r"[^\n]", " ", m[0]), source,
                    flags=re.DOTALL)
    kept, conditions, continued = [], [], False
    for line in source.split("\n"):
        directive = re.match(r"\s*#\s*(ifdef|ifndef|if|else|endif)\b\s*(\w*)", line)
        if directive:
            word, name = directive.groups()
            if word in ("ifdef", "ifndef", "if"):
                conditions.append((word == "ifdef") if name == "PYDIT_SIM" and word != "if" else None)
            elif word == "else":
                conditions[-1] = None if conditions[-1] is None else not conditions[-1]
            else:
                conditions.pop()
        blank = continued or line.lstrip().startswith("#") or False in conditions
        continued = line.endswith("\\") and (continued or line.lstrip().startswith("#"))
        kept.append("" if blank else line)
    return "\n".join(kept)


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    raise ValueError(f"expected a closing brace for the one in line {text.count(chr(10), 0, opening) + 1}, got none")
