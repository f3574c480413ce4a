"""The runner: refuses wrong kernels, names every peer, and what it prints and writes can be read back. Times nothing."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, machine, registry, runner, table, timing
from benchmarks.peers import Peer, never
from pydit.cli import main as pydit

LIMITS = {"copy_gb_s": 100.0, "gemm_tflop_s": 1.0, "gemm": "fp32 1x1x1"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """One walk over two input sets; ceilings from a table. Functions run, times mean nothing."""
    monkeypatch.setitem(timing.MOST_SETS, "cpu", 2)
    monkeypatch.setattr(timing, "measure_limits", lambda device, rounds: dict(LIMITS))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def case(**changes):
    found = registry.find("ada_layer_norm/tiny", "small")[0]
    return dataclasses.replace(found, **{"peers": (), **changes})


def run(**changes):
    return runner.run_case(case(**changes), "cpu", LIMITS, rounds=3)


@pytest.mark.parametrize("wrong, message", [
    (lambda x, scale, shift: x * 1.01, "worst error"),
    (lambda x, scale, shift: x.new_full(x.shape, float("nan")), "not finite"),
    (lambda x, scale, shift: x[:, 1:], "expected shape"),
    (lambda x, scale, shift: (x, x), "expected 1 outputs, got 2"),
    (lambda x, scale, shift: x.double(), "expected torch.float32, got torch.float64"),
    (lambda x, scale, shift: 1 / 0, "ZeroDivisionError"),
])
def test_a_wrong_kernel_gets_no_figure(wrong, message):
    row = run(run=wrong)
    assert message in row["wrong"] and "providers" not in row
    data = {"machine": machine.describe("cpu"), "limits": LIMITS, "rows": [row], "not_run": []}
    line = table.render(data).splitlines()[-1]
    assert "WRONG, not timed" in line and message in line


def test_a_slightly_wrong_kernel_is_found():
    """One element off by a little more than the policy allows."""
    right = case().run

    def planted(*args):
        out = right(*args)
        out[1, -1, -1] += 1e-4
        return out

    assert "(1, 71, 95)" in run(run=planted)["wrong"]
    assert "wrong" not in run(run=right)


def test_peers_that_take_no_part_are_named():
    def raises():
        raise ImportError("no such symbol")

    peers = (Peer("good", lambda: case().eager), never("absent", "not installed"), Peer("broken", raises),
             Peer("crashes", lambda: lambda *args: 1 / 0), Peer("wrong", lambda: lambda x, scale, shift: x))
    row = run(peers=peers)
    assert set(row["providers"]) == {"pydit", "good"}
    assert row["not_raced"] == {"absent": "not installed"}
    assert row["failed"]["broken"] == "ImportError: no such symbol" and "division" in row["failed"]["crashes"]
    assert "worst error" in row["failed"]["wrong"]
    data = {"machine": machine.describe("cpu"), "limits": LIMITS, "rows": [row], "not_run": []}
    text = table.render(data)
    assert re.search(r"absent +not raced: not installed", text) and re.search(r"wrong +failed: .*worst error", text)


def test_an_unraced_peer_is_not_built():
    def build():
        raise AssertionError("built")

    row = runner.run_case(case(peers=(Peer("x", build),)), "cpu", LIMITS, rounds=3, peers=set())
    assert row["not_raced"] == {"x": "left out by --peers"} and row["failed"] == {}


def test_peers_are_left_out_by_parts_of_their_names():
    peers = tuple(Peer(name, lambda: case().eager) for name in ("eager", "sdpa math", "sdpa math masked", "torch.compile"))
    row = runner.run_case(case(peers=peers), "cpu", LIMITS, rounds=3, without=("compile", "math"))
    assert set(row["providers"]) == {"pydit", "eager"}
    assert row["not_raced"] == dict.fromkeys(("sdpa math", "sdpa math masked", "torch.compile"), "left out by --without")


def test_the_right_results_are_computed_once():
    calls = []
    right = case()
    row = run(exact=lambda *args: calls.append("exact") or right.exact(*args),
              eager=lambda *args: calls.append("eager") or right.eager(*args),
              peers=tuple(Peer(name, lambda: right.eager) for name in "abc"))
    assert set(row["providers"]) == {"pydit", "a", "b", "c"} and calls == ["exact", "eager"]


@pytest.mark.parametrize("error", [RuntimeError, ArithmeticError])  # torch's; one of another library
@pytest.mark.parametrize("victim", ["late", "pydit"])
def test_what_raises_while_all_are_timed_spares_the_others(victim, error):
    """As what has no memory left beside the others: right when it was verified and warmed up. A peer is taken out;
    where it is pydit, all peers are."""
    calls, right, own = [], case().eager, case().run
    fails = 5  # verified, warmed up with two inputs, and once in the first round

    def late(function):
        def call(*args):
            calls.append(1)
            if len(calls) == fails:
                raise error("out of memory")
            return function(*args)
        return call

    row = run(run=late(own) if victim == "pydit" else own,
              peers=(Peer("late", lambda: late(right) if victim == "late" else right), Peer("other", lambda: right)))
    lost = {"late"} if victim == "late" else {"late", "other"}
    assert set(row["providers"]) == {"pydit", "late", "other"} - lost and "wrong" not in row
    assert row["failed"] == dict.fromkeys(lost, f"while all were timed: {error.__name__}: out of memory")


def test_a_peer_whose_availability_raises_loses_itself_alone():
    def broken():
        raise AttributeError("module 'x' has no attribute 'y'")

    row = run(peers=(Peer("broken", lambda: abs, broken), Peer("good", lambda: case().eager)))
    assert set(row["providers"]) == {"pydit", "good"}
    assert row["failed"] == {"broken": "AttributeError: module 'x' has no attribute 'y'"}


def test_own_forms_are_marked_and_no_rivals():
    row = run(peers=(Peer("other form", lambda: case().run, rival=False), Peer("eager", lambda: case().eager)))
    assert row["providers"]["other form"]["rival"] is False and set(compare.rivals(row)) == {"eager"}


def test_a_case_that_raises_stops_no_other(tmp_path, capsys, monkeypatch):
    def make(device):
        raise ModuleNotFoundError("No module named 'diffusers'")

    cases = [case(make=make), case(model="other")]
    monkeypatch.setattr(runner, "find", lambda text, size, module: cases)
    assert pydit(["bench", "--json", str(tmp_path / "r.json"), "--rounds", "3"]) == 1
    first, second = compare.load(tmp_path / "r.json")["rows"]
    assert first["wrong"] == "ModuleNotFoundError: No module named 'diffusers'" and "providers" in second
    assert "WRONG, not timed: ModuleNotFoundError" in capsys.readouterr().out


def test_a_gpu_that_faulted_is_asked_nothing_more(tmp_path, capsys, monkeypatch):
    cases = [case(model=name) for name in "abc"]
    monkeypatch.setattr(runner, "find", lambda text, size, module: cases)
    monkeypatch.setattr(runner, "settle", lambda device: False)
    assert pydit(["bench", "--json", str(tmp_path / "r.json"), "--rounds", "3"]) == 0
    data = compare.load(tmp_path / "r.json")
    assert [row["model"] for row in data["rows"]] == ["a"] and data["not_run"] == [c.name for c in cases[1:]]
    assert not data["complete"] and f"the GPU has faulted in {cases[0].name}" in capsys.readouterr().err


def test_a_run_that_was_ended_is_gone_on_with(tmp_path, monkeypatch):
    """The second of three cases ends the process: the file says so, and the next process takes the third alone."""
    cases, done, path = [case(model=name) for name in "abc"], [], tmp_path / "r.json"
    arguments = ["bench", "--json", str(path), "--rounds", "3", "--case-seconds", "60"]
    monkeypatch.setattr(runner, "find", lambda text, size, module: cases)
    timed = runner.run_case

    def ends(case, *args, **options):
        if case.model == "b":
            raise KeyboardInterrupt
        done.append(case.model)
        return timed(case, *args, **options)

    monkeypatch.setattr(runner, "run_case", ends)
    assert pydit(arguments) == 130
    first = compare.load(path)
    assert first["running"] == cases[1].name and first["not_run"] == [cases[1].name, cases[2].name]
    monkeypatch.setattr(timing, "measure_limits", lambda *_: pytest.fail("the ceilings are those of the first process"))
    assert pydit([*arguments, "--resume"]) == 1 and done == ["a", "c"]
    data = compare.load(path)
    assert [row["case"] for row in data["rows"]] == [case.name for case in (cases[0], cases[1], cases[2])]
    assert data["rows"][1]["wrong"] == "the process ended in this case" and data["limits"] == LIMITS
    assert "running" not in data and not data["not_run"] and data["rows"][0] == first["rows"][0]
    assert pydit(["bench", "--resume"]) == 2


@pytest.fixture
def abc(tmp_path, monkeypatch):
    """A command on three cases that writes r.json; ``ends`` names one in which the process is to end."""
    timed = runner.run_case

    def call(*options, ends=None):
        def run_case(case, *args, **more):
            if case.model == ends:
                raise KeyboardInterrupt
            return timed(case, *args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "find", lambda text, *_: [case(model=name) for name in text or "abc"])
            patch.setattr(runner, "run_case", run_case)
            return pydit(["bench", "--json", str(path), "--rounds", "3", *options])

    path = tmp_path / "r.json"
    call.path, call.partial = path, tmp_path / "r.json.partial"
    return call


def test_figures_of_an_earlier_run_stay_until_there_are_others(abc, capsys, monkeypatch):
    assert abc() == 0 and not abc.partial.exists()
    first = abc.path.read_bytes()
    assert abc(ends="b") == 130 and abc.path.read_bytes() == first
    assert [row["model"] for row in compare.load(abc.partial)["rows"]] == ["a"]
    assert abc("--seconds", "1e-9") == 0 and abc.path.read_bytes() == first
    assert "is as it was: this run ended before its last case, and what it has is in" in capsys.readouterr().err
    assert abc(ends="c") == 130
    assert abc("--resume") == 1 and not abc.partial.exists()  # in c a process ended
    data = compare.load(abc.path)
    assert [row["model"] for row in data["rows"]] == ["a", "b", "c"] and "wrong" in data["rows"][2]
    assert abc() == 0 and "wrong" not in compare.load(abc.path)["rows"][2] and not abc.partial.exists()


def test_figures_of_other_cases_are_not_replaced(abc, capsys):
    """Those of more cases than this run takes; fewer are."""
    assert abc("--filter", "ab") == 0 and abc() == 0
    first = abc.path.read_bytes()
    assert abc("--filter", "b") == 2 and abc.path.read_bytes() == first
    assert re.search(r"json: expected a new file, or one whose cases this run takes too, got \S+r.json of commit \w+ with 2 "
                     "more, such as ada_layer_norm/a/", capsys.readouterr().err)


@pytest.mark.parametrize("field, value", [("device", "NVIDIA H100"), ("commit", "abc1234"), ("threads", 77), ("torch", "2.0")])
def test_a_run_goes_on_where_it_began(abc, capsys, field, value):
    """Else figures and ceilings of two machines would stand under the line of one."""
    assert abc(ends="b") == 130
    data = compare.load(abc.path)
    abc.path.write_text(json.dumps({**data, "machine": {**data["machine"], field: value}}))
    before = abc.path.read_bytes()
    assert abc("--resume") == 2 and abc.path.read_bytes() == before
    assert f"resume: expected results of this machine and this code, got {abc.path} with {field} {value} instead of" \
        in capsys.readouterr().err


def test_what_earlier_processes_saw_of_the_machine_is_kept(abc, monkeypatch):
    assert abc(ends="b") == 130
    data = compare.load(abc.path)
    seen = machine.summarise([{"power_w": 100.0, "throttle": 4}])
    paths = {"op": {"path": "cuda", "reason": "", "calls": 1}}
    abc.path.write_text(json.dumps({**data, "machine": {**data["machine"], "sampled": seen}, "paths": paths}))
    monkeypatch.setattr(machine.Sampler, "result", lambda self: {"sampled": machine.summarise([{"power_w": 300.0, "throttle": 0}])})
    assert abc("--resume") == 1
    data = compare.load(abc.path)
    assert data["machine"]["sampled"]["power_w"] == {"min": 100.0, "median": 200.0, "max": 300.0}
    assert data["machine"]["sampled"]["throttled"] == {"software power cap": 0.5} and set(data["paths"]) > {"op"}


def test_a_case_that_hangs_ends_the_process(tmp_path):
    """In a process of its own, which says where it hung; the file says in which case."""
    code = f"""
