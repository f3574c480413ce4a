"""The report: self-contained, complete for odd inputs, and the same figures for the same data."""

import re

import numpy as np
import pytest

from pydit.demo import evaluate, report, world
from pydit.demo import figures as demo_figures
from pydit.errors import UserError
from pydit.reporting import figures, statistics

PNG = b"\x89PNG\r\n\x1a\n"


def _material(teacher_share=0.9, layers=8, categories=world.CATEGORIES):
    rng = np.random.default_rng(0)
    prompts = world.sample_prompts(21, split="held_out", seed=0)

    def result(share):
        passed = [bool(v) for v in rng.random(21) < share]
        return evaluate.Result([p.text for p in prompts], [p.category for p in prompts], list(range(21)), passed)

    results = {"teacher": result(teacher_share), "pruned": result(0.0), "distilled": result(teacher_share * 0.9)}
    loss = evaluate.relative_loss(results["teacher"], results["distilled"])
    metrics = {
        **{name: r.summary() for name, r in results.items()}, "parameters": {"teacher": 1000, "student": 600}, "prompts": 21,
        "relative_loss": loss.value, "relative_loss_interval": [loss.low, loss.high], "seconds": 100.0,
        "candidates": [{"method": "greedy search", "init": "first", "intervals": [[1, 3], [5, 6]], "velocity_error": 0.125}],
        "distill_seconds": 60.0, "machine": "a <machine> & more", "versions": {"pydit": "0"},
        "settings": {"command": "pydit demo", "steps": 4, "guidance": 1.0, "seed": 0, "calibration_batches": 2, "batch_size": 2,
                     "layer_steps": 5, "output_steps": 0}}
    gallery = [{"prompt": p.text, "category": p.category, "passed": {m: r.passed[i] for m, r in results.items()},
                "images": {m: rng.integers(0, 255, (48, 48, 3)).astype(np.uint8) for m in results}}
               for i, p in enumerate(prompts[:5])]
    cka = {s: np.clip(rng.random((layers, layers)), 0, 1) for s in ("image", "text")}
    r2 = {s: list(rng.random(layers)) for s in ("image", "text")}
    history = [{"phase": "layers", "step": 1 + 2 * i, "loss": 1 / (1 + i)} for i in range(9)]
    return metrics, {"cka": cka, "r2": r2, "intervals": [(1, 3), (5, 6)], "history": history, "gallery": gallery}


def test_report_is_self_contained(tmp_path):
    metrics, material = _material()
    page = report.write(tmp_path, metrics, **material).read_text(encoding="utf-8")
    for name in ("cka", "intervals", "loss", "categories", "images"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    sources = re.findall(r'<img[^>]*src="([^"]{0,30})', page)
    assert len(sources) == 4 + 3 * 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link", page)
    assert "a &lt;machine&gt; &amp; more" in page
    assert "<td>greedy search</td><td>first</td><td>1 to 3, 5 to 6</td><td>0.125</td>" in page
    assert "8 blocks become 5" in page and page.count('class="shot no"') == sum(
        not passed for entry in material["gallery"] for passed in entry["passed"].values())
    for prompt in material["gallery"]:
        assert prompt["prompt"] in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["categories.png", "cka.png", "images.png", "intervals.png",
                                                          "loss.png", "report.html"]


def test_a_teacher_without_success_and_an_empty_plan(tmp_path):
    metrics, material = _material(teacher_share=0.0)
    assert metrics["relative_loss"] is None
    page = report.write(tmp_path, metrics, **{**material, "intervals": [], "history": []}).read_text(encoding="utf-8")
    words = re.sub(r'base64,[^"]*', "", page)
    assert "8 blocks become 8" in words and not re.search(r"\bnan\b|>None<|None\s%", words)


def test_figures_are_reproducible(tmp_path):
    _, material = _material()
    for name in ("a", "b"):
        figures.save(figures.cka_maps(material["cka"], material["intervals"]), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("layers", [1, 16, 60])
def test_figures_take_any_depth(layers):
    rng = np.random.default_rng(0)
    intervals = [(0, layers - 1)] if layers > 1 else []
    maps = figures.cka_maps({"image": rng.random((layers, layers))}, intervals)
    depth = figures.depth_axis(layers, intervals, {"image": rng.random(layers)})
    for figure in (maps, depth):
        figure.canvas.draw()
    assert maps.axes[0].images[0].get_array().shape == (layers, layers)
    assert len(maps.axes[0].patches) == 2 * len(intervals)  # each outlined in two colours
    assert len(depth.axes[0].lines[0].get_xdata()) == layers


def test_no_half_picture_is_left(tmp_path, monkeypatch):
    _, material = _material()
    figure = figures.cka_maps(material["cka"])

    def full(path, **kwargs):
        path.write_bytes(PNG)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        figures.save(figure, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib: expected for figures"):
        demo_figures.losses({})


def test_loss_curves_keep_phases_apart():
    history = [{"phase": "layers", "step": 1, "loss": 2.0}, {"phase": "output", "step": 1, "loss": 1.0},
               {"phase": "output", "step": 2, "loss": 0.5}]
    curves = report.loss_curves(history)
    assert list(curves.values()) == [([1], [2.0]), ([1, 2], [1.0, 0.5])]


def test_linearity_against_a_direct_fit():
    """What an affine map explains of a block's change, from moments, equals least squares on the rows themselves."""
    import torch

    from pydit.analysis import ActivationStats

    generator = torch.Generator().manual_seed(0)
    stats = ActivationStats("qwen-image", 1, 3)
    x = torch.randn(200, 3, generator=generator, dtype=torch.float64) * 5 + 2
    y = x + 0.3 * x @ torch.randn(3, 3, generator=generator, dtype=torch.float64) + torch.randn(200, 3, generator=generator)
    stats.add_probe_rows({"image": [x, y], "text": [x, x]})
    rows = torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1)
    error = (y - rows @ torch.linalg.lstsq(rows, y).solution).square().sum()
    change = (y - x) - (y - x).mean(0)
    shares = statistics.linearity(stats)
    assert shares["image"][0] == pytest.approx(float(1 - error / change.square().sum()), abs=1e-5)
    assert shares["text"][0] == 1.0  # no change: nothing is left unexplained
