"""Mistakes that would cost a user a model, hours or a wrong result: named before anything starts."""

import json
import re
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from PIL import Image

from pydit import files
from pydit.analysis import ActivationStats
from pydit.analysis.criteria import get_criterion, names
from pydit.cli import main
from pydit.cli.options import warnings_as_lines
from pydit.demo import data
from pydit.demo.evaluate import Result
from pydit.distill import checkpoint
from pydit.families import FAMILIES
from pydit.inference import sampling
from pydit.plan import PruningPlan
from pydit.presets import PRESETS
from tests.cli.test_cli import _tree, fails, plan_file  # noqa: F401
from tests.demo.pipelines import untrained


@pytest.fixture
def student(tmp_path, plan_file, capfd):  # noqa: F811
    assert main(["prune", str(untrained()), "--plan", str(plan_file), "--out", str(tmp_path / "student")]) == 0
    capfd.readouterr()
    return tmp_path / "student"


def contents(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_what_is_read_is_not_written_over(tmp_path, fails, plan_file, student):  # noqa: F811
    teacher = shutil.copytree(untrained(), tmp_path / "teacher")
    before = contents(teacher)
    for out in (teacher, teacher / "transformer", tmp_path / "student" / ".." / "teacher"):
        assert "out: expected a directory apart from" in fails("prune", teacher, "--plan", plan_file, "--out", out)
        assert "out: expected a directory apart from" in fails(
            "distill", teacher, student, "--prompts", "demo", "--steps", 1, "--out", out)
    assert contents(teacher) == before


@pytest.mark.parametrize("command, named", [
    ("analyze TEACHER --prompts words.txt --out words.txt", "out: expected a file apart from words.txt"),
    ("analyze TEACHER --prompts words.txt --out new --plot words.txt", "plot: expected a file apart from words.txt"),
    ("analyze TEACHER --prompts words.txt --out new --plot ./new", "plot: expected a file apart from new"),
    ("analyze TEACHER --prompts demo --out plan.json", "out: expected a new file or a pydit-activation-stats to replace"),
    ("analyze TEACHER --prompts demo --out new --plot plan.json", "plot: expected a new file or a picture to replace"),
    ("plan stats --out stats", "out: expected a file apart from stats"),
    ("plan stats --scores stats", "scores: expected a file apart from stats"),
    ("plan stats --out new --scores new", "scores: expected a file apart from new"),
    ("plan stats --compare --report stats", "report: expected a file apart from stats"),
    ("plan stats --report plan.json", "report: expected a new file or a page to replace, got plan.json, which is a pydit-pl"),
    ("plan --show plan.json --out ../here/plan.json", "out: expected a file apart from plan.json"),
    ("plan --preset ppcl-qwen-image-12b --out words.txt", "out: expected a new file or a pydit-plan to replace, got words"),
    ("eval TEACHER --prompts 7 --compare eval.json --out eval.json", "out: expected a file apart from eval.json"),
    ("eval TEACHER --prompts 7 --out plan.json", "out: expected a new file or a pydit-eval to replace"),
    ("bench --json words.txt", "json: expected a new file or a pydit-bench to replace"),
    ("bench --compare a.json --json a.json", "json: expected a file apart from a.json"),
    ("bench layers --plan plan.json --json plan.json", "json: expected a file apart from plan.json"),
    ("bench model --plan plan.json --json words.txt", "json: expected a new file or a pydit-bench-model to replace"),
])
def test_files_that_are_read_or_of_another_kind_are_not_written_over(command, named, tmp_path, monkeypatch, capfd):
    """Before anything is read or computed; a file of the same kind and an empty one are replaced, below."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    files.write_text("words.txt", "a red circle\n")
    files.save_safetensors("stats", {}, {"format": "pydit-activation-stats", "version": "0"})
    PruningPlan.preset("ppcl-qwen-image-12b").save("plan.json")
    files.write_json("eval.json", Result(["a"], ["glyph"], [0], [True]).to_json())
    before, command = contents(folder), command.replace("TEACHER", str(untrained()))
    capfd.readouterr()  # the first to ask for the pipeline sees it made
    assert main(command.split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert named in line and contents(folder) == before


def test_files_of_the_same_kind_and_empty_ones_are_replaced(tmp_path):
    pages = {"pydit-plan": b'{\n  "format": "pydit-plan"}', "picture": b"\x89PNG\r\n", "page": b"<!DOCTYPE html>\n<p>",
             "pydit-scores": (header := b'{"__metadata__":{"a":"b","format":"pydit-scores"}}', len(header).to_bytes(8, "little"))}
    pages["pydit-scores"] = b"".join(pages["pydit-scores"][::-1])
    for kind, page in pages.items():
        for content in (page, b""):
            (tmp_path / "out").write_bytes(content)
            files.require_file(tmp_path / "out", None, tmp_path / "other", what="out", kind=kind)
        for other in pages.keys() - {kind}:
            (tmp_path / "out").write_bytes(page)
            with pytest.raises(files.UserError, match=f"got .*, which is a {kind}$"):
                files.require_file(tmp_path / "out", what="out", kind=other)
    files.require_file(None, what="out", kind="page")
    for content in (b"[1]", b"{}", b'{"format": 3}', b"\x05" + bytes(7) + b"{oops", b"\x02" + bytes(7) + b"{}"):
        (tmp_path / "out").write_bytes(content)
        with pytest.raises(files.UserError, match="which is something else$"):
            files.require_file(tmp_path / "out", what="out", kind="page")


def test_sizes_and_seeds_that_nothing_can_be_drawn_with(tmp_path, fails):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    draw = ["generate", untrained(), "a red circle", "--out", tmp_path / "images"]
    assert "height: expected a multiple of 8 for this pipeline, got 50" in fails(*draw, "--height", 50)
    assert "width: expected a multiple of 8 for this pipeline, got 7" in fails(*draw, "--width", 7)
    assert "size: expected a multiple of 8 for this pipeline, got 7" in fails(
        "analyze", untrained(), "--prompts", tmp_path / "prompts.txt", "--size", 7, "--out", tmp_path / "x")
    assert "argument --seed: expected a whole number between -2^40 and 2^40, got '1" in fails(*draw, "--seed", 10**30)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_results_that_cannot_be_compared_are_named_before_anything_is_drawn(tmp_path, fails, capfd, monkeypatch):  # noqa: F811
    """Of other prompts; with other steps there is a warning, as both may be wanted."""
    few = ["eval", untrained(), "--prompts", 7, "--steps", 2, "--out", tmp_path / "few.json"]
    assert main(list(map(str, few))) == 0
    capfd.readouterr()
    assert main(list(map(str, [*few[:5], 1, "--out", tmp_path / "x.json", "--compare", tmp_path / "few.json"]))) == 0
    assert f"pydit eval: warning: {tmp_path}/few.json was drawn with steps 2, not 1\n" in capfd.readouterr().err
    monkeypatch.setattr("pydit.demo.data.generate", lambda *_, **__: pytest.fail("drawn"))
    assert "compare: expected two results on the same prompts" in fails(
        "eval", untrained(), "--prompts", 14, "--compare", tmp_path / "few.json")


def test_a_plan_is_no_statistics(fails, plan_file):  # noqa: F811
    assert f"stats: expected a file written by `pydit analyze`, got the plan {plan_file}; `pydit plan --show" in fails(
        "plan", plan_file)


@pytest.mark.parametrize("columns", [80, 100])
def test_help_fits_the_terminal_and_lists_what_can_be_chosen(columns, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("demo", "analyze", "plan", "prune", "distill", "generate", "eval", "bench", "doctor"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capfd.readouterr().out
        body, _, _ = text.partition("example")
        assert max(map(len, body.splitlines())) <= columns, command
        if command == "plan":
            words = set(re.findall(r"[\w.-]+", text))
            ours = [name for name in names() if type(get_criterion(name)).__module__.startswith("pydit.")]
            assert words >= {*PRESETS, *FAMILIES, *ours}


def test_prompts_that_nothing_is_fitted_to(tmp_path, fails, plan_file):  # noqa: F811
    assert "prompts: expected --init probe or a plan with linear maps to go with it" in fails(
        "prune", untrained(), "--plan", plan_file, "--prompts", "demo", "--out", tmp_path / "out")


def test_a_warning_is_shown_when_it_comes_and_not_lost_with_a_failure(capfd):
    with pytest.raises(RuntimeError), warnings_as_lines("distill"):
        warnings.warn("the latest checkpoint is broken", UserWarning, stacklevel=1)
        assert capfd.readouterr().err == "pydit distill: warning: the latest checkpoint is broken\n"
        raise RuntimeError


def test_help_and_errors_name_only_options_that_the_command_has(tmp_path, fails, capfd):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    line = fails("analyze", untrained(), "--prompts", tmp_path / "prompts.txt", "--batch-size", 3, "--out", tmp_path / "x")
    assert line.endswith("batch-size: expected --prompts demo to go with it, got none")
    for command in ("analyze", "plan", "prune"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--data " not in capfd.readouterr().out


def test_an_output_that_cannot_be_written_is_named_before_training(tmp_path, fails, student, monkeypatch):  # noqa: F811
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    from pydit import distill

    monkeypatch.setattr(distill, "distill", lambda *_: pytest.fail("training began"))
    line = fails("distill", untrained(), student, "--prompts", "demo", "--out", tmp_path / "photos")
    assert "out: expected a new path, an empty directory or a model directory" in line
    assert "out: expected a file or a new path, got a directory" in fails(
        "analyze", untrained(), "--prompts", "demo", "--out", tmp_path / "photos")


@pytest.mark.parametrize("cache, message", [
    ("out", "out, which is written"), ("out/activations", "out, which is written"),
    ("out.checkpoint/x", "out.checkpoint, which is removed at the end"), ("student/x", "student, which is read")])
def test_caches_lie_apart_from_what_is_read_written_and_removed(tmp_path, fails, student, monkeypatch, cache, message):  # noqa: F811
    from pydit import distill

    monkeypatch.setattr(distill, "distill", lambda *_: pytest.fail("training began"))
    before = _tree(tmp_path)
    for option, more in (("cache-dir", ["--prompts", "demo", "--cache-batches", 1]), ("cache", ["--data", tmp_path])):
        line = fails("distill", untrained(), student, "--out", tmp_path / "out", f"--{option}", tmp_path / cache, *more)
        assert f"{option}: expected a directory apart from {tmp_path}/{message}, got {tmp_path}/{cache}" in line
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("options, message", [
    ("--shift 3", "shift: expected --data to go with it, got none"),
    ("--timesteps logit-normal", "timesteps: expected --data to go with it"),
    ("--prompt-dropout 0.1", "prompt-dropout: expected --data to go with it"),
    ("--resolution 64", "resolution: expected --data to go with it"),
    ("--cache x", "cache: expected --data to go with it"),
    ("--size 64", "size: expected --prompts with a file to go with it"),
    ("--sampling-steps 3", "sampling-steps: expected --prompts with a file to go with it"),
    ("--train all", "train: expected --output-steps to go with it"),
    ("--muon-lr 0.1", "muon-lr: expected --output-steps to go with it"),
    ("--boundary-weight 1", "boundary-weight: expected --output-steps to go with it"),
    ("--output-cache-batches 1", "output-cache-batches: expected --output-steps to go with it"),
    ("--processes 8", "processes: expected --estimate to go with it"),
    ("--prompts PROMPTS --batch-size 3", "batch-size: expected --prompts demo or --data to go with it"),
    ("--prompts PROMPTS --output-steps 1 --flow-weight 1", "flow-weight: expected --data or --prompts demo"),
    ("--data d", "data: expected --data or --prompts, got both"),
    ("--steps 0", "steps: expected at least one phase with steps"),
    ("--merge x", "merge: expected nothing to train, got --prompts"),
    ("--merge x --ema 0.1", "merge: expected nothing to train, got --ema"),
    ("--on-policy --cache-batches 2", "cache-batches: expected none with --on-policy, whose states are new"),
    ("--prompts demo --on-policy --output-steps 1 --flow-weight 1", "flow-weight: expected none with --on-policy"),
    ("--on-policy --shard student", "shard: expected none with --on-policy"),
    ("--intervals 3", "intervals: expected a JSON list"),
])
def test_options_that_nothing_would_read(tmp_path, fails, monkeypatch, options, message):  # noqa: F811
    """Nothing is loaded: neither teacher nor student is there."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = options.replace("PROMPTS", str(tmp_path / "prompts.txt")).split()
    assert message in fails("distill", "t", "s", "--prompts", "demo", "--out", tmp_path / "out", *given)


@pytest.mark.parametrize("options, message", [
    ("--preset ppcl-qwen-image-12b --target 0.3", "target: expected STATS or --search to go with it"),
    ("--preset ppcl-qwen-image-12b --method bi", "method: expected STATS to go with it"),
    ("--preset ppcl-qwen-image-12b --protect-last 2", "protect-last: expected STATS to go with it"),
    ("--preset ppcl-qwen-image-12b --option rule=literal", "option: expected STATS to go with it"),
    ("--preset ppcl-qwen-image-12b --num-layers 4", "num-layers: expected --intervals to go with it"),
    ("--preset ppcl-qwen-image-12b --prompts demo", "prompts: expected --search or --check to go with it"),
    ("x --compare --method bi", "compare: expected STATS alone, got --method"),
    ("x --compare --lean", "compare: expected STATS alone, got --lean"),
    ("x --compare --target auto", "target: expected a share or a number of blocks"),
])
def test_options_of_plan_that_nothing_would_read(fails, options, message):  # noqa: F811
    assert message in fails("plan", *options.split())


def test_the_data_of_a_run_that_goes_on(tmp_path, fails, student, monkeypatch, capfd):  # noqa: F811
    """Analysis and training: other batches, tokens or models would be mixed with those of before, unseen."""
    train = ["distill", untrained(), student, "--prompts", "demo", "--batch-size", 2, "--steps", 4, "--save-every", 1,
             "--out", tmp_path / "out"]
    analyze = ["analyze", untrained(), "--prompts", "demo", "--batch-size", 2, "--save-every", 2, "--out",
               tmp_path / "stats.safetensors", "--batches", 6]
    with pytest.MonkeyPatch.context() as patch:
        save, save_stats = checkpoint.save, ActivationStats.save

        def once(function):
            def run(*args):
                function(*args)
                raise KeyboardInterrupt
            return run

        patch.setattr(checkpoint, "save", once(save))
        patch.setattr(ActivationStats, "save", once(save_stats))
        assert main([str(a) for a in train]) == main([str(a) for a in analyze]) == 130
    capfd.readouterr()
    for option, value, was in (("--data-seed", 3, 0), ("--batch-size", 3, 2)):
        name = option.removeprefix("--")
        assert f"error: {name}: expected {was} as in the run that wrote" in _last(fails, capfd, *train, option, value)
        assert f"{name}: expected {was} as in the run that wrote" in _last(fails, capfd, *analyze, option, value)
    for options, message in (("--steps 7", "steps: expected 4 as in the run that wrote .*out.checkpoint, got 7$"),
                             ("--lr 2e-4", "lr: expected 1e-05 as in the run"), ("--loss mse", "loss: expected 'direction'"),
                             ("--output-steps 1 --train all", "output-steps: expected 0 as in the run"),
                             ("--on-policy", "on-policy: expected False as in the run that wrote .*, got True"),
                             ("--dtype bfloat16", "teacher: expected the weights and the --dtype of the run"),
                             ("--prompts words.txt", "prompts: expected those of the run that wrote .*, got .*words.txt$")):
        given = [value for value in train if value not in ("--batch-size", 2)] if "words" in options else train
        (tmp_path / "words.txt").write_text("a red circle\n")
        given = [*given, *(tmp_path / word if word == "words.txt" else word for word in options.split())]
        assert re.search(f"error: {message}", _last(fails, capfd, *given)), options
    shutil.copytree(tmp_path / "out.checkpoint", tmp_path / "out.checkpoint" / "stage-1")
    assert "then: expected 1 or more, as in the run" in _last(fails, capfd, *train)  # whose work would be removed
    shutil.rmtree(tmp_path / "out.checkpoint" / "stage-1")
    assert "tokens: expected 256 as in the run" in _last(fails, capfd, *analyze, "--tokens", 9)
    assert "ablate: expected False as in the run" in _last(fails, capfd, *analyze, "--ablate")
    assert "pipeline: expected" in _last(fails, capfd, "analyze", student, *analyze[2:])
    assert "batches: expected more than the 2 that are in" in _last(fails, capfd, *analyze, "--batches", 2)
    assert "random directions: expected None" in _last(fails, capfd, *analyze, "--max-memory", 0.003, lines=2)
    assert main([*map(str, train), "--resume"]) == main([*map(str, analyze), "--resume"]) == 0
    assert ActivationStats.load(tmp_path / "stats.safetensors").batches_seen == 6


def _last(fails, capfd, *argv, lines=1):  # noqa: F811
    if lines == 1:
        return fails(*argv, "--resume")
    assert main([str(a) for a in (*argv, "--resume")]) == 2
    return capfd.readouterr().err.splitlines()[-1]


def test_blocks_trained_apart_are_merged(tmp_path, fails, student, capfd):  # noqa: F811
    """To the last bit those of one run; what is no part, or one twice, is refused."""
    def trained(name, *options):
        assert main([str(a) for a in ("distill", untrained(), student, "--prompts", "demo", "--batch-size", 2, "--steps", 2,
                                      "--lr", 1e-3, "--out", tmp_path / name, *options)]) == 0
        return tmp_path / name

    first, second = trained("first", "--intervals", "[[1,2]]"), trained("second", "--intervals", "[[4,5]]")
    whole, everything = trained("whole"), trained("all", "--steps", "0", "--output-steps", "1", "--train", "all")
    capfd.readouterr()
    merge = ["distill", untrained(), student, "--out", tmp_path / "merged"]
    assert main([*map(str, merge), "--merge", str(first), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["merged"] == {"1-2": str(first)} and found["untrained"] == [[4, 5]]
    assert main([*map(str, merge), "--merge", str(first), "--merge", str(second)]) == 0
    assert "layers 4-5: from" in capfd.readouterr().out
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "merged" / weights).read_bytes() == (whole / weights).read_bytes()
    merge[-1] = tmp_path / "again"
    assert "every block trained once, got [1, 2] in" in fails(*merge, "--merge", first, "--merge", first)
    assert "expected new blocks other than those of" in fails(*merge, "--merge", shutil.copytree(student, tmp_path / "s2"))
    assert "outside the new blocks" in fails(*merge, "--merge", everything)
    PruningPlan.from_intervals(6, [(1, 2)]).save(tmp_path / "other.json")
    assert main(["prune", str(untrained()), "--plan", str(tmp_path / "other.json"), "--out", str(tmp_path / "other")]) == 0
    capfd.readouterr()
    assert "expected students of one plan" in fails(*merge, "--merge", tmp_path / "other")
    assert "out: expected a directory apart from" in fails(*merge[:-1], first, "--merge", first)
    assert not (tmp_path / "again").exists()


def test_scores_replay_every_rule(tmp_path, fails, capfd):  # noqa: F811
    """Of ppcl: options on the command line, the triangle in a file, and the same plans from it without the rest."""
    stats, scores = tmp_path / "stats.safetensors", tmp_path / "scores.safetensors"
    assert main(["analyze", str(untrained()), "--prompts", "demo", "--batch-size", "4", "--batches", "6", "--out",
                 str(stats)]) == 0
    capfd.readouterr()

    def plan(source, *options):
        assert main(["plan", str(source), "--json", *map(str, options)]) == 0
        return json.loads(capfd.readouterr().out)

    made = plan(stats, "--target", 2, "--option", "selection=optimal", "--option", "streams=min", "--scores", scores)
    assert made["provenance"]["options"]["streams"] == "min" and sum(e - s for s, e in made["intervals"]) == 2
    tensors, _ = files.load_safetensors(scores, what="test")
    assert tensors["image"].shape == (6, 6)
    for options in (("--target", 2, "--option", "selection=optimal", "--option", "streams=min"),
                    ("--target", "auto", "--option", "rule=literal"), ("--target", "auto", "--option", "sudden=0"),
                    ("--target", 1, "--option", "max_length=2", "--selection", "optimal", "--protect-first", 2)):
        assert plan(scores, *options) == {**(again := plan(stats, *options)), "provenance": {
            name: value for name, value in again["provenance"].items() if name not in ("images", "output")}}
    assert plan(stats, "--target", "auto", "--option", "min_cka=1")["intervals"] == []
    assert "reference: expected 'same-depth' as in the scores" in fails("plan", scores, "--reference", "fixed")
    assert "method: expected ppcl as in" in fails("plan", scores, "--method", "bi")
    assert "level: expected a number, got 'high'" in fails("plan", stats, "--option", "level=high")
    assert "resamples: expected a whole number, got 2.5" in fails("plan", stats, "--method", "bi", "--option",
                                                                  "resamples=2.5")
    assert "option: expected NAME=VALUE, got 'rule'" in fails("plan", stats, "--option", "rule")
    assert "nosuch: no option of method 'ppcl'" in fails("plan", stats, "--option", "nosuch=1")


def test_a_plan_from_statistics_has_sizes(tmp_path, capfd, student, fails):  # noqa: F811
    stats = tmp_path / "stats.safetensors"
    assert main(["analyze", str(untrained()), "--prompts", "demo", "--batch-size", "4", "--batches", "4", "--out",
                 str(stats)]) == 0
    capfd.readouterr()
    assert main(["plan", str(stats), "--method", "uniform", "--target", "2"]) == 0
    assert "parameters ->" in capfd.readouterr().out
    assert main(["plan", "--show", str(student)]) == 0
    assert "6 layers -> 4" in capfd.readouterr().out
    assert "expected a directory written by `pydit prune`" in fails("plan", "--show", untrained())


def test_an_estimate_of_two_families(fails, capfd, student):  # noqa: F811
    assert "student: expected a plan for qwen-image like qwen-image, got one for flux.1" in fails(
        "distill", "qwen-image", "ppcl-flux.1-8b", "--estimate")
    assert "got one for flux.1" in fails("distill", untrained(), "ppcl-flux.1-8b", "--estimate")

    def told(*options):
        assert main([*map(str, ("distill", *options)), "--estimate"]) == 0
        return capfd.readouterr().out

    assert "each of 6889 image and 512 text tokens" in told("qwen-image", "ppcl-qwen-image-12b")
    assert "each of 4096 image and 512" in told("qwen-image", "ppcl-qwen-image-12b", "--resolution", 1024)
    assert " MB" in told(untrained(), student, "--resolution", 48)
    assert "each of 36 image and 8 text tokens; --resolution" in (own := told(untrained(), student))
    assert own.replace("; --resolution gives another size", "") == told(untrained(), student, "--resolution", 48)


def test_numbers_beyond_any_machine(tmp_path, fails, student, monkeypatch, capfd):  # noqa: F811
    """One line that names an option, or memory; neither a dump of torch's stack nor an hour without a word."""
    monkeypatch.chdir(tmp_path)
    draw = ["generate", untrained(), "a red circle", "--out", "images", "--steps", 1]
    assert "argument --height: expected a number of pixels from 1 to 65536, got '1000000000'" in fails(*draw, "--height", 10**9)
    assert "argument --prompts: expected a whole number from 1 to 1000000, got '1" in fails("eval", "--prompts", 10**12)
    assert "argument --steps: expected a whole number of at most 2^53, got 1" in fails(*draw[:-1], 10**20)
    assert main([str(a) for a in (*draw[:-1], 10**11)]) == 2  # with a bar before it
    assert capfd.readouterr().err.endswith("memory: expected sizes that fit into that of this machine, got 745. GiB\n")
    train = ["distill", untrained(), student, "--prompts", "demo", "--out", "out", "--steps", 1]
    assert main([str(a) for a in (*train, "--batch-size", 10**11)]) == 2
    assert capfd.readouterr().err.endswith("batch-size: expected a whole number from 1 to 2^31 - 1, got 100000000000\n")
    assert "lr: expected a number > 0, at most 3e+38, got 1e+300" in fails(*train, "--lr", "1e300")
    assert not list(tmp_path.glob("images/*")) and not (tmp_path / "out").exists()


def test_places_where_nothing_can_be_written(tmp_path, fails, student, monkeypatch):  # noqa: F811
    """Named before hours of work; a link that leads to itself too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("pydit.cli.options.load", lambda *_: pytest.fail("loaded"))
    for argv in (["distill", untrained(), student, "--prompts", "demo", "--out", "file/out"],
                 ["analyze", untrained(), "--prompts", "demo", "--out", "file/out"],
                 ["generate", untrained(), "a", "--out", "file/out"]):
        assert "out: expected a path in a directory, got file/out, because" in fails(*argv)
    assert "out: expected a directory or a new path, got the file file" in fails("generate", untrained(), "a", "--out", "file")
    assert main(["plan", "--preset", "ppcl-qwen-image-12b", "--out", "loop"]) == 0 and not (tmp_path / "loop").is_symlink()


def test_options_on_batches_that_are_not_drawn(fails, tmp_path, plan_file):  # noqa: F811
    assert "batches: expected --prompts to go with it" in fails("prune", untrained(), "--plan", plan_file, "--out",
                                                                tmp_path / "x", "--batches", 3)
    assert "data-seed: expected --prompts to go with it" in fails("plan", "--show", plan_file, "--data-seed", 3)
    assert "merge: expected no --estimate" in fails("distill", untrained(), "x", "--merge", "y", "--estimate")


def test_entries_of_a_file_are_called_as_they_are(fails, tmp_path, plan_file):  # noqa: F811
    """Not as the options that they come from."""
    plan = json.loads(plan_file.read_text()) | {"version": 3}
    (tmp_path / "short.json").write_text(json.dumps(plan))
    assert "dead_tensors, linear_ffn, linear_text_ffn, single_stream" in fails("plan", "--show", tmp_path / "short.json")
    for version in (3.0, 1.0, "3", True):
        (tmp_path / "version.json").write_text(json.dumps(plan | {"version": version}))
        assert f"expected version 1, 2 or 3, got {version!r}" in fails("plan", "--show", tmp_path / "version.json")
    assert "show: expected a directory written by `pydit prune`" in fails("plan", "--show", tmp_path)


def test_captions_are_added_to_images_drawn_without(tmp_path, capfd):
    draw = ["generate", str(untrained()), "a red circle", "a ring", "--steps", "1", "--out", str(tmp_path / "data")]
    assert main(draw) == 0
    assert main([*draw, "--dataset", "--resume"]) == 0
    assert sorted(path.read_text() for path in (tmp_path / "data").glob("*.txt")) == ["a red circle\n", "a ring\n"]
    for dtype in ("float32", "bfloat16"):  # one cache for both
        assert main(["prune", str(untrained()), "--plan", str(_plan(tmp_path)), "--out", str(tmp_path / dtype)]) == 0
        assert main(["distill", str(untrained()), str(tmp_path / dtype), "--data", str(tmp_path / "data"), "--steps", "1",
                     "--dtype", dtype, "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / f"{dtype}-out")]) == 0


def test_images_of_other_settings_are_not_mixed(tmp_path, fails, capfd):  # noqa: F811
    """`generate --resume` goes by what a PNG file says of itself; one that says nothing is taken as it is."""
    draw = ["generate", str(untrained()), "a red circle", "--out", str(tmp_path), "--steps", "2"]
    assert main(draw) == 0
    (drawn,) = tmp_path.glob("*.png")
    with Image.open(drawn) as image:
        assert json.loads(image.info["pydit"]) == {"prompt": "a red circle", "seed": 0, "steps": 2, "guidance": 2.5,
                                                   "height": 48, "width": 48}
    before = drawn.read_bytes()
    capfd.readouterr()
    for other, message in ((["--steps", "3"], "steps: expected 2, with which"), (["--height", "64"], "height: expected 48"),
                           (["--guidance", "1"], "guidance: expected 2.5, with which")):
        assert message in fails(*draw, "--resume", *other)
    assert main([*draw[:3], "a ring", *draw[3:], "--resume"]) == 0 and drawn.read_bytes() == before
    Image.new("RGB", (4, 4)).save(drawn)
    assert main([*draw, "--steps", "3", "--seed", "0", "--resume"]) == 0
    drawn.write_bytes(b"no picture")
    capfd.readouterr()
    assert "resume: expected an image in" in fails(*draw, "--resume")


@pytest.mark.parametrize("prompts", ["demo", "prompts.txt"])
def test_on_policy_the_student_draws_what_it_learns_from(prompts, tmp_path, student, fails, capfd, monkeypatch):  # noqa: F811
    """The teacher draws nothing; a run goes on as it began, on policy or not."""
    monkeypatch.chdir(tmp_path)
    files.write_text("prompts.txt", "a red circle\na ring\n")
    drawn = []
    monkeypatch.setattr(sampling, "with_transformer", lambda pipe, model, make=sampling.with_transformer:
                        drawn.append(type(model).__name__) or make(pipe, model))
    monkeypatch.setattr(data, "with_transformer", sampling.with_transformer)
    size = ["--batch-size", "4", "--guidance", "2.5"] if prompts == "demo" else ["--sampling-steps", "2", "--size", "48"]
    train = ["distill", untrained(), student, "--prompts", prompts, *size, "--lr", "1e-3", "--steps", "3", "--output-lr", "1e-3",
             "--output-steps", "3"]
    for name, option in (("off", []), ("on", ["--on-policy"])):
        drawn.clear()
        assert main([str(a) for a in (*train, *option, "--out", name)]) == 0
        assert set(drawn) == ({"PrunedQwenImageTransformer2DModel"} if option else set())
    off, on = (safetensors.torch.load_file(f"{name}/transformer/diffusion_pytorch_model.safetensors") for name in ("off", "on"))
    assert off.keys() == on.keys() and any(not torch.equal(off[name], on[name]) for name in off)
    capfd.readouterr()


def _plan(folder):
    PruningPlan("qwen-image", 6, [(1, 2)]).save(folder / "plan.json")
    return folder / "plan.json"