import dataclasses, time
from benchmarks import registry, runner, timing
timing.measure_limits = lambda *_: {{}}
hangs = dataclasses.replace(registry.find("ada_layer_norm/tiny", "small")[0], make=lambda device: time.sleep(100))
runner.find = lambda *_: [hangs]
runner.main(["--json", {str(tmp_path / 'r.json')!r}, "--case-seconds", "0.5"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Timeout" in done.stderr and "run_case" in done.stderr
    assert compare.load(tmp_path / "r.json")["running"] == registry.find("ada_layer_norm/tiny", "small")[0].name


def test_ceilings_that_cannot_be_measured_lose_no_case(tmp_path, monkeypatch, capsys):
    def raises(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(timing, "measure_limits", raises)
    monkeypatch.setattr(runner, "find", lambda text, size, module: [case()])
    assert pydit(["bench", "--json", str(tmp_path / "r.json"), "--rounds", "3"]) == 0
    data = compare.load(tmp_path / "r.json")
    assert data["limits"] == {} and data["limits_failed"] == "RuntimeError: out of memory" and len(data["rows"]) == 1
    assert "ceilings not measured" in capsys.readouterr().out


def test_an_allocator_that_cannot_is_no_fault_of_the_gpu(monkeypatch):
    def raises():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    assert runner.settle("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", raises)
    assert not runner.settle("cuda")


@pytest.mark.parametrize("raised", [RuntimeError, ArithmeticError])
def test_a_failed_capture_leaves_no_trace(monkeypatch, raised):
    """Stand-ins for CUDA: ``torch.cuda.graph`` changes the stream, and its exit raises before it changes it back and
    before the allocator and the generator end the capture. They would give neither memory back nor random numbers. Nor
    does it take diffusers to clean up, which a GPU machine may lack."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in [name for name in sys.modules if name.startswith(("pydit.inference.", "pydit.models."))]:
        monkeypatch.delitem(sys.modules, name)
    now, recording, states = ["default"], [], []
    generator = SimpleNamespace(clone_state=lambda: "free", graphsafe_set_state=states.append)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))

    class Graph:
        def __init__(self, graph, pool):
            recording.append(pool)

        def __enter__(self):
            now[0] = "capture"

        def __exit__(self, *error):
            raise raised("operation failed due to a previous error during capture")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"graph": Graph, "CUDAGraph": lambda: None, "Stream": lambda: stream, "synchronize": lambda: None,
                        "stream": lambda stream: contextlib.nullcontext(),
                        "current_stream": lambda: stream if now[0] == "default" else None,
                        "current_device": lambda: 0, "graph_pool_handle": lambda: (0, 7),
                        "set_stream": lambda to: now.__setitem__(0, "default" if to is stream else "wrong")}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    released = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: recording.remove(pool))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: released.append(pool))
    assert timing.timer(lambda x: x, [(1,), (2,)], "cuda")[1] == "stream" and now == ["default"]
    assert recording == [] and released == [(0, 7)] and states == ["free"]


@pytest.mark.parametrize("written, method", [("all", "graph"), ("a part", "stream"), ("nothing", "stream")])
def test_a_graph_that_does_not_do_the_work_is_not_timed(monkeypatch, written, method):
    """As one into which a kernel on another stream was not captured. In place, an input's memory is left alone."""
    outs = []

    def function(x, sums):
        outs.append(x + 1)
        return outs[-1], sums

    def replay():
        if written != "nothing":
            for out in outs[-2:]:
                out[: None if written == "all" else -1] = 2.0

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"graph": lambda graph, pool: contextlib.nullcontext(), "synchronize": lambda: None,
                        "CUDAGraph": lambda: SimpleNamespace(replay=replay), "Stream": lambda: stream,
                        "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda: stream,
                        "graph_pool_handle": lambda: (0, 7)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    inputs = [(torch.ones(3), torch.ones(2)) for _ in "ab"]
    assert timing.timer(function, inputs, "cuda")[1] == method
    assert all(x.eq(1).all() for args in inputs for x in args)


def test_the_ceiling_is_the_fastest_of_several_products(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(timing, "CPU_PRODUCTS", ((8, 8, 8), (256, 8, 128)))
    monkeypatch.setattr(timing, "CPU_COPIES_MB", (1,))
    monkeypatch.setattr(timing, "interleave", lambda timers, rounds: {name: [2.0] for name in timers})
    limits = timing.measure_limits("cpu", 3)
    assert limits["gemm"] == "fp32 256x8x128" and limits["gemm_tflop_s"] == 2 * 256 * 8 * 128 / 2.0 / 1e6
    assert set(limits["gemm_tflop_s_by_shape"]) == {"fp32 8x8x8", "fp32 256x8x128"} and limits["copy_gb_s"] == 500.0


def test_percent_of_limit_needs_both_ceilings():
    entry = run()["providers"]["pydit"]
    assert entry["percent_of_limit"] == pytest.approx(100 * case().floor_us(LIMITS) / entry["us"])
    assert entry["gb_s"] == pytest.approx(case().work.bytes / entry["us"] / 1e3)
    for limits in ({}, {"copy_gb_s": 1.0}):
        assert runner.run_case(case(), "cpu", limits, rounds=3)["providers"]["pydit"]["percent_of_limit"] is None


def test_interleaving_alternates_and_drops_the_warm_up():
    calls = []
    timers = {name: (lambda name=name: calls.append(name) or float(len(calls))) for name in "ab"}
    samples = timing.interleave(timers, 4)
    assert "".join(calls) == "abba" * 3
    assert samples == {"a": [5.0, 8.0, 9.0, 12.0], "b": [6.0, 7.0, 10.0, 11.0]}


def test_summary_is_median_and_quartiles():
    assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0]) == {"us": 3.0, "q1_us": 2.0, "q3_us": 4.0, "iqr_us": 2.0}


def test_inputs_are_rotated(monkeypatch):
    monkeypatch.setitem(timing.MOST_SETS, "cpu", 256)
    monkeypatch.setitem(timing.ROTATED_BYTES, "cpu", 1000)
    assert [len(timing.input_sets(lambda device: (), nbytes, "cpu")) for nbytes in (0, 100, 101, 999, 5000)] == \
        [256, 10, 10, 2, 2]


def test_sensors_are_summarised():
    rows = [{"sm_clock_mhz": 1980, "power_w": 100.0, "throttle": 0x0}, {"sm_clock_mhz": 1500, "throttle": 0x24},
            {"sm_clock_mhz": 1700, "throttle": 0x1}]
    seen = machine.summarise(rows)
    assert seen["sm_clock_mhz"] == {"min": 1500, "median": 1700, "max": 1980} and seen["power_w"]["median"] == 100.0
    assert seen["throttled"] == {"software power cap": 1 / 3, "software thermal": 1 / 3} and seen["samples"] == 3
    line = machine.sentence(machine.describe("cpu") | {"sampled": seen, "power_limit_w": 700.0, "commit": "abc",
                                                      "dirty": True})
    assert "1700 MHz SM (1500 to 1980)" in line and "commit abc (dirty tree)" in line and "software thermal 33%" in line


def test_command_line_writes_what_it_prints(tmp_path, capsys):
    path, picture = tmp_path / "new.json", tmp_path / "roofline.png"
    arguments = ["bench", "--size", "small", "--rounds", "3", "--peers", "eager", "--json", str(path)]
    assert pydit([*arguments, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    data = compare.load(path)
    assert data["complete"] and not data["not_run"] and len(data["rows"]) == len(registry.cases("small"))
    assert data["limits"] == LIMITS and data["machine"]["kind"] == "cpu"
    assert out.startswith(machine.sentence(data["machine"]))
    assert table.render(data) in out and picture.read_bytes()[:4] == b"\x89PNG"
    for row in data["rows"]:
        assert set(row["providers"]) == {"pydit", "eager"} and "torch.compile" in row["not_raced"]
    assert pydit([*arguments[:-1], str(tmp_path / "again.json"), "--compare", str(path)]) == 0
    assert "ratio = old time / new time" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "again.json").read_text())["compared"]["rows"]) == len(data["rows"])
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".part"]


