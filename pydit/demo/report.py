"""The demo's report: one self-contained HTML page, and its pictures as PNG files beside it."""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydit import files
from pydit.demo.figures import category_bars, category_name, image_grid, losses
from pydit.reporting import console, figures
from pydit.reporting.page import CSS, data_uri

MODELS = tuple(figures.COLOURS)
def write(out: Path, metrics: dict[str, Any], *, cka: dict[str, np.ndarray], r2: dict[str, Sequence[float]],
          intervals: Sequence[tuple[int, int]], history: Sequence[dict[str, Any]],
          gallery: Sequence[dict[str, Any]]) -> Path:
    """Draw every figure into ``out`` and write ``report.html``.

    Parameters
    ----------
    out : existing directory.
    metrics : what ``metrics.json`` holds (see :mod:`pydit.demo.run`).
    cka : stream -> [L, L]. r2 : stream -> L values. intervals : [s, e] inclusive.
    history : the distillation's log: dicts with "phase", "step" and "loss".
    gallery : entries with "prompt", "category", "images" {model: uint8 [H, W, 3]}, "passed" {model: bool}.

    Returns
    -------
    Path of the page.
    """
    depth = len(next(iter(cka.values())))
    charts = {
        "cka": figures.cka_maps(cka, intervals),
        "intervals": figures.depth_axis(depth, intervals, r2),
        "loss": losses(loss_curves(history)),
        "categories": category_bars({model: metrics[model] for model in MODELS}),
        "images": image_grid(gallery),
    }
    for name, figure in charts.items():
        figures.save(figure, out / f"{name}.png")
    page = _page(out, metrics, intervals, depth, gallery).replace(" %", "\N{NO-BREAK SPACE}%")
    files.write_text(out / "report.html", page)
    return out / "report.html"


