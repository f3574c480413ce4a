"""What all HTML pages share: the style sheet, and pictures inside the page."""

from __future__ import annotations

import base64

CSS = """
:root { --ink: #20262e; --faint: #68717d; --line: #e3e6ea; --teacher: #3f4854; --pruned: #d55e00; --distilled: #0072b2;
        --pass: #00795a; --fail: #b3470a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 46em; }
.lead { font-size: 18px; color: #3a434e; max-width: 44em; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 24px 28px; margin-top: 24px; }
figure { margin: 16px 0 0; }
figure img.chart { width: 100%; height: auto; display: block; }
figcaption, .note { color: var(--faint); font-size: 14px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-top: 24px; }
.card { background: #fff; border: 1px solid var(--line); border-top: 4px solid var(--ink); border-radius: 8px;
        padding: 14px 18px; }
.card b { display: block; font-size: 32px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); font-size: 14px; }
.card.teacher { border-top-color: var(--teacher); } .card.pruned { border-top-color: var(--pruned); }
.card.distilled { border-top-color: var(--distilled); } .card.loss { border-top-color: #8a6d00; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; white-space: normal; }
tr.total td { font-weight: 700; border-bottom: 2px solid #c9ced5; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(286px, 1fr)); gap: 20px 26px;
           margin-top: 16px; }
.entry h3 { font-size: 15px; font-weight: 600; margin: 0 0 6px; }
.entry h3 small { display: block; font-weight: 400; color: var(--faint); }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; }
.shot { position: relative; }
.shot img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; display: block; border-radius: 4px;
            border: 2px solid var(--pass); }
.shot.no img { border-color: var(--fail); }
.shot i { position: absolute; right: -7px; top: -7px; width: 19px; height: 19px; border-radius: 50%; color: #fff;
          background: var(--pass); font: bold 12px/19px "DejaVu Sans", sans-serif; text-align: center;
          border: 1.5px solid #fff; box-sizing: content-box; }
.shot.no i { background: var(--fail); }
.shot em { display: block; font-style: normal; font-size: 12.5px; color: var(--faint); text-align: center;
           margin-top: 2px; }
@media (max-width: 760px) { .cards { grid-template-columns: repeat(2, 1fr); } section { padding: 18px 14px; } }
"""


def data_uri(png: bytes) -> str:
    """A PNG file as the source of an ``<img>``."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
