"""Comparing two results files: verdicts, missing cases, other machines, files that are none."""

import copy
import json

import pytest

from benchmarks import compare
from pydit.errors import FormatError


def row(case, us, iqr):
    return {"case": case, "op": "op", "shape": "1x2", "dtype": "bf16", "bytes": 8, "flops": 8, "not_raced": {}, "failed": {},
            "providers": {"pydit": {"us": us, "q1_us": us - iqr / 2, "q3_us": us + iqr / 2, "iqr_us": iqr, "gb_s": 1.0,
                                    "tflop_s": 1.0, "ratio": 1.0, "percent_of_limit": None, "method": "graph"}}}


def results(**times):
    return {"format": "pydit-bench", "version": 1, "limits": {}, "not_run": [],
            "machine": {"device": "NVIDIA H200", "kind": "cuda", "torch": "2.13", "commit": "abc", "dirty": False,
                        "date": "2026-11-21 10:00:00"},
            "rows": [row(case, *value) for case, value in times.items()]}


@pytest.mark.parametrize("old, new, ratio, verdict", [
    ((100, 4), (80, 4), 1.25, "faster"),
    ((80, 4), (100, 4), 0.8, "slower"),
    ((100, 30), (80, 30), 1.25, "within noise"),
    ((100, 0.1), (99.5, 0.1), 100 / 99.5, "within noise"),
    ((100, 0.1), (98, 0.1), 100 / 98, "faster"),
    ((100, 2), (100, 2), 1.0, "within noise"),
])
def test_verdict_respects_the_quartiles(old, new, ratio, verdict):
    got, = compare.compare(results(a=old), results(a=new))["rows"]
    assert got["verdict"] == verdict and got["ratio"] == pytest.approx(ratio)
    assert (got["old_us"], got["new_us"]) == (old[0], new[0])


def test_cases_missing_on_either_side_are_named(tmp_path):
    new = results(a=(1, 0.1), c=(1, 0.1))
    new["rows"].append({"case": "d", "wrong": "worst error"})
    got = compare.compare(results(a=(1, 0.1), b=(1, 0.1), d=(1, 0.1)), new)
    assert got["only_old"] == ["b", "d"] and got["only_new"] == ["c"]
    text = compare.describe(got, tmp_path / "old.json")
    assert "b: only in" in text and "c: only in this run" in text


def test_another_machine_is_said_loudly_and_gives_no_verdict(tmp_path):
    other = results(a=(100, 1))
    other["machine"]["device"] = "NVIDIA H100"
    got = compare.compare(other, results(a=(50, 1)))
    assert got["rows"][0]["verdict"] == "other machine"
    text = compare.describe(got, tmp_path)
    assert text.startswith("!!!") and "device was NVIDIA H100, is NVIDIA H200" in text
    assert "!!!" not in compare.describe(compare.compare(results(a=(1, 1)), results(a=(1, 1))), tmp_path)


def test_other_threads_are_another_machine():
    one, eight = results(a=(100, 1)), results(a=(20, 1))
    one["machine"]["threads"], eight["machine"]["threads"] = 1, 8
    got = compare.compare(one, eight)
    assert got["rows"][0]["verdict"] == "other machine" and got["machine"] == [("threads", 1, 8)]


def test_another_method_gives_no_verdict():
    """A graph leaves out what the host takes: around its limit a kernel is timed now so, now so."""
    old, new = results(a=(100, 1)), results(a=(50, 1))
    new["rows"][0]["providers"]["pydit"]["method"] = "stream"
    assert compare.compare(old, new)["rows"][0]["verdict"] == "other method"


def test_other_versions_are_a_note(tmp_path):
    other = results(a=(100, 1))
    other["machine"]["torch"] = "2.11"
    got = compare.compare(other, results(a=(50, 1)))
    assert got["rows"][0]["verdict"] == "faster"
    assert "torch was 2.11, is 2.13" in compare.describe(got, tmp_path)


def test_files_are_checked(tmp_path):
    good, path = results(a=(2, 1)), tmp_path / "r.json"
    path.write_text(json.dumps(good))
    assert compare.load(path) == good
    broken = {name: copy.deepcopy(good) for name in ("format", "version", "machine", "rows", "time")}
    del broken["format"]["format"], broken["machine"]["machine"]
    broken["version"]["version"] = 2
    broken["rows"]["rows"] = [3]
    broken["time"]["rows"][0]["providers"]["pydit"]["us"] = 0
    for name, message in (("format", "written by `pydit bench --json`"), ("version", "expected version 1, got 2"),
                          ("machine", "machine and rows"), ("rows", "machine and rows"), ("time", "positive us")):
        path.write_text(json.dumps(broken[name]))
        with pytest.raises(FormatError, match=f"compare: expected .*{message}|compare: {message}"):
            compare.load(path)
    def at(*keys, value=None):
        data = copy.deepcopy(good)
        place = data
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]
        if value is not None:
            place[keys[-1]] = value
        return data

    entry = ("rows", 0, "providers", "pydit")
    for data in (at("limits"), at("limits", value=3), at("not_run"), at("machine", "device"), at("machine", "commit"),
                 at("rows", 0, "op"), at("rows", 0, "bytes"), at("rows", 0, "bytes", value=0), at("rows", 0, "failed"),
                 at("rows", 0, "providers", value=[1]), at(*entry), at(*entry, "ratio"), at(*entry, "iqr_us", value="1"),
                 at(*entry, "q3_us", value=float("inf")), at(*entry, "us", value=float("nan")), good | {"paths": {"op": 1}},
                 good | {"rows": [{**good["rows"][0], "wrong": 3}]}):
        path.write_text(json.dumps(data))
        with pytest.raises(FormatError, match="compare: expected all that .*r.json"):
            compare.load(path)
    path.write_text("{")
    with pytest.raises(FormatError, match="compare: expected JSON"):
        compare.load(path)
