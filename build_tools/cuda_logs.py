"""Reads what the CUDA tools say of kernels: the log of ``ptxas -v`` and the SASS listing of cuobjdump."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Kernel:
    """One kernel for one architecture, as ptxas compiled it. Sizes in bytes."""

    symbol: str
    arch: str
    name: str = ""  # readable, without namespaces and parameters
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0  # static
    notes: list[str] = field(default_factory=list)  # what ptxas says of wgmma, as info lines that stop no build


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_NOTE = re.compile(r"\(C75\d\d\).*")  # C7510 to C7519 wgmma is serialised or fenced, C7508 setmaxnreg is ignored
_NOTE_FUNCTION = re.compile(r"function '(\S+?)'")


def parse_ptxas(log: str) -> list[Kernel]:
    """The kernels of a log, in its order; a note that names no kernel of the log is an error, for it would be lost."""
    kernels: list[Kernel] = []
    described = ""  # the function whose properties follow: a kernel, or a device function that was not inlined
    notes: list[tuple[str, str]] = []
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            kernels.append(Kernel(match[1], match[2]))
        elif match := _PROPERTIES.search(line):
            described = match[1]
        elif match := _FRAME.search(line):
            if kernels:  # a device function's frame counts as its kernel's
                kernel = kernels[-1]
                stack, stores, loads = (int(text) for text in match.groups())
                own = described == kernel.symbol
                kernel.stack = max(kernel.stack, stack) if own else kernel.stack + stack
                kernel.spill_stores += stores
                kernel.spill_loads += loads
        elif (match := _USED.search(line)) and kernels:
            kernels[-1].registers = int(match[1])
            kernels[-1].shared = int(shared[1]) if (shared := _SHARED.search(line)) else 0
        elif match := _NOTE.search(line):
            function = _NOTE_FUNCTION.search(match[0])
            notes.append((function[1] if function else "", match[0]))
    for symbol, note in notes:
        owners = [kernel for kernel in kernels if kernel.symbol == symbol]
        if not owners:
            raise ValueError(f"ptxas log: expected a note about one of {len(kernels)} kernels, got {note!r}")
        for kernel in owners:
            kernel.notes.append(note)
    for kernel, name in zip(kernels, demangle([kernel.symbol for kernel in kernels]), strict=True):
        kernel.name = name
    return kernels


def parse_sass(listing: str) -> dict[tuple[str, str], Counter[str]]:
    """Instructions by (symbol, architecture): how often each occurs, named without what follows the first dot.

    A multicast load counts as ``UTMALDG`` and as ``UTMALDG.MULTICAST``; a branch back for the lanes that are left as
    ``BRA`` and as ``BRA.U.ANY``; an exponential between a product of a warpgroup and the wait for all of them, in the
    order of the listing, as ``MUFU`` and as ``MUFU under HGMMA``; a load above every HGMMA as ``LDG`` and as ``LDG
    before HGMMA``; a store of less than 16 bytes to global memory as ``STG`` and as ``narrow STG``.
    """
    arch = ""
    running = False  # a product of a warpgroup
    found: dict[tuple[str, str], Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if match := re.search(r"code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            current, running = found.setdefault((match[1], arch), Counter()), False
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)", line):
            current[match[1]] += 1
            if ".U.ANY" in match[2]:
                current["BRA.U.ANY"] += 1
            if ".MULTICAST" in match[2]:
                current[f"{match[1]}.MULTICAST"] += 1
            if match[1] == "LDG" and not current["HGMMA"]:
                current["LDG before HGMMA"] += 1
            if match[1] == "STG" and ".128" not in match[2]:
                current["narrow STG"] += 1
            if match[1] == "HGMMA":
                running = True
            elif match[1] == "WARPGROUP" and match[2].startswith(".DEPBAR"):
                running = not line.split(";")[0].rstrip().endswith("0x0")
            elif match[1] == "MUFU" and match[2] == ".EX2" and running:
                current["MUFU under HGMMA"] += 1
    return found


def demangle(symbols: list[str]) -> list[str]:
    """Readable names: ``modulate_kernel<float, 4, 32, 4, true, false>``."""
    if not symbols:
        return []
    filtered = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [_short(name) for name in filtered.stdout.splitlines()]


def _short(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((?:bool|int)\)", "", name)
    name = re.sub(r"\b(?:\w+::)+(?=\w+)", "", name)
    depth = 0
    for i, character in enumerate(name):  # the parameter list opens outside of the template arguments
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name
