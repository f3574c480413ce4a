"""Decides from its pixels alone whether an image meets a prompt of the demo world.

Reading an image takes three steps. Pixels far from the background are grouped into components. A component's colour is
the palette entry whose mixtures with the background explain it. Its coverage by that colour is compared with a bank of
rendered templates: every shape, or every glyph, at several sizes and sub-pixel places. The best template must explain
the component everywhere, so that a cut corner, a missing stroke or a second colour is a fault; it must beat every other
kind by a margin; and the edges must be about as narrow as rendered ones, so that a blurred object is one too.

The rules are stricter than GenEval's: an image meets a prompt only when every mark in it is readable and the objects
are exactly those asked for, no more. ``a circle`` is not met by a circle and a square. Where a prompt leaves a colour
open, any colour of the palette will do. ``left of`` and its like compare centres: the offset along the axis must be at
least eight pixels and larger than the offset across it. Size is not tested beyond what the templates allow: a pixel
or so more or less than the world draws.

Built for what a decoder and a small generative model leave behind: soft edges, colour noise of a few levels, edges and
places off by a pixel. Only NumPy runs per image; torch draws the templates once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from pydit.demo.render import BACKGROUND, GLYPH_PIXELS, SHAPE_PIXELS, SIZE, glyph_masks, shape_masks
from pydit.demo.world import COLOURS, GLYPHS, SHAPES, Item, Prompt, parse
from pydit.errors import UserError

MARK_DISTANCE = 70.0  # RGB distance from the background that makes a pixel part of a mark; yellow, the nearest, has 220
SPECK_AREA = 8  # marks of fewer pixels are noise,
SPECK_TOTAL = 16  # as long as all of them together have fewer than this
BACKGROUND_SPREAD = 40.0  # at most 4 % of the background's pixels may be further off than this
COLOUR_DISTANCE = 30.0  # largest mean distance of a component's pixels from mixtures of one colour and background
OFF_COLOUR = 70.0  # distance of a pixel from the line between background and colour at which it counts as wrong
FIT = 0.8  # least agreement (soft intersection over union) with the best template
MARGIN = 0.025  # by which the best kind must beat every other
HOLE = 0.5  # largest mean error over a 4x4 window
EDGE_WIDTH = 2.5  # edge pixels per pixel of outline: 0 to 1.1 rendered, 2.6 to 3 after a Gaussian blur of sigma 1.5
RELATION_OFFSET = 8.0
PAD = 2  # pixels of window around a template on each side
_SCALES = (14 / 15, 1.0, 16 / 15)
_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis of (x, y), sign
_COLOUR_NAMES = tuple(COLOURS)
_BACKGROUND = np.array(BACKGROUND, dtype=np.float32)
_TOWARD = np.array(list(COLOURS.values()), dtype=np.float32) - _BACKGROUND  # [colours, 3]


@dataclass(frozen=True)
class Detected:
    """One mark found in an image.

    Attributes
    ----------
    kind, colour : str or None
        A shape or glyph, and a name of the palette; None where unreadable.
    centre, size : (float, float)
        x and y in pixels from the upper left corner; width and height of the bounding box.
    fault : str
        Why the mark is not a clean object; empty when it is.
    """

    kind: str | None
    colour: str | None
    centre: tuple[float, float]
    size: tuple[float, float]
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.colour or 'unclear'} {self.kind or 'mark'}"


@dataclass(frozen=True)
class Verdict:
    """Whether an image meets its prompt, and one sentence that says why or why not."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def verify(image, prompt: Prompt | str) -> Verdict:
    """Whether ``image`` shows exactly what ``prompt`` asks for.

    Parameters
    ----------
    image : uint8 array [48, 48, 3] or PIL image of that size.
    prompt : Prompt, or the text of one.

    Raises
    ------
    UserError
        The image has another shape or dtype; the text is not a prompt of the world.
    """
    if isinstance(prompt, str):
        prompt = parse(prompt)
    pixels = _pixels(image)
    objects, specks = _read(pixels)
    faults = [f"{o.fault} at x {o.centre[0]:.0f}, y {o.centre[1]:.0f}" for o in objects if o.fault]
    if fault := _background_fault(pixels, specks) or next(iter(faults), ""):
        return Verdict(False, fault)
    seen = ", ".join(map(str, objects)) or "nothing"
    if len(objects) != len(prompt.objects):
        return Verdict(False, f"expected {len(prompt.objects)} object{'s' * (len(prompt.objects) != 1)}, found {seen}")
    orders = [order for order in permutations(objects) if all(map(_matches, order, prompt.objects))]
    if not orders:
        return Verdict(False, f"expected {_wanted(prompt.objects)}, found {seen}")
    if prompt.relation and not any(_stands(order[0], order[1], prompt.relation) for order in orders):
        return Verdict(False, f"the {prompt.objects[0].kind} is not {prompt.relation} the {prompt.objects[1].kind}")
    return Verdict(True, f"found {seen}")


