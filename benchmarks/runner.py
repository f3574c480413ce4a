"""Runs the benchmark registry: verifies first, then times every provider in turn, and prints and writes what it saw.

    python -m benchmarks.runner [--size full|small] [--filter TEXT] [--json FILE] ...      (or: pydit bench)

A case that computes something wrong, or raises, gets no figure and stops no other. ratio is the peer's time over
pydit's: above 1, pydit is faster. % of limit is the floor (the slower of bytes over copy bandwidth and FLOPs over GEMM
rate) over the time; both rates are measured in the same run, or the column stays empty.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import sys
import time
from pathlib import Path

import torch

from benchmarks import compare, machine, registry, roofline, table, timing
from benchmarks.cases import Case
from benchmarks.output import JSON_HELP, Output
from benchmarks.peers import Peer
from benchmarks.registry import SIZES, find
from pydit import backend
from pydit.cli.options import Parser, count, positive
from pydit.errors import FormatError, UserError, one_line
from pydit.files import require_file
from pydit.testing import assert_accurate


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when a case computed a wrong result, 2 on bad input."""
    try:
        return _main(_parse(argv))
    except (UserError, OSError) as error:
        print(f"pydit bench: error: {one_line(error)}", file=sys.stderr)
        return 2


def _parse(argv):
    parser = Parser(prog="pydit bench", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full" if torch.cuda.is_available() else "small",
                        help="shapes of real models, or ones for a CPU (default: what this machine suits)")
    parser.add_argument("--filter", default="", metavar="TEXT",
                        help="only cases whose name contains this text, or one of several separated by spaces")
    parser.add_argument("--module", help="only cases of this file of benchmarks/cases, such as linear")
    parser.add_argument("--list", action="store_true", help="name the cases and their peers, time nothing")
    parser.add_argument("--rounds", type=count, default=15, help="samples per provider, at least 3 (default: 15)")
    parser.add_argument("--peers", metavar="NAMES", help="only these peers, separated by commas; none for no peer")
    parser.add_argument("--without", metavar="PARTS", default="",
                        help="no peer whose name contains one of these, separated by commas")
    parser.add_argument("--no-limits", action="store_true", help="skip the ceilings, and with them %% of limit")
    parser.add_argument("--seconds", type=positive, help="start no case after this time")
    parser.add_argument("--case-seconds", type=positive, metavar="S",
                        help="end the process in a case that takes longer, as with a kernel that hangs")
    parser.add_argument("--resume", action="store_true",
                        help="keep what the file of --json holds, and go on after the case in which that run ended")
    parser.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP.format("case"))
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="results of an earlier run to compare with")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a roofline picture")
    args = parser.parse_args(argv)
    if args.rounds < 3:
        raise UserError(f"rounds: expected at least 3, got {args.rounds}")
    require_file(args.json, args.compare, what="json", kind=compare.FORMAT)
    require_file(args.plot, args.compare, args.json, what="plot", kind="picture")
    if args.resume and args.json is None:
        raise UserError("resume: expected --json FILE with it, got none")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("plot: expected matplotlib (pip install 'pydit[bench]'), got none")
    return args


def _main(args) -> int:
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = find(args.filter, args.size, args.module)
    peers, without = _chosen_peers(args.peers), unwanted_peers(args.without)
    if args.list:
        print("\n".join(f"{case.name:60} {case.work.bytes:>13,} B {case.work.flops:>15,} FLOP   "
                        + ", ".join(peer.name for peer in case.peers) for case in cases))
        return 0
    old = compare.load(args.compare) if args.compare else None
    if not args.resume:
        _require_no_others(args.json, cases)
    out = Output(args.json, kind=compare.FORMAT, resume=args.resume)
    data = {"format": compare.FORMAT, "version": compare.VERSION, "complete": False,
            "machine": machine.describe(device), "limits": {}, "rows": [], "not_run": [case.name for case in cases]}
    seen = []  # what processes before this one sampled
    if out.before is not None:
        before = compare.load(out.before, what="resume")
        _require_same(before["machine"], data["machine"], out.before)
        data |= _before(before, cases)
        seen.append(before["machine"])
    gc.collect()
    gc.freeze()  # modules, which live to the end: to look through them after every case takes longer than many a case
    with machine.Sampler(device) as sampler, torch.no_grad():
        if not args.no_limits and not data["limits"]:
            try:
                data["limits"] = timing.measure_limits(device, args.rounds)
            except RuntimeError as error:  # the cases are worth more than their share of the ceilings
                data["limits_failed"] = _reason(error)
                print(f"ceilings not measured: {data['limits_failed']}", file=sys.stderr)
        for case in [case for case in cases if case.name in data["not_run"]]:
            if args.seconds is not None and time.monotonic() - started > args.seconds:
                break
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            data["running"] = case.name  # until it is over: where the process ends meanwhile, the file says in which
            out.write(data)
            if args.case_seconds is not None:
                faulthandler.dump_traceback_later(args.case_seconds, exit=True, file=sys.__stderr__)
            data["rows"].append(run_case(case, device, data["limits"], rounds=args.rounds, peers=peers,
                                         without=without))
            faulthandler.cancel_dump_traceback_later()
            data["not_run"].remove(case.name)
            data["machine"] |= (sampled := sampler.result()) | machine.together([*seen, sampled])
            data["paths"] = data.get("paths", {}) | backend.report()
            faulted = not settle(device)
            if not faulted:
                del data["running"]
            out.write(data)
            if faulted:
                print(f"the GPU has faulted in {case.name}: no case after it is run", file=sys.stderr)
                break
    data["complete"] = not data["not_run"] and not args.filter and args.module is None
    print(table.render(data))
    if old is not None:
        data["compared"] = compare.compare(old, data)
        print("\n" + compare.describe(data["compared"], args.compare))
    out.finish(data, whole=not data["not_run"])
    if args.plot:
        roofline.draw(data, args.plot)
    return 1 if any("wrong" in row for row in data["rows"]) else 0


