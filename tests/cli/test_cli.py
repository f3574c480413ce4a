"""The command line: every kind of bad input ends with one line, exit code 2 and nothing half-written."""

import argparse
import errno
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pydit.cli
from pydit import files
from pydit.analysis import ActivationStats
from pydit.cli import main
from pydit.errors import UserError
from pydit.plan import PruningPlan
from tests.demo.pipelines import untrained
from tests.models import tiny

COMMANDS = ("demo", "analyze", "plan", "prune", "distill", "generate", "eval", "bench", "doctor")


@pytest.fixture
def fails(capfd):
    """Run a command that must fail: exit code 2 and one line on standard error, which is returned."""
    untrained()  # what writing it prints, once, is not the command's
    capfd.readouterr()

    def run(*argv, code=2):
        assert main([str(a) for a in argv]) == code
        out, err = capfd.readouterr()
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("pydit: error: "), err
        assert "Traceback" not in err and out == ""
        return lines[0]

    return run


@pytest.fixture
def plan_file(tmp_path):
    PruningPlan.from_intervals(6, [(1, 2), (4, 5)]).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def _tree(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and f"example:\n  pydit {command}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_plan_is_checked_before_it_is_written(tmp_path, fails, capfd):
    untrained()
    capfd.readouterr()  # what making it printed
    argv = ("plan", "--intervals", "[[1,2]]", "--num-layers", 6, "--out", tmp_path / "plan.json", "--check", untrained())
    assert "prompts: expected a file with one prompt per line or demo" in fails(*argv)
    assert "plan: expected a plan for the model's 6 layers, got one for 60" in fails(
        "plan", "--preset", "ppcl-qwen-image-12b", "--out", tmp_path / "p.json", "--check", untrained(), "--prompts", "demo")
    assert _tree(tmp_path) == []


def test_max_memory_says_what_it_costs(capsys):
    from pydit.cli import model

    def directions(gigabytes):
        return model._directions(tiny.transformer(2), argparse.Namespace(batches=4, tokens=8, max_memory=gigabytes))

    most = ActivationStats.estimate_bytes(2, 64, sample_batches=3, tokens=8) / 1e9
    assert directions(most) is None and capsys.readouterr().err == ""
    kept = directions(most / 2)
    assert ActivationStats.estimate_bytes(2, kept, sample_batches=3, tokens=8) <= most / 2 * 1e9
    assert ActivationStats.estimate_bytes(2, kept + 8, sample_batches=3, tokens=8) > most / 2 * 1e9
    assert f"standard error of a cosine {100 * (2 / kept) ** 0.5:.1f} %" in capsys.readouterr().err
    with pytest.raises(UserError, match="max-memory: expected at least .* GB for 2 blocks of 64 channels, got 1e-06"):
        directions(1e-6)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in COMMANDS)


def test_import_is_light():
    heavy = "{'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy', 'rich', 'tqdm'}"
    code = f"import sys, pydit.cli; pydit.cli._parse(['doctor']); print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_module_entry_point_and_exit_code():
    result = subprocess.run([sys.executable, "-m", "pydit", "plan", "--preset", "nope"], capture_output=True, text=True,
                            check=False)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "preset: expected one of ppcl-qwen-image-14b" in result.stderr