def read_scene(image) -> list[Detected]:
    """Every mark of at least eight pixels in ``image`` (as for :func:`verify`), from top to bottom."""
    return _read(_pixels(image))[0]


def _pixels(image) -> np.ndarray:
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.shape != (SIZE, SIZE, 3) or array.dtype != np.uint8:
        raise UserError(f"image: expected uint8 [{SIZE}, {SIZE}, 3], got {array.dtype} {list(array.shape)}")
    return array.astype(np.float32)


def _matches(found: Detected, wanted: Item) -> bool:
    return found.kind == wanted.kind and wanted.colour in (None, found.colour)


def _stands(first: Detected, second: Detected, relation: str) -> bool:
    axis, sign = _AXES[relation]
    offset = sign * (first.centre[axis] - second.centre[axis])
    return offset >= RELATION_OFFSET and offset > abs(first.centre[1 - axis] - second.centre[1 - axis])


def _wanted(items: tuple[Item, ...]) -> str:
    names = Counter(" ".join(filter(None, (item.colour, item.kind))) for item in items)
    return " and ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())


# Reading -------------------------------------------------------------------------------------------------------------


def _read(pixels: np.ndarray) -> tuple[list[Detected], np.ndarray]:
    """(marks, mask of the pixels that belong to no mark) of a float image [48, 48, 3]."""
    mark = np.linalg.norm(pixels - _BACKGROUND, axis=2) > MARK_DISTANCE
    objects, specks = _read_components(pixels, mark, components(mark))
    if any(o.fault for o in objects):
        # Strokes of a glyph may touch at a corner only, and a model may miss it by a hair: join over two pixels.
        joined = _read_components(pixels, mark, components(_dilate(mark)) * mark)
        if not any(o.fault for o in joined[0]):
            return joined
    return objects, specks


def _read_components(pixels: np.ndarray, mark: np.ndarray, labels: np.ndarray) -> tuple[list[Detected], np.ndarray]:
    objects, specks = [], mark.copy()
    for label in range(1, int(labels.max()) + 1):
        member = labels == label
        if member.sum() >= SPECK_AREA:
            alone = np.where((mark & ~member)[..., None], _BACKGROUND, pixels)
            objects.append(_identify(alone, member))
            specks &= ~member
    return objects, specks


def _background_fault(pixels: np.ndarray, specks: np.ndarray) -> str:
    if specks.sum() >= SPECK_TOTAL:
        return f"{int(specks.sum())} stray pixels"
    distance = np.linalg.norm(pixels - _BACKGROUND, axis=2)
    ground = distance[~_dilate(_dilate(distance > MARK_DISTANCE))]
    if ground.size == 0 or np.mean(ground > BACKGROUND_SPREAD) > 0.04:
        return "the background is not plain"
    return ""


def components(mask: np.ndarray) -> np.ndarray:
    """Connected components (8 neighbours) of a bool array [H, W]: int labels, 0 outside, 1, 2, ... from the top."""
    height, width = mask.shape
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above: list[int] = []
    current: list[int] = []
    for i, (row, start, stop) in enumerate(runs):
        if current and runs[current[0]][0] != row:
            above, current = current, []
        current.append(i)
        for j in above:
            other_row, other_start, other_stop = runs[j]
            if other_row == row - 1 and other_start <= stop and start <= other_stop:
                a, b = root(i), root(j)
                parent[max(a, b)] = min(a, b)
    labels = np.zeros((height, width), dtype=np.int64)
    numbers: dict[int, int] = {}
    for i, (row, start, stop) in enumerate(runs):
        labels[row, start:stop] = numbers.setdefault(root(i), len(numbers) + 1)
    return labels