def _require_no_others(path: Path | None, cases: list[Case]) -> None:
    """UserError where a file has figures of cases that this run, which would take its place, does not take."""
    if path is None or not path.is_file():
        return
    try:
        data = compare.load(path, what="json")
    except FormatError:  # no figures to lose
        return
    others = sorted({row["case"] for row in data["rows"] if "wrong" not in row} - {case.name for case in cases})
    if others:
        raise UserError(f"json: expected a new file, or one whose cases this run takes too, got {path} of commit "
                        f"{data['machine']['commit']} with {len(others)} more, such as {others[0]}")


def _require_same(old: dict, new: dict, path: Path) -> None:
    """UserError where figures would stand beside those of another machine or other code, under one machine line."""
    differ = [f"{name} {old.get(name)} instead of {new.get(name)}"
              for name in (*compare.SAME_MACHINE, "commit", "torch", "cuda_archs") if old.get(name) != new.get(name)]
    if differ:
        raise UserError(f"resume: expected results of this machine and this code, got {path} with {', '.join(differ)}")


def _before(old: dict, cases: list[Case]) -> dict:
    """What a run that was ended leaves to the one that goes on: its ceilings and rows, the case it ended in being one
    without a figure."""
    rows, ended = list(old["rows"]), old.get("running")
    done = {row["case"] for row in rows}
    rows += [_row(case, {}) | {"wrong": "the process ended in this case"} for case in cases
             if case.name == ended and ended not in done]
    done.add(ended)
    return {"limits": old.get("limits") or {}, "rows": rows, "paths": old.get("paths", {}),
            "not_run": [case.name for case in cases if case.name not in done]}


def run_case(case: Case, device: str, limits: dict, *, rounds: int = 15, peers: set[str] | None = None,
             without: tuple[str, ...] = ()) -> dict:
    """Verify a case, time it and its peers, and return its row.

    A case that is wrong, or that raises (no memory, a package that is missing), has "wrong" instead of "providers".
    Peers that took no part are in "not_raced" (absent, or left out by ``peers`` or ``without``) or "failed" (raised, or
    wrong), each with the reason. "paths" has what pydit's ops ran on, which a case by itself does not tell.
    """
    row = _row(case, limits)
    try:
        row["providers"] = _race(case, device, row, rounds, peers, without)
    except Exception as error:  # however a case goes wrong, it has no figure and stops no other one
        return row | {"wrong": _reason(error)}
    ours = row["providers"]["pydit"]["us"]
    for entry in row["providers"].values():
        entry |= {"gb_s": case.work.bytes / entry["us"] / 1e3, "tflop_s": case.work.flops / entry["us"] / 1e6,
                  "percent_of_limit": 100 * row["floor_us"] / entry["us"] if row["floor_us"] else None,
                  "ratio": entry["us"] / ours}
    return row


def _row(case: Case, limits: dict) -> dict:
    return {"case": case.name, "op": case.op, "model": case.model, "shape": case.shape, "dtype": case.dtype,
            "bytes": case.work.bytes, "flops": case.work.flops, "floor_us": case.floor_us(limits),
            "not_raced": {}, "failed": {}}


