"""README tables come from results files: written, checked, and refused when the markers are not pairs."""

import json

import pytest

from benchmarks import compare, machine, registry, steps, table, tables
from pydit.files import read_json
from pydit.plan import PruningPlan

README = "# x\n<!-- table: gpu -->\nold\n<!-- end of table: gpu -->\nbetween\n<!-- table: demo -->\n<!-- end of table: demo -->\n"


def entry(us, ratio=1.0, percent=80.0):
    return {"us": us, "q1_us": us, "q3_us": us, "iqr_us": 0.0, "gb_s": 4000.0, "tflop_s": 1.0, "ratio": ratio,
            "percent_of_limit": percent, "method": "graph"}


def run(device="NVIDIA H200", kind="cuda", date="2026-11-21 10:00:00", us=20.0):
    return {"format": "pydit-bench", "version": 1, "complete": True, "limits": {}, "not_run": [],
            "machine": {"device": device, "kind": kind, "date": date, "commit": "abc", "dirty": False},
            "rows": [{"case": "op/m/1/bf16", "op": "op", "shape": "1x2", "dtype": "bf16", "bytes": 8, "flops": 8,
                      "not_raced": {}, "failed": {}, "providers": {"pydit": entry(us), "eager": entry(60.0, 3.0), "fast": entry(30.0, 1.5)}},
                     {"case": "bad/m/1/bf16", "op": "bad", "shape": "1x2", "dtype": "bf16", "bytes": 8, "flops": 8,
                      "wrong": "worst error"}]}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(README)

    def call(action):
        return tables.main([action, "--readme", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")])

    call.path = tmp_path
    return call


def test_the_newest_quality_run_is_shown(place):
    """And a file of another format is refused by name."""
    page, results = place.path / "README.md", place.path / "results"
    page.write_text("<!-- table: quality -->\n<!-- end of table: quality -->\n")
    assert place("--write") == 0 and "Not measured yet." in page.read_text()
    for date, met in (("2026-11-26", 0.5), ("2026-11-25", 0.25)):
        row = {"cell": {"table": "methods", "name": "ppcl", "share": 0.5, "seed": 0}, "parameters": 1000, "overall": met,
               "plan": PruningPlan.from_intervals(16, [[2, 9]]).to_dict(), "velocity_error": 0.25,
               "loss": {"value": 1 - met, "low": 0.25, "high": 0.75}}
        (results / f"quality-cpu-{date}.json").write_text(json.dumps(
            {"format": "pydit-quality", "version": 1, "rows": [row]}))
    assert place("--write") == 0 and place("--check") == 0
    assert "| ppcl | 7 of 16 | 1,000 | 50.0 % | 50.0 % [25.0, 75.0] | 0.2500 | 1 |" in page.read_text()
    (results / "quality-cpu-2026-11-27.json").write_text("{}")
    assert place("--check") == 2


def test_the_newest_narrow_run_of_each_dtype_is_shown(place):
    page, results = place.path / "README.md", place.path / "results"
    page.write_text("<!-- table: narrow -->\n<!-- end of table: narrow -->\n")
    assert place("--write") == 0 and "Not measured yet." in page.read_text()
    for dtype, date, ratio in (("bf16", "2026-11-26", 1.25), ("bf16", "2026-11-25", 0.5), ("fp32", "2026-11-24", 1.0)):
        row = {"model": "flux dual", "width": 64, "tokens": 16, "dtype": dtype, "ratio": ratio, "ratio_q1": 0.75, "ratio_q3": 1.5}
        (results / f"narrow-{dtype}-cpu-{date}.json").write_text(json.dumps(
            {"format": "pydit-bench-model", "rows": [row], "machine": run()["machine"]}))
    assert place("--write") == 0 and place("--check") == 0
    shown = page.read_text()
    assert "| flux dual | 64 | 16 | 1.00 (0.75 to 1.50) | 1.25 (0.75 to 1.50) |" in shown and "cpu-2026-11-25" not in shown
    (results / "narrow-bf16-cpu-2026-11-27.json").write_text("{}")
    assert place("--check") == 2


def test_without_a_gpu_run_the_table_says_so(place):
    (place.path / "results" / "cpu.json").write_text(json.dumps(run(kind="cpu")))
    assert place("--check") == 1
    assert (place.path / "README.md").read_text() == README
    assert place("--write") == 0 and place("--check") == 0
    text = (place.path / "README.md").read_text()
    assert text.count("Not measured yet.") == 2 and "old" not in text and "\nbetween\n" in text


def test_newest_run_of_each_gpu_against_its_fastest_peer(place):
    for name, data in {"a": run(us=99.0, date="2026-11-20 10:00:00"), "b": run(), "c": run(device="NVIDIA H100")}.items():
        (place.path / "results" / f"{name}.json").write_text(json.dumps(data))
    assert place("--write") == 0
    text = (place.path / "README.md").read_text()
    assert text.count("| `op` | 1x2 | bf16 | 20.0 (0.0) | 4000 GB/s | 80 % | fast | 1.50 |") == 2
    assert "99.0" not in text and "NVIDIA H100" in text and "(benchmarks/results/b.json)" in text
    assert text.count("| `bad` | 1x2 | bf16 | no figure: worst error |") == 2
    (place.path / "results" / "b.json").write_text(json.dumps(run(us=21.0)))
    assert place("--check") == 1


def test_a_peer_that_no_graph_holds_says_so(place):
    data = run()
    data["rows"][0]["providers"]["fast"]["method"] = "stream"
    (place.path / "results" / "a.json").write_text(json.dumps(data))
    assert place("--write") == 0 and "| fast (by stream) | 1.50 |" in (place.path / "README.md").read_text()


@pytest.mark.parametrize("paths, told", [
    ({"op": "cuda (not measured yet)", "joint_linear": "torch (PYDIT_GEMM=library)"}, False), ({"op": "torch (why)"}, True),
    ({"other": "reference (the driver is too old)"}, True)])
def test_a_figure_of_torchs_own_says_so(place, paths, told):
    """Of a kernel that fell back; not of a block's products, which are the library's by choice."""
    data = run()
    data["rows"][0]["paths"] = paths
    (place.path / "results" / "a.json").write_text(json.dumps(data))
    assert place("--write") == 0
    assert ("| 20.0 (0.0) by torch |" in (place.path / "README.md").read_text()) == told
    assert any("by torch: " in line and line.split()[0] == "pydit" for line in table.render(data).splitlines()) == told


def test_a_partial_run_takes_no_complete_ones_place(place):
    results = place.path / "results"
    (results / "later.json").write_text(json.dumps({**run(date="2026-11-22 10:00:00", us=99.0), "complete": False}))
    assert place("--write") == 0 and "99.0" in (place.path / "README.md").read_text()  # better than none
    (results / "before.json").write_text(json.dumps(run()))
    assert place("--write") == 0 and "99.0" not in (place.path / "README.md").read_text()


def test_rows_of_the_same_commit_that_raced_more_peers_are_shown(place):
    """What a second visit raced, and none of it where the code was another; own forms are no peers, and who is missing
    is said."""
    first, second, other = run(), run(date="2026-11-21 11:00:00"), run(date="2026-11-21 12:00:00")
    first["rows"][0] |= {"not_raced": {"torch.compile": "left out by --without"}, "failed": {
        "x": "op/m/1 output 0: worst error 2", "y": "while all were timed: OutOfMemoryError: no"}}
    first["rows"][0]["providers"]["other form"] = {**entry(1.0, 0.05), "rival": False}
    for data in (second, other):
        data["complete"] = False
        data["rows"] = [{**data["rows"][0], "providers": {**data["rows"][0]["providers"], "torch.compile": entry(24.0, 1.2)}}]
    other["machine"]["commit"] = "def"
    results, page = place.path / "results", place.path / "README.md"
    (results / "a.json").write_text(json.dumps(first))
    (results / "c.json").write_text(json.dumps(other))
    assert place("--write") == 0
    assert "| 20.0 (0.0) | 4000 GB/s | 80 % | fast | 1.50 |" in page.read_text() and "c.json" not in page.read_text()
    assert "torch.compile (1: left out by --without); x (1: wrong result); y (1: OutOfMemoryError)." in page.read_text()
    (results / "b.json").write_text(json.dumps(second))
    assert place("--write") == 0
    text = page.read_text()
    assert "| 20.0 (0.0) [2] | 4000 GB/s | 80 % | torch.compile | 1.20 |" in text and "(benchmarks/results/b.json)" in text
    assert "[2] NVIDIA H200" in text and "no figure: worst error" in text and "Not raced" not in text


@pytest.mark.parametrize("data", [
    {"format": "pydit-bench"}, {**run(), "machine": []}, {**run(), "machine": {"kind": "cuda"}},
    {**run(), "rows": [{"case": "a", "providers": [1]}]},
    {**run(), "rows": [{"case": "a", "providers": {"pydit": {"us": 1, "q1_us": 1, "q3_us": 1}}}]},
    {**run(), "rows": [{**run()["rows"][1], "wrong": 3}]}])
def test_a_results_file_without_its_parts_is_named(place, capsys, data):
    (place.path / "results" / "broken.json").write_text(json.dumps(data))
    assert place("--check") == 2
    assert "tables: error: results: expected" in (error := capsys.readouterr().err) and "broken.json" in error


@pytest.mark.parametrize("table_of, data", [
    ("demo", {"teacher": {"per_category": 3}}), ("demo", []), ("narrow", {"format": "pydit-bench-model", "rows": []}),
    ("narrow", {"format": "pydit-bench-model", "rows": [{"dtype": "bf16"}]}), ("quality", {"format": "pydit-quality", "version": 1, "rows": [3]})])
def test_a_file_without_the_parts_of_its_table_is_named(place, capsys, table_of, data):
    (place.path / "README.md").write_text(f"<!-- table: {table_of} -->\n<!-- end of table: {table_of} -->\n")
    (place.path / "results" / f"{table_of}-cpu-2026-11-26.json").write_text(json.dumps(data))
    assert place("--check") == 2 and "tables: error: " in capsys.readouterr().err


def test_demo_table_of_the_committed_run():
    text = tables.demo_table(tables.RESULTS)
    path = max(tables.RESULTS.glob("demo-*.json"), key=lambda path: path.stem[-10:])
    data = read_json(path, what="results")
    assert f"| teacher | {data['blocks']['teacher']} | {data['parameters']['teacher']:,} |" in text
    assert f"| {100 * data['distilled']['overall']:.1f} % |" in text.splitlines()[-1]


@pytest.mark.parametrize("text", ["none", "<!-- table: gpu -->\n", "<!-- table: x -->\n<!-- end of table: x -->\n"])
def test_wrong_markers_are_refused(place, capsys, text):
    (place.path / "README.md").write_text(text)
    assert place("--write") == 2
    assert "expected pairs of markers" in capsys.readouterr().err
    assert (place.path / "README.md").read_text() == text


def test_steps_join_the_results_file(tmp_path, capsys):
    out, lines = tmp_path / "h200.json", tmp_path / "steps.tsv"
    lines.write_text("import\tpassed\t3\nmemcheck\tnot run: no compute-sanitizer on PATH\t0\n")
    out.write_text(json.dumps(run()))
    assert steps.main([str(lines), str(out)]) == 0
    assert read_json(out, what="out")["steps"][1] == {"step": "memcheck", "seconds": 0,
                                                      "state": "not run: no compute-sanitizer on PATH"}
    assert "1 cases timed, 1 wrong, 0 not run" in capsys.readouterr().out


def test_parts_become_one_file(tmp_path, capsys):
    """Of two processes, the second of which ended before its last case; a third left nothing behind."""
    names = [case.name for case in registry.cases("full")]
    out, lines = tmp_path / "h200.json", tmp_path / "steps.tsv"
    lines.write_text("bench_a\tpassed\t9\nbench_b\tout of time\t70\nbench_c\tfailed (1)\t2\n")
    parts = []
    for part, mine, copy in (("a", names[:2], 4000.0), ("b", names[2:3], 4100.0)):
        data = run()
        data["rows"] = [{**data["rows"][0], "case": name} for name in mine]
        data |= {"limits": {"copy_gb_s": copy, "gemm_tflop_s": 700.0, "gemm": "bf16"}, "paths": {part: {"path": "cuda", "reason": ""}},
                 "not_run": names[3:4] if part == "b" else [], "complete": False}
        parts.append(tmp_path / f"{part}.json")
        parts[-1].write_text(json.dumps(data))
    (tmp_path / "c.json").write_text("{")
    assert steps.main([str(path) for path in (lines, out, *parts, tmp_path / "c.json")]) == 0
    data = compare.load(out)
    assert [row["case"] for row in data["rows"]] == names[:3] and data["not_run"] == names[3:] and not data["complete"]
    assert data["limits"]["copy_gb_s"] == 4000.0 and set(data["paths"]) == {"a", "b"}
    assert data["parts"]["b"]["limits"]["copy_gb_s"] == 4100.0 and data["parts"]["b"]["not_run"] == names[3:4]
    assert f"3 cases timed, 0 wrong, {len(names) - 3} not run" in capsys.readouterr().out
    ended = steps.merge({"a": {**run(), "running": "x"}, "b": {**run(), "limits_failed": "why"}})
    assert "running" not in ended and ended["parts"]["a"]["running"] == "x"
    assert ended["parts"]["b"]["limits_failed"] == "why"
    whole = {**run(), "rows": [{**run()["rows"][0], "case": name} for name in names]}
    assert steps.merge({"all": whole})["complete"]


def test_samples_of_several_processes_are_one_machines():
    seen = [machine.summarise([{"power_w": watts, "throttle": bits} for watts in (100.0, 200.0, 300.0 + bits)])
            for bits in (0, 4)]
    sampled = machine.together([{"sampled": seen[0]}, {}, {"sampled": seen[1]}])["sampled"]
    assert sampled["power_w"] == {"min": 100.0, "median": 200.0, "max": 304.0} and sampled["samples"] == 6
    assert sampled["throttled"] == {"software power cap": 0.5}
    assert machine.together([{}, {"sampling_error": "no driver"}]) == {}