def loss_curves(history: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """The log as one curve per phase, titled for a reader, in the order of the phases."""
    titles = {"layers": "Phase 1: each new block alone", "output": "Phase 2: the whole student"}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in history:
        steps, values = curves.setdefault(titles.get(entry["phase"], entry["phase"]), ([], []))
        steps.append(entry["step"])
        values.append(entry["loss"])
    return curves


def _page(out: Path, metrics: dict[str, Any], intervals: Sequence[tuple[int, int]], depth: int,
          gallery: Sequence[dict[str, Any]]) -> str:
    removed = sum(end - start for start, end in intervals)
    teacher, student = (metrics["parameters"][name] for name in ("teacher", "student"))
    loss, (low, high) = metrics["relative_loss"], metrics["relative_loss_interval"]
    groups = ", ".join(f"{start} to {end}" for start, end in intervals)
    cards = [(model, console.percent(metrics[model]["overall"]), text) for model, text in
             zip(MODELS, ("teacher", "pruned, before training", "pruned and distilled"), strict=True)]
    cards.append(("loss", console.percent(loss), "relative loss" if low is None else
                  f"relative loss, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pydit demo: {depth} blocks to {depth - removed}</title><style>{CSS}</style></head><body><main>
<h1>{depth} blocks become {depth - removed}</h1>
<p class="lead">A small text-to-image transformer with {teacher:,} parameters lost {removed} of its {depth} blocks
({100 * removed / depth:.0f} %), was trained back for {console.duration(metrics["distill_seconds"])}, and now has
{student:,} parameters ({100 * student / teacher:.0f} %). Every image was judged by a program that reads it and compares
it with its prompt.</p>
{_quick_note(metrics)}<div class="cards">{"".join(itertools.starmap(_card, cards))}</div>

<section><h2>What each model draws</h2>
<p>Same prompt, same noise. A check means that the image shows exactly what the prompt asks for. None of these prompts
was seen in training.</p>
<div class="gallery">{"".join(map(_entry, gallery))}</div></section>

<section><h2>Prompts met, by category</h2>
<p>{metrics["prompts"]} held-out prompts, one image each from the same noise for all three models; the mean gives each
category the same weight. Whiskers are 95 % Wilson intervals.</p>
<figure>{_chart(out, "categories", "Grouped bars: share of prompts met per category for the three models")}</figure>
<div class="scroll">{_table(metrics)}</div></section>

<section><h2>Where the teacher repeats itself</h2>
<p>Similarity between the outputs of every two blocks. A bright square along the diagonal is a run of blocks that
change the representation little; the outlined runs were replaced by one block each: {groups or "none"}.</p>
<figure>{_chart(out, "cka", "Heat-maps of CKA between block outputs, image and text stream")}</figure></section>

<section><h2>Which blocks were replaced</h2>
<p>How much of what a block adds can a linear map of its input predict? PPCL chains such maps, and merges blocks
as long as a chain stays close to the teacher. Shaded runs were replaced.</p>
{_candidates(metrics)}
<figure>{_chart(out, "intervals", "Linear predictability of each block and the replaced intervals along the depth")}
</figure></section>

<section><h2>Training the new blocks</h2>
<p>First each new block alone learns to turn the teacher's input of its run into the teacher's output. Then the whole
student learns to predict what the teacher predicts.</p>
<figure>{_chart(out, "loss", "Loss against step for both phases")}
<figcaption>Faint: means over a few steps. Line: running mean, with its last value.</figcaption></figure></section>

<section><h2>How this was made</h2>{_facts(metrics)}</section>
</main></body></html>
"""


def _quick_note(metrics: dict[str, Any]) -> str:
    if not metrics["settings"].get("quick") and metrics["settings"].get("output_steps"):
        return ""
    return ('<p class="note">A quick run: a few training steps and few sampling steps show the path, not the quality. '
            "Run <code>pydit demo</code> for figures that mean something.</p>")


def _card(kind: str, value: str, text: str) -> str:
    return f'<div class="card {kind}"><b>{value}</b><span>{html.escape(text)}</span></div>'


def _entry(entry: dict[str, Any]) -> str:
    shots = []
    for model, name in zip(MODELS, ("teacher", "pruned", "distilled"), strict=True):
        passed = entry["passed"][model]
        alt = html.escape(f"{name}: {entry['prompt']} ({'met' if passed else 'not met'})", quote=True)
        source = data_uri(_png(entry["images"][model]))
        shots.append(f'<div class="shot{"" if passed else " no"}"><img src="{source}" alt="{alt}">'
                     f'<i>{"✓" if passed else "✗"}</i><em>{name}</em></div>')
    category = html.escape(category_name(entry["category"]))
    return (f'<div class="entry"><h3>{html.escape(entry["prompt"])} <small>{category}</small></h3>'
            f'<div class="trio">{"".join(shots)}</div></div>')


def _candidates(metrics: dict[str, Any]) -> str:
    """The plans that were tried, the chosen one first; nothing when the run did not choose."""
    rows = "".join(f"<tr><td>{row['method']}</td><td>{row['init']}</td>"
                   f"<td>{', '.join(f'{start} to {end}' for start, end in row['intervals'])}</td>"
                   f"<td>{row['velocity_error']:.3f}</td></tr>" for row in metrics.get("candidates", ()))
    return rows and (
        "<p>Several plans were pruned and measured before any training; the least error of the predicted velocity (its "
        "square, relative to the teacher's) decided.</p><div class=\"scroll\"><table><tr><th>plan from</th>"
        f"<th>start of a new block</th><th>runs</th><th>velocity error</th></tr>{rows}</table></div>\n")


def _table(metrics: dict[str, Any]) -> str:
    def row(name: str, values: list[float], count: int | str, kind: str = "") -> str:
        cells = "".join(f"<td>{console.percent(value)}</td>" for value in values)
        return f'<tr{kind}><td>{html.escape(name)}</td>{cells}<td>{count}</td></tr>'

    counts = metrics["teacher"]["images_per_category"]
    rows = [row("mean over categories", [metrics[m]["overall"] for m in MODELS], metrics["prompts"], ' class="total"')]
    rows += [row(category_name(name), [metrics[m]["per_category"][name] for m in MODELS], count)
             for name, count in counts.items()]
    heads = "".join(f"<th>{name}</th>" for name in ("category", "teacher", "pruned", "distilled", "images"))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _facts(metrics: dict[str, Any]) -> str:
    settings, versions = metrics["settings"], metrics["versions"]
    facts = [
        ("command", settings["command"]),
        ("machine", metrics["machine"]),
        ("time", f"{console.duration(metrics['seconds'])} in all, of which "
                 f"{console.duration(metrics['distill_seconds'])} training"),
        ("sampling", f"{settings['steps']} steps, guidance {settings['guidance']:g}, seed {settings['seed']}"),
        ("calibration", f"{settings['calibration_batches']} batches of {settings['batch_size']} from training prompts"),
        ("training", f"{settings['layer_steps']} steps of phase 1, {settings['output_steps']} of phase 2, "
                     f"batch {settings['batch_size']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    rows = "".join(f"<tr><td>{name}</td><td>{html.escape(str(text))}</td></tr>" for name, text in facts)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _chart(out: Path, name: str, alt: str) -> str:
    source = data_uri((out / f"{name}.png").read_bytes())
    return f'<img class="chart" src="{source}" alt="{html.escape(alt, quote=True)}">'


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