def _race(case, device, row, rounds, peers, without) -> dict:
    """Times by provider; what takes no part goes into ``row``."""
    torch.manual_seed(0)
    args = case.make(device)
    right = references(case, args)
    calls = {op: path["calls"] for op, path in backend.report().items()}
    verify(case.run, case, args, right)
    row["paths"] = {op: f"{path['path']} ({path['reason']})" if path["reason"] else path["path"]
                    for op, path in backend.report().items() if path["calls"] > calls.get(op, 0)}
    inputs = timing.input_sets(case.make, case.work.bytes, device)
    long = timing.is_long(case.run, inputs, device)
    timers, methods = {}, {}
    timers["pydit"], methods["pydit"] = timing.timer(case.run, inputs, device, long=long)
    for peer in case.peers:
        try:
            reason = _no_part(peer, peers, without)
            if reason:
                row["not_raced"][peer.name] = reason
                continue
            function = peer.build()
            verify(function, case, args, right)
            timers[peer.name], methods[peer.name] = timing.timer(function, inputs, device, long=long)
        except Exception as error:
            row["failed"][peer.name] = _reason(error)
    others = {peer.name for peer in case.peers if not peer.rival}
    return {name: timing.summary(values) | {"method": methods[name]} | ({"rival": False} if name in others else {})
            for name, values in _sampled(timers, rounds, device, row).items()}


def _sampled(timers: dict, rounds: int, device: str, row: dict) -> dict[str, list[float]]:
    """Samples of all timers in turn. A peer that raises meanwhile, as one does that finds no memory left beside the
    others, is taken out and the rest begin anew; where that happens to pydit, it is timed alone."""
    last = [""]

    def named(name):
        def sample():
            last[0] = name
            return timers[name]()

        return sample

    while True:
        try:
            return timing.interleave({name: named(name) for name in timers}, rounds)
        except Exception as error:  # a compiler's own too: a peer that was built later made it forget the earlier ones
            lost = [last[0]] if last[0] != "pydit" else [name for name in timers if name != "pydit"]
            if not lost:
                raise
            row["failed"] |= {name: f"while all were timed: {_reason(error)}" for name in lost}
        for name in lost:  # outside of the handler, whose error holds on to memory
            del timers[name]
        settle(device)


def references(case: Case, args: tuple) -> tuple[tuple, tuple]:
    """What :func:`verify` holds the providers of ``case`` against: the exact results and eager torch's."""
    return _outputs(case, case.exact, args), _outputs(case, case.eager, args)


def verify(function, case: Case, args: tuple, right: tuple[tuple, tuple] | None = None) -> None:
    """Hold a provider of ``case`` against float64 under the tolerance policy; AssertionError when it is wrong.

    ``right`` is what :func:`references` gives, for a caller that has several providers.
    """
    exact, eager = right or references(case, args)
    results = _outputs(case, function, args)
    if not len(results) == len(exact) == len(eager):
        raise AssertionError(f"{case.name}: expected {len(exact)} outputs, got {len(results)}")
    for i, (a, b, c) in enumerate(zip(results, exact, eager, strict=True)):
        if a.dtype != c.dtype:
            raise AssertionError(f"{case.name} output {i}: expected {c.dtype}, got {a.dtype}")
        assert_accurate(a, b, c, name=f"{case.name} output {i}")


def _outputs(case, function, args) -> tuple:
    found = case.call(function, args)
    return found if isinstance(found, tuple) else (found,)


def settle(device: str) -> bool:
    """Give back the memory of what is over. False when the GPU has faulted: this process gets nothing more from it."""
    gc.collect()  # blocks and their parameters refer to each other
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    with contextlib.suppress(RuntimeError):  # an allocator that cannot is no fault of the GPU
        torch.cuda.empty_cache()
    return True


def _no_part(peer: Peer, chosen: set[str] | None, without: tuple[str, ...]) -> str:
    """Why a peer is not raced; "" if it is."""
    if chosen is not None and peer.name not in chosen:
        return "left out by --peers"
    if any(part in peer.name for part in without):
        return "left out by --without"
    present, reason = peer.available()
    return "" if present else reason


def _chosen_peers(text: str | None) -> set[str] | None:
    """The peers named on the command line; None for all."""
    if text is None:
        return None
    chosen, known = {name.strip() for name in text.split(",")} - {"none", ""}, _peer_names()
    if chosen - known:
        raise UserError(f"peers: expected none or names out of {', '.join(sorted(known))}, "
                        f"got {', '.join(sorted(chosen - known))}")
    return chosen


def unwanted_peers(text: str) -> tuple[str, ...]:
    """The parts of peers' names given on the command line."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    known = _peer_names() if parts else set()
    for part in parts:
        if not any(part in name for name in known):
            raise UserError(f"without: expected parts of {', '.join(sorted(known))}, got {part}")
    return parts


def _peer_names() -> set[str]:
    return {peer.name for size in SIZES for case in registry.cases(size) for peer in case.peers}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}")[:400]


if __name__ == "__main__":
    sys.exit(main())