@pytest.mark.parametrize(("argv", "message"), [
    ([], "the following arguments are required: COMMAND"),
    (["generate"], "the following arguments are required: PIPELINE, --out .see"),  # prompts may come from a file
    (["fly"], "invalid choice: 'fly'"),
    (["doctor", "--fast"], "unrecognized arguments: --fast"),
    (["plan", "--preset", "x", "--show", "y"], "plan: expected exactly one of .*, got --preset and --show"),
    (["plan"], "plan: expected exactly one of .*, got none"),
    (["plan", "--search", "x", "--prompts", "demo", "--target", "auto"], "target: expected a number .* with --search, got auto"),
    (["plan", "--preset", ""], "preset: expected one of .*, got ''"),  # as of an unset variable
    (["plan", "--intervals", "", "--num-layers", "6"], "intervals: expected a JSON list"),
    (["plan", "--intervals", "[[3,4],[4,7]]", "--num-layers", "60"], "expected disjoint intervals, got .3, 4. and .4, 7."),
    (["plan", "--intervals", "[[58,60]]", "--num-layers", "60"], "expected layers 0 to 59, got .58, 60., which is out of range"),
    (["plan", "--intervals", "[[4,3]]", "--num-layers", "60"], "reversed interval"),
    (["plan", "--intervals", "[[3,4]", "--num-layers", "60"], "intervals: expected a JSON list"),
    (["plan", "--intervals", "7", "--num-layers", "60"], "intervals: expected a JSON list"),
    (["plan", "--intervals", "[[3,4]]"], "num-layers: expected with --intervals, got none"),
    (["plan", "--intervals", "[[3,4]]", "--num-layers", "60", "--family", "flux.9"], "family: expected one of"),
    (["plan", "--show", "/nowhere/plan.json"], "plan: expected a JSON file, got a path that does not exist"),
    (["plan", "/nowhere/stats.safetensors"], "stats: expected a safetensors file, got a path that does not exist"),
    (["plan", "--search", "/nowhere", "--prompts", "demo"], "pipeline: expected a pipeline directory"),
    (["plan", "--search", "x"], "pipeline: expected a pipeline directory"),
    (["plan", "x", "--compare", "--protect-last", "1"], "compare: expected STATS alone, got --protect-last"),
    (["plan", "x", "--trial", "5"], "check: expected a pipeline with --trial, got none"),
    (["plan", "x", "--trial-lr", "1"], "trial: expected steps with --trial-lr, got none"),
    (["plan", "--preset", "ppcl-qwen-image-12b", "--check", "/nowhere"], "pipeline: expected a pipeline directory"),
    (["plan", "x", "--target", "1.5"], "argument --target: expected a share between 0 and 1, .*, got '1.5'"),
    (["prune", "/nowhere/x", "--plan", "p", "--out", "/nowhere/y/../x"], "out: expected a directory apart from /nowhere/x, which is read"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "x"], "out: expected a directory apart from x, which is read, got x"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "./y"], "out: expected a directory apart from y, which is read"),
    (["demo", "--budget-minutes", "-1"], "argument --budget-minutes: expected a number above 0, got '-1'"),
    (["demo", "--prompts", "0"], "argument --prompts: expected a whole number of at least 1, got '0'"),
    (["demo", "--teacher", "/nowhere"], "pipeline: expected a pipeline directory, got a path that does not exist"),
    (["generate", "/nowhere", "a cat", "--out", "images"], "pipeline: expected a pipeline directory"),
    (["generate", "x", "a cat", "--out", "images", "--device", "warp"], "device: expected a torch device"),
    # Those that torch has a name for and cannot use fail in as many ways.
    (["generate", "x", "a cat", "--out", "images", "--device", "meta"], "device: expected one that torch can use, got 'meta'"),
    (["generate", "x", "a cat", "--out", "images", "--device", "fpga"], "device: expected one that torch can use, got 'fpga'"),
    (["generate", "x", "a cat", "--out", "images", "--guidance", "0.5"], "--guidance: expected a number of at least 1"),
    (["eval", "x", "--resume"], "resume: expected --out, whose log is continued, got none"),
    (["eval", "x", "--compare", "/nowhere.json"], "compare: expected a JSON file, got a path that does not exist"),
    (["prune", "x", "--plan", "plan.json"], "out: expected a directory to write"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "z", "--cache-dir", "d"],
     "cache-batches: expected at least 1, because there is a --cache-dir, got 0"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "z", "--resume"], "resume: expected the checkpoint of an earlier run"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "z", "--then", "p.json:²"], "then: expected PLAN:STEPS or .*, got 'p.json:²'"),
    # Named by the option, whatever the API calls it.
    (["analyze", "x", "--prompts", "demo", "--out", "s", "--batches", "1"], "error: batches: expected at least 2, got 1"),
    (["analyze", "x", "--prompts", "demo", "--out", "s", "--tokens", "3"], "error: tokens: expected at least 4, got 3"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "z", "--steps", "0"],
     "error: steps: expected at least one phase with steps, got 0 here and in --output-steps"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "z", "--train", "all"], "error: train: expected --output-steps"),
    (["distill", "x", "y", "--prompts", "demo", "--out", "z", "--steps", "0", "--output-steps", "5", "--cache-dir", "layers_steps"],
     "error: cache-dir: expected None, because --steps is 0 .*, got 'layers_steps'"),
    (["bench", "--path", "/nowhere"], "path: expected a source checkout of pydit with benchmarks/runner.py"),
])
def test_bad_command_lines(argv, message, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(*argv)
    assert re.search(message, line), line
    assert not _tree(tmp_path)


def test_a_plan_by_search(tmp_path, capsys):
    argv = ["plan", "--search", str(untrained()), "--prompts", "demo", "--batches", "1", "--batch-size", "4", "--target", "0.3"]
    assert main([*argv, "--out", str(tmp_path / "plan.json")]) == 0
    assert "(2 removed, 33.3 %)" in capsys.readouterr().out
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.removed == 2 and plan.provenance["method"] == "greedy" and len(plan.provenance["errors"]) == 2


def test_linear_ffns_by_number(tmp_path, capfd, fails):
    """Chosen on a pipeline: that of --search, or for any plan that of --check."""
    more = ["--prompts", "demo", "--batches", "1", "--batch-size", "2", "--json"]
    assert main(["plan", "--search", str(untrained()), "--target", "2", "--linear-text-ffn", "2", *more]) == 0
    plan = PruningPlan.from_dict(json.loads(capfd.readouterr().out))
    assert plan.removed == 2 and len(plan.linear_text_ffn) == 2 and len(plan.provenance["linear_text_ffn"]["errors"]) == 3
    plan.save(tmp_path / "plan.json")
    check = ["plan", "--show", str(tmp_path / "plan.json"), "--check", str(untrained()), *more]
    assert main([*check, "--linear-ffn", "1", "--lean"]) == 0
    thinner = json.loads(capfd.readouterr().out)
    assert len(thinner["linear_ffn"]) == 1 and thinner["linear_text_ffn"] == list(plan.linear_text_ffn) and thinner["check"]
    assert "linear-ffn: expected at most 2, the blocks" in fails(*check, "--linear-ffn", "3")
    assert "linear-text-ffn: expected a positive integer" in fails(*check, "--linear-text-ffn", "0")
    assert ("linear-ffn: expected a JSON list such as '[2,58]', or a number of blocks with --search or --check, got '3'"
            in fails("plan", "--show", tmp_path / "plan.json", "--linear-ffn", "3"))


def test_a_search_without_prompts(fails):
    assert "prompts: expected a file with one prompt per line or demo, got none" in fails("plan", "--search", untrained())


def test_a_plan_for_another_depth(fails, tmp_path):
    PruningPlan.preset("ppcl-qwen-image-12b").save(tmp_path / "plan.json")
    line = fails("prune", untrained(), "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert "plan: expected a plan for the model's 6 layers, got one for 60" in line
    assert _tree(tmp_path) == ["plan.json"]


def test_a_plan_for_another_family(fails, tmp_path, plan_file):
    data = json.loads(plan_file.read_text())
    files.write_json(plan_file, {**data, "family": "flux.9"})
    line = fails("prune", untrained(), "--plan", plan_file, "--out", tmp_path / "out")
    assert "family: expected one of qwen-image" in line and "flux.9" in line
    assert _tree(tmp_path) == ["plan.json"]


def test_a_truncated_checkpoint(fails, tmp_path, plan_file):
    path = shutil.copytree(untrained(), tmp_path / "teacher")
    weights = path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = _tree(tmp_path)
    line = fails("prune", path, "--plan", plan_file, "--out", tmp_path / "out")
    assert "expected a complete safetensors file, got a broken one" in line and _tree(tmp_path) == before


def test_a_pickled_checkpoint(fails, tmp_path, plan_file):
    path = shutil.copytree(untrained(), tmp_path / "teacher")
    (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "got a pickle" in fails("generate", path, "a circle", "--out", tmp_path / "images")
    assert not (tmp_path / "images").exists()
    (tmp_path / "stats.safetensors").write_bytes(pickle.dumps({}))
    assert "got a pickle" in fails("plan", tmp_path / "stats.safetensors", "--out", tmp_path / "p.json")
    assert not (tmp_path / "p.json").exists()


def test_a_full_disk(fails, tmp_path, plan_file, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in fails("prune", untrained(), "--plan", plan_file, "--out", tmp_path / "out")
    assert "No space left on device" in fails("plan", "--preset", "ppcl-qwen-image-12b", "--out", tmp_path / "p.json")
    assert _tree(tmp_path) == ["plan.json"]


def test_an_output_that_is_something_else(fails, tmp_path, plan_file):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    line = fails("prune", untrained(), "--plan", plan_file, "--out", tmp_path / "photos")
    assert "out: expected a new path" in line and (tmp_path / "photos" / "cat.jpg").exists()


def test_prompt_files(fails, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none.txt", "which is no file"), ("empty.txt", "got an empty file"),
                          ("binary.txt", "expected UTF-8 text")):
        line = fails("analyze", untrained(), "--prompts", tmp_path / name, "--out", tmp_path / "stats.safetensors")
        assert message in line
    assert _tree(tmp_path) == ["binary.txt", "empty.txt"]


def test_a_stock_student_is_refused(fails, tmp_path):
    line = fails("distill", untrained(), untrained(), "--prompts", "demo", "--out", tmp_path / "out")
    assert "student: expected a pipeline written by `pydit prune`" in line and not _tree(tmp_path)


def test_interrupts_and_bugs(monkeypatch, capfd, tmp_path):
    def raises(error):
        def run(*args, **kwargs):
            raise error
        monkeypatch.setattr(PruningPlan, "preset", run)
        code = main(["plan", "--preset", "x"])
        return code, capfd.readouterr().err

    assert raises(KeyboardInterrupt()) == (130, "pydit: interrupted\n")
    assert raises(RuntimeError("two\nlines")) == (
        1, "pydit: error: RuntimeError: two lines (PYDIT_DEBUG=1 shows where)\n")
    assert raises(OSError(errno.ENOSPC, "No space left on device", "/x")) == (
        2, "pydit: error: /x: No space left on device; what was there before is as it was: make room and run it "
           "again\n")
    monkeypatch.setenv("PYDIT_DEBUG", "1")
    code, err = raises(RuntimeError("bug"))
    assert code == 1 and "Traceback" in err and err.endswith("(PYDIT_DEBUG=1 shows where)\n")


def test_wrong_environment_is_one_line(monkeypatch, fails):
    monkeypatch.setenv("PYDIT_DEBUG", "yes")
    assert "PYDIT_DEBUG: expected one of 0, 1, got 'yes'" in fails("doctor")


def test_analyze_plan_prune_distill_generate_eval(tmp_path, capfd, fails):
    """The commands in their order, each reading what the one before wrote."""
    def run(*argv):
        assert main([str(a) for a in argv]) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    (tmp_path / "prompts.txt").write_text("a red circle left of a blue ring\nthree green rings and a star\n")
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    out = run("analyze", untrained(), "--prompts", tmp_path / "prompts.txt", "--sampling-steps", 3, "--size", 48,
              "--batches", 8, "--out", stats, "--plot", tmp_path / "cka.png", "--json")
    blocks = json.loads(out)["blocks"]
    assert len(blocks) == 6 and all(block["condition_text"] > 1 for block in blocks)
    assert (tmp_path / "cka.png").stat().st_size > 1000
    few = json.loads(run("analyze", untrained(), "--prompts", tmp_path / "prompts.txt", "--sampling-steps", 2, "--size",
                         48, "--batches", 2, "--out", tmp_path / "few.safetensors", "--json"))
    assert len(few["rows"]["image"]) == 1 and few["cka"]["image"][0][0] == pytest.approx(1)  # as few as collect takes
    made = json.loads(run("plan", stats, "--target", 0.4, "--selection", "optimal", "--out", plan, "--json"))
    assert made == json.loads(plan.read_text()) and "3 removed" in run("plan", "--show", plan)
    again = tmp_path / "again.safetensors"
    analyze = ("analyze", untrained(), "--prompts", tmp_path / "prompts.txt", "--sampling-steps", 3, "--size", 48,
               "--ablate", "--out", again, "--json")
    save = ActivationStats.save

    def interrupted(stats, path):
        save(stats, path)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:  # after the first checkpoint
        patch.setattr(ActivationStats, "save", interrupted)
        assert main([*map(str, analyze), "--batches", "8", "--save-every", "4"]) == 130
    assert capfd.readouterr().err.endswith("pydit: interrupted; with --resume it goes on from what was kept\n")
    assert not again.exists() and "expected no checkpoint of an earlier run" in fails(*analyze, "--batches", 8)
    assert main([*map(str, analyze), "--batches", "8", "--resume"]) == 0
    bar = capfd.readouterr().err
    assert "50%" in bar and "8/8" in bar and "batch/s" in bar  # goes on at 4 of 8, with a rate and the time left
    first, second = (files.load_safetensors(p, what="test")[0] for p in (stats, again))
    assert all((first[name] == second[name]).all() for name in first) and "ablation.losses" in second
    assert not (tmp_path / "again.safetensors.partial").exists()
    for method in ("ppcl", "laptop"):
        kept = json.loads(run("plan", again, "--target", 0.3, "--method", method, "--protect-first", 2, "--protect-last", 1,
                              *(("--selection", "optimal") if method == "ppcl" else ()), "--json"))["intervals"]
        assert min(start for start, _ in kept) >= (2 if method == "ppcl" else 1) and max(end for _, end in kept) <= 4
    assert json.loads(out)["rows"]["image"] == [b.shape[1] for b in ActivationStats.load(stats).samples["image"]]
    table = run("plan", again, "--target", 0.4, "--compare", "--report", tmp_path / "report.html")
    assert all(name in table for name in ("amber", "laptop", "ppcl optimal", "uniform", "removed by"))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "ppcl optimal" in page and "http" not in page
    checked = json.loads(run("plan", "--show", plan, "--check", untrained(), "--prompts", "demo", "--batches", 2,
                             "--batch-size", 2, "--json"))
    row, = checked.pop("check")
    assert checked == made and row["plan"] == "plan" and row["blocks"] == 3
    assert row["ratio"] == row["measured"] / row["predicted"]
    table = run("plan", again, "--target", 0.4, "--compare", "--check", untrained(), "--prompts", "demo", "--batches", 1,
                "--batch-size", 2, "--trial", 1, "--trial-lr", 1e-3)
    assert "after 1 steps" in table and "on 1 batches: squared, relative error" in table
    lower = table.split("after 1 steps")[1]
    assert all(name in lower for name in ("amber", "laptop", "uniform", "random", "ppcl optimal"))
    assert "one block for" in run("prune", untrained(), "--plan", plan, "--dry-run")
    assert not (tmp_path / "pruned").exists()
    assert "6 blocks became 3" in run("prune", untrained(), "--plan", plan, "--out", tmp_path / "pruned")
    assert main(["distill", str(untrained()), str(tmp_path / "pruned"), "--prompts", "demo", "--steps", "2",
                 "--max-minutes", "1e-9", "--out", str(tmp_path / "untrained")]) == 2
    assert capfd.readouterr().err.endswith("max-minutes: expected time for at least one step, got 1e-09\n")
    assert not (tmp_path / "untrained").exists()
    out = run("distill", untrained(), tmp_path / "pruned", "--prompts", "demo", "--batch-size", 2, "--steps", 2,
              "--output-steps", 1, "--out", tmp_path / "distilled", "--json")
    assert {row["phase"] for row in json.loads(out)["history"]} == {"layers", "output"}
    assert not (tmp_path / "distilled.checkpoint").exists()
    paths = run("generate", tmp_path / "distilled", "a red circle", "a Ring?", "--steps", 2, "--seed", 7, "--out",
                tmp_path / "images").split()
    assert [p.rsplit("/", 1)[1] for p in paths] == ["000-a-red-circle-seed7.png", "001-a-ring-seed8.png"]
    for name in ("teacher", "distilled"):
        compare = ("--compare", tmp_path / "teacher.json") if name == "distilled" else ()
        source = untrained() if name == "teacher" else tmp_path / name
        run("eval", source, "--prompts", 7, "--steps", 1, "--out", tmp_path / f"{name}.json", *compare)
    result = files.read_json(tmp_path / "distilled.json", what="test")
    assert result["relative_loss"] is None and len(result["samples"]) == 7 and "machine" in result
    assert not list(tmp_path.glob("*.jsonl")) and not [p for p in tmp_path.rglob("*.part")]


@pytest.mark.slow
def test_distill_under_torchrun(tmp_path, capfd, fails, plan_file):
    """The command of one process on two, sharded, read in shards, with activations on disk: one line printed, the same
    loss, a whole pipeline. And --then. `accelerate launch` starts them, by torchrun; torchrun alone where it is missing.
    """
    assert main(["prune", str(untrained()), "--plan", str(plan_file), "--out", str(tmp_path / "student")]) == 0
    train = ["distill", str(untrained()), str(tmp_path / "student"), "--prompts", "demo", "--batch-size", "3", "--steps",
             "2", "--output-steps", "1", "--cache-batches", "1", "--output-cache-batches", "0", "--out"]
    then = PruningPlan.from_intervals(6, [(1, 2), (3, 5)])
    (tmp_path / "at:1").mkdir()
    then.save(tmp_path / "at:1" / "then.json")
    capfd.readouterr()
    assert main([*train, str(tmp_path / "one")]) == 0
    printed = capfd.readouterr().out
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if importlib.util.find_spec("accelerate"):
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([sys.executable, "-m", *launch, "-m", "pydit", *train, str(tmp_path / "two"), "--shard", "all",
                           "--cache-dir", str(tmp_path / "kept")], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "autograd kernel" not in done.stderr  # which torch says of a collective that is differentiated
    assert _tree(tmp_path / "kept") == ["activations.json", *(f"batch-00000000.{rank}-of-2.safetensors" for rank in range(2))]
    assert done.stdout == printed.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert _tree(tmp_path / "two") == _tree(tmp_path / "one") and not (tmp_path / "two.checkpoint").exists()
    assert "then: expected PLAN:STEPS" in fails(*train, tmp_path / "three", "--then", "then.json")
    assert main([*train, str(tmp_path / "three"), "--then", f"{tmp_path / 'at:1' / 'then.json'}:1"]) == 0
    stored = files.read_json(tmp_path / "three" / "pydit_plan.json", what="test")
    assert PruningPlan.from_dict(stored["plan"], what="test") == then


OPTIONS = {  # of distill: option and value -> field of the configuration and value
    "--steps 7": ("layers_steps", 7), "--output-steps 3": ("output_steps", 3),
    "--intervals [[1,2]]": ("intervals", ((1, 2),)), "--lr 0.1": ("layers_lr", 0.1),
    "--output-lr 0.1": ("output_lr", 0.1), "--loss mse": ("loss", "mse"), "--magnitude 2": ("magnitude", 2.0),
    "--linear-weight 2": ("linear_weight", 2.0), "--ema 0": ("ema", 0.0), "--train all": ("output_trainable", "all"),
    "--velocity-weight 2": ("velocity_weight", 2.0), "--boundary-weight 2": ("boundary_weight", 2.0),
    "--muon-lr 0.1": ("muon_lr", 0.1), "--gradient-checkpointing": ("gradient_checkpointing", True),
    "--optimizer adamw8bit": ("optimizer", "adamw8bit"), "--teacher-memory streamed": ("teacher_memory", "streamed"),
    "--cache-batches 5": ("cache_batches", 5), "--output-cache-batches 5": ("output_cache_batches", 5),
    "--cache-dir d": ("cache_dir", Path("d")), "--shard all": ("shard", "all"), "--max-minutes 2": ("max_minutes", 2.0),
    "--flow-weight 2": ("flow_weight", 2.0), "--save-every 3": ("save_every", 3), "--resume": ("resume", True),
}
IMAGES = {"--timesteps logit-normal": ("timesteps", "logit-normal"), "--shift 3": ("shift", 3.0), "--batch-size 3":
          ("batch_size", 3), "--prompt-dropout 0.1": ("prompt_dropout", 0.1), "--data-seed 5": ("seed", 5)}


def test_no_option_of_distill_is_without_effect(tmp_path, monkeypatch, capsys):
    """A switch of the authors' script is shadowed and does nothing; none here is."""
    import pydit.cli.distill as module
    from pydit import data, distill

    seen = {}

    def stop(teacher, student, batches, config):
        seen["config"] = config
        raise UserError("seen")

    pipe = SimpleNamespace(transformer=SimpleNamespace(plan=None), components={})
    monkeypatch.setattr(module, "load", lambda *_, **__: pipe)
    monkeypatch.setattr(module, "sampling_defaults", lambda _: (64, 1, 1.0))
    monkeypatch.setattr(distill, "distill", stop)
    monkeypatch.setattr(data, "build_cache", lambda *_, **given: seen.update(built=given) or None)
    def dataset(folder, **given):
        seen.update(given=given, folder=folder)
        return SimpleNamespace(samples=[])

    monkeypatch.setattr(data, "CachedDataset", dataset)
    (tmp_path / "out.checkpoint").mkdir()
    (tmp_path / "out.checkpoint" / "checkpoint.json").touch()

    found_data = "0 images with the checksum 4f53cda18c2b"

    def run(option=""):
        argv = ["distill", "t", "s", "--data", "d", "--output-steps", "2", "--out", str(tmp_path / "out"), *option.split()]
        if option != "--resume":
            argv += ["--out", str(tmp_path / "new")]
        assert main(argv) == 2
        found = {name: value for name, value in seen["config"].to_dict().items() if name != "checkpoint_dir"}
        assert found.pop("data") == {"data": found_data, **seen["given"]}
        return found

    monkeypatch.setattr(distill.DistillConfig, "validate", lambda self: None)
    plain = run()
    for option, (field, value) in OPTIONS.items():
        found = run(option)
        assert {name for name in plain if found[name] != plain[name]} == {field}, option
        assert getattr(seen["config"], field) == value, option
    run()
    given = dict(seen["given"])
    for option, (field, value) in IMAGES.items():
        run(option)
        assert seen["given"] == given | {field: value} != given, option
    assert run("--guidance 2.5") == plain | {"guidance": 2.5} and seen["given"] == given | {"pairs": True}
    run("--resolution 32")
    assert seen["built"]["resolution"] == 32
    run("--cache elsewhere")
    assert seen["folder"] == Path("elsewhere")
    # What is left: where, on what, how it reports; and the calibration options of a prompt file.
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    told = {option.split()[0] for option in (*OPTIONS, *IMAGES)} | {
        "--resolution", "--cache", "--out", "--estimate", "--json", "--help", "--device", "--dtype", "--prompts", "--data",
        "--then", "--processes", "--sampling-steps", "--size", "--guidance", "--merge", "--on-policy"}
    assert set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M)) == told


def test_bench_hands_its_options_on(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "runner.py").write_text("def main(argv):\n    return 0 if argv == ['--filter', 'x'] else 9\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["bench", "--path", str(tmp_path), "--filter", "x"]) == 0
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]  # monkeypatch would bring it back


@pytest.mark.parametrize("name, option", [("layers", "--config"), ("model", "--variants")])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_a_bench_of_layers_or_models(name, option, flag, capsys):
    """Wrong options of theirs point to it."""
    with pytest.raises(SystemExit) as ended:
        main(["bench", name, flag])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and told.startswith(f"usage: pydit bench {name} ") and option in told


def test_every_module_of_the_command_is_thin():
    """Commands are a few lines over the API: no torch, numpy or diffusers imported at the top of a module."""
    for module in (pydit.cli, pydit.cli.options, pydit.cli.distill, pydit.cli.model, pydit.cli.demo, pydit.cli.system):
        assert not {"torch", "np", "diffusers"} & set(vars(module))


def test_plans_beyond_depth(tmp_path, capfd, fails):
    """Made on the command line, fitted when pruning, and a warning of one line when there is nothing to fit to."""
    path = tmp_path / "plan.json"
    assert main(["plan", "--intervals", "[[1,2]]", "--num-layers", "6", "--text-linear", "[[3,5]]", "--linear-ffn", "[0]",
                 "--linear-text-ffn", "[1]", "--lean", "--out", str(path)]) == 0
    plan = PruningPlan.load(path)
    assert plan == PruningPlan("qwen-image", 6, [(1, 2)], text_linear=[(3, 5)], linear_ffn=[0], linear_text_ffn=[1]).lean()
    said = capfd.readouterr().out
    assert "text linear from block 2" in said and "one block for 2, linear text FFN" in said
    command = ["prune", str(untrained()), "--plan", str(path), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert capfd.readouterr().err.count("pydit prune: warning: the linear maps of the plan start as the identity") == 1
    assert main([*command, "--prompts", "demo", "--batches", "4"]) == 0
    assert "identity" not in capfd.readouterr().err
    assert main(["plan", "--preset", "amber-qwen-image-10b", "--single-stream", "20", "--affine", "[2]"]) == 0
    capfd.readouterr()
    assert "affine: expected a JSON list such as '[2,58]', got '3'" in fails(
        "plan", "--preset", "amber-qwen-image-10b", "--affine", "3")
    assert "linear-ffn: expected the first layer of a block" in fails(
        "plan", "--preset", "ppcl-qwen-image-12b", "--linear-ffn", "[4]")
    assert main(["plan", "--preset", "ppcl-flux.1-8b", "--lean", "--single-stream", "[17,18]"]) == 0
    out = capfd.readouterr().out
    assert "17                169,915,648  kept, single stream" in out and "kept, text keys and values" in out
    assert "single-stream: expected [first, last]" in fails("plan", "--preset", "ppcl-flux.1-8b", "--single-stream", "17")


def test_from_drawn_images_to_a_student(tmp_path, capfd, fails, plan_file):
    """`generate --dataset` writes what `distill --data` reads; a bad sample is named; both go on where they stopped."""
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue ring\nthree crosses\n")
    draw = ["generate", str(untrained()), "--prompts-file", str(tmp_path / "prompts.txt"), "--dataset", "--steps", "2",
            "--out", str(tmp_path / "data")]
    assert main(draw) == 0
    assert [p.name for p in sorted((tmp_path / "data").glob("*.txt"))] == [
        "000-a-red-circle-seed0.txt", "001-a-blue-ring-seed1.txt", "002-three-crosses-seed2.txt"]
    assert (tmp_path / "data" / "002-three-crosses-seed2.txt").read_text() == "three crosses\n"
    second = tmp_path / "data" / "001-a-blue-ring-seed1.png"
    before = second.read_bytes()
    second.unlink()
    capfd.readouterr()
    assert main([*draw, "--resume"]) == 0
    assert capfd.readouterr().out.splitlines() == [str(second)] and second.read_bytes() == before
    (tmp_path / "data" / "zzz.png").write_bytes(b"no picture")
    (tmp_path / "data" / "zzz.txt").write_text("a broken file")

    assert main(["prune", str(untrained()), "--plan", str(plan_file), "--out", str(tmp_path / "student")]) == 0
    train = ["distill", str(untrained()), str(tmp_path / "student"), "--data", str(tmp_path / "data"), "--steps", "2",
             "--output-steps", "1", "--flow-weight", "0.1", "--prompt-dropout", "0.5", "--batch-size", "2",
             "--timesteps", "logit-normal", "--linear-weight", "1", "--out", str(tmp_path / "out")]
    capfd.readouterr()
    assert main(train) == 0
    out, err = capfd.readouterr()
    assert "1 of 4 samples are left out (the first: zzz: no readable image" in err and "wrote" in out
    assert sorted(p.name for p in (tmp_path / "out.data").iterdir()) == [
        "empty.safetensors", "index.json", "shard-00000.safetensors"]
    assert "data: expected --data or --prompts, got both" in fails(*train[:3], *train[3:-1], tmp_path / "out2",
                                                                  "--prompts", "demo")
    assert main([*train[:3], "--prompts", "demo", "--batch-size", "2", "--steps", "1", "--output-steps", "1", "--guidance",
                 "2.5", "--out", str(tmp_path / "guided")]) == 0
    capfd.readouterr()
    assert "guidance: expected --data or --prompts demo to go with it, got 2.5 without" in fails(
        *train[:3], "--prompts", tmp_path / "prompts.txt", "--guidance", "2.5", "--out", tmp_path / "out2")
    assert "prompts: expected prompts or --prompts-file, got both" in fails(*draw[:2], "a ring", *draw[2:])
    assert "out: expected a directory to write" in fails("distill", untrained(), tmp_path / "student", "--prompts", "demo")