def _dilate(mask: np.ndarray) -> np.ndarray:
    """``mask`` grown by one pixel in the eight directions."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    result = wide.copy()
    result[:, 1:] |= wide[:, :-1]
    result[:, :-1] |= wide[:, 1:]
    return result


def _identify(pixels: np.ndarray, member: np.ndarray) -> Detected:
    """What the component ``member`` (bool [48, 48]) of an image that shows no other mark is."""
    rows, columns = np.flatnonzero(member.any(1)), np.flatnonzero(member.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    centre, size = ((left + right) / 2, (top + bottom) / 2), (float(right - left), float(bottom - top))
    colour = _colour_of(pixels, member)
    if colour is None:
        return Detected(None, None, centre, size, "an object of no one colour")
    name = _COLOUR_NAMES[colour]
    bank = _bank("glyph" if max(size) > SHAPE_PIXELS + 3 else "shape")
    if size[1] > bank.height or size[0] > bank.width:
        return Detected(None, name, centre, size, "a mark too large for any object")

    # Coverage in a window as large as a template: how far each pixel is on the way from background to colour.
    corner = round(centre[1] - bank.height / 2), round(centre[0] - bank.width / 2)
    window = _window(pixels, corner, bank) - _BACKGROUND
    toward = _TOWARD[colour]
    coverage = (window @ toward / (toward @ toward)).clip(0, 1)
    astray = np.linalg.norm(window - coverage[..., None] * toward, axis=2) > OFF_COLOUR

    flat = coverage.ravel()
    product = bank.templates @ flat
    fits = product / (bank.energy + flat @ flat - product)
    best = int(fits.argmax())
    kind = bank.kind[best]
    template = bank.templates[best].reshape(coverage.shape)
    dx, dy = bank.shift[best]
    centre = (float(corner[1] + bank.width / 2 + dx), float(corner[0] + bank.height / 2 + dy))
    error = np.where(astray, 1.0, np.abs(coverage - template))
    edge = np.where((coverage > 0.1) & (coverage < 0.9), 4 * coverage * (1 - coverage), 0).sum() / bank.outline[best]
    fault = ""
    if edge > EDGE_WIDTH:
        fault = "a blurred object"
    elif fits[best] < FIT or _largest_mean(error) > HOLE:
        fault = "an object of no known shape"
    elif fits[best] - fits[bank.kind != kind].max() < MARGIN:
        fault = "an object between two shapes"
    return Detected(bank.names[kind], name, centre, size, fault)


def _colour_of(pixels: np.ndarray, member: np.ndarray) -> int | None:
    """Index of the palette colour whose mixtures with the background explain a component best, or None.

    Mixtures, because half of a ring's pixels lie on an edge.
    """
    offset = pixels[member] - _BACKGROUND
    coverage = (offset @ (_TOWARD / (_TOWARD**2).sum(1, keepdims=True)).T).clip(0, 1)
    astray = np.linalg.norm(offset[:, None] - coverage[..., None] * _TOWARD, axis=2).mean(0)
    colour = int(astray.argmin())
    return colour if astray[colour] < COLOUR_DISTANCE else None


def _window(pixels: np.ndarray, corner: tuple[int, int], bank: _Bank) -> np.ndarray:
    """The part of the image under a template, background where it reaches over the border."""
    result = np.broadcast_to(_BACKGROUND, (bank.height, bank.width, 3)).copy()
    (y, x), (top, left) = corner, (max(0, -corner[0]), max(0, -corner[1]))
    part = pixels[max(0, y):y + bank.height, max(0, x):x + bank.width]
    result[top:top + part.shape[0], left:left + part.shape[1]] = part
    return result


def _largest_mean(error: np.ndarray, side: int = 4) -> float:
    """The largest mean of ``error`` over a window of side x side pixels."""
    total = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    return float(sums.max()) / side**2


# Templates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bank:
    """K templates: every kind at every scale and shift."""

    names: tuple[str, ...]
    height: int
    width: int
    templates: np.ndarray  # float32 [K, height * width], coverage
    kind: np.ndarray  # int [K], index into names
    shift: np.ndarray  # float [K, 2], x and y from the middle of the window
    energy: np.ndarray  # float32 [K], sum of squares
    outline: np.ndarray  # float32 [K], length of the outline in pixels


@cache
def _bank(which: str) -> _Bank:
    """Templates of all shapes or of all glyphs."""
    import torch
    import torch.nn.functional as F

    names, masks, box = ((SHAPES, shape_masks(), (SHAPE_PIXELS,) * 2) if which == "shape"
                         else (GLYPHS, glyph_masks(), GLYPH_PIXELS))
    height, width = box[0] + 2 * PAD, box[1] + 2 * PAD
    padded = F.pad(masks, (PAD,) * 4)[:, None]
    templates, kinds, shifts = [], [], []
    for scale in _SCALES:
        for dx in _SHIFTS:
            for dy in _SHIFTS:
                # A pixel at p shows the mask at (p - shift) / scale; normalised coordinates span the window with 2.
                theta = torch.tensor([[1, 0, -2 * dx / width], [0, 1, -2 * dy / height]]) / scale
                grid = F.affine_grid(theta.expand(len(names), 2, 3), (len(names), 1, 4 * height, 4 * width),
                                     align_corners=False)
                fine = F.grid_sample(padded, grid, mode="bilinear", align_corners=False)
                templates.append(F.avg_pool2d(fine, 4)[:, 0])
                kinds.append(np.arange(len(names)))
                shifts.append(np.tile([dx, dy], (len(names), 1)))
    stack = torch.cat(templates).numpy()
    down, across = np.diff(stack, axis=1)[:, :, :-1], np.diff(stack, axis=2)[:, :-1]
    outline = np.hypot(down, across).sum((1, 2))
    flat = np.ascontiguousarray(stack.reshape(len(stack), -1))
    return _Bank(names, height, width, flat, np.concatenate(kinds), np.concatenate(shifts), (flat**2).sum(1), outline)
