"""The command ``pydit``: analyse, plan, prune, distil, run and measure from a shell.

Each command is a few lines over the Python API; torch, diffusers and matplotlib are imported inside the commands, so
that ``pydit --help`` answers at once. Bad input ends with one line on standard error and exit code 2, an interrupt
with 130; ``PYDIT_DEBUG=1`` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback

from pydit.cli import demo, distill, model, system
from pydit.cli.options import Parser, in_options
from pydit.errors import FormatError, UserError, one_line
from pydit.version import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    debug, arguments = False, argparse.Namespace()
    try:
        from pydit import env

        debug = env.get("PYDIT_DEBUG") == "1"
        arguments = _parse(argv)
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        _complain("pydit: interrupted" + _how_to_go_on(arguments), debug)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        with contextlib.suppress(OSError):
            sys.stdout.close()
        return 141
    except Exception as error:  # every failure becomes one line
        expected = isinstance(error, (OSError, ValueError, TypeError, ImportError)) or _is_safetensors(error)
        text = in_options(one_line(error), arguments, entries=isinstance(error, FormatError)) \
            if isinstance(error, UserError) else one_line(error)
        if asked := _wanted_memory(error):
            expected, text = True, f"memory: expected sizes that fit into that of this machine, got {asked}"
        if not expected:
            text = f"{type(error).__name__}: {text} (PYDIT_DEBUG=1 shows where)"
        _complain(f"pydit: error: {text}", debug)
        return 2 if expected else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="pydit", description="Prune and distil diffusion transformers, and run the result.",
                     epilog="Start with `pydit doctor`, then `pydit demo`. Every command has its own --help with an "
                           "example.")
    parser.add_argument("--version", action="version", version=f"pydit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (demo.add_demo, model.add_analyze, model.add_plan, model.add_prune, distill.add_distill,
                demo.add_generate, demo.add_eval, system.add_bench, system.add_doctor):
        add(commands)
    argv = sys.argv[1:] if argv is None else list(argv)
    asked = [word for word in argv[2:] if word in ("-h", "--help")] if argv[:2] in system.WITH_HELP else []
    arguments, rest = parser.parse_known_args([word for word in argv if word not in asked])
    rest += asked[:1]  # for those who parse the rest
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    return arguments


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    if getattr(arguments, "command", None) == "demo":
        return "; the same command goes on where it stopped"
    return "; with --resume it goes on from what was kept" if hasattr(arguments, "resume") else ""


def _is_safetensors(error: Exception) -> bool:
    return type(error).__name__ == "SafetensorError"


def _wanted_memory(error: Exception) -> str:
    """What an allocation that failed was for, in words; "" for any other error. Torch has a RuntimeError for it."""
    text = str(error)
    if not isinstance(error, MemoryError) and not re.search(
            r"can't allocate memory|out of memory|Storage size calculation overflowed|"
            r"numel: integer multiplication overflow", text):
        return ""
    found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|to allocate (\d+ bytes|[\d.]+ \w+)", text)
    return next(filter(None, found.groups())) if found else "some that need more"


def _complain(text: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)