def test_a_wrong_case_fails_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "find", lambda text, size, module: [case(run=lambda x, scale, shift: x)])
    assert pydit(["bench", "--json", str(tmp_path / "r.json")]) == 1
    assert "WRONG" in capsys.readouterr().out and "wrong" in compare.load(tmp_path / "r.json")["rows"][0]


def test_list_and_time_limit(capsys, tmp_path):
    assert pydit(["bench", "--list", "--size", "full"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(registry.cases("full"))
    assert pydit(["bench", "--size", "small", "--seconds", "1e-9", "--json", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out.count("not run, out of time") == len(registry.cases("small"))
    assert pydit(["bench", "--list", "--size", "small", "--module", "linear"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(registry.cases("small", "linear"))


def test_a_part_of_the_registry_is_no_complete_run(tmp_path):
    arguments = ["bench", "--size", "small", "--rounds", "3", "--peers", "none", "--json", str(tmp_path / "r.json")]
    for part in (["--module", "second_moments"], ["--filter", "second_moments"]):
        assert pydit([*arguments, *part]) == 0
        data = compare.load(tmp_path / "r.json")
        assert not data["not_run"] and not data["complete"]


@pytest.mark.parametrize("arguments, message", [
    (["--filter", "nothing"], "filter: expected part of a case name"),
    (["--peers", "eager,magic"], "peers: expected none or names out of .*, got magic$"),
    (["--without", "eager,magic"], "without: expected parts of .*, got magic$"),
    (["--module", "nothing"], "module: expected one of attention, .*, got 'nothing'$"),
    (["--rounds", "2"], "rounds: expected at least 3, got 2"),
    (["--rounds", "many"], "expected a whole number"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--compare", "/nowhere.json"], "compare: expected a JSON file, got a path that does not exist"),
    (["--json", "/"], "json: expected a file or a new path, got a directory"),
    (["--json", "/proc/none/x.json"], "/proc/none"),
    (["--no-such-option"], "unrecognized arguments: --no-such-option"),
])
def test_bad_input_is_one_line(arguments, message, capsys):
    assert pydit(["bench", "--size", "small", "--peers", "none", "--rounds", "3", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pydit bench: error: ") and re.search(message, error)


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out.json").write_text('{"format": "pydit-bench"}')
    monkeypatch.setattr(os, "fsync", full)
    assert pydit(["bench", "--size", "small", "--peers", "none", "--filter", "ada_layer_norm/tiny",
                  "--json", str(tmp_path / "out.json")]) == 2
    assert re.match(r"pydit bench: error: \S+/out.json.partial: No space left on device; .*make room and run it again$",
                    capsys.readouterr().err.strip().splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"] and (tmp_path / "out.json").stat().st_size == 25


def test_rates_stand_against_the_data_sheet():
    assert machine.peak("NVIDIA H200") == machine.peak("NVIDIA H100 80GB HBM3") == 989 and machine.peak("AMD EPYC") is None
    found = registry.find("joint_attention/tiny", "small")[1]
    row = runner.run_case(dataclasses.replace(found, peers=()), "cpu", {}, rounds=3)
    row["providers"]["pydit"]["tflop_s"] = 494.5
    data = {"machine": machine.describe("cpu") | {"peak_tflop_s": 989.0}, "limits": {}, "rows": [row], "not_run": []}
    assert "50.0% of 989 TFLOP/s" in table.render(data)
