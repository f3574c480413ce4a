"""Scenes of the demo world as tensors, and their images. Vectorised torch throughout: no loop over samples.

An image is 48x48 pixels. Objects stand on a grid of 8-pixel cells, one latent token of the demo's model each, so that
a small model can learn them crisply. Shapes fill 2x2 cells, a glyph 3x4. Several objects take different quadrants,
and the two columns (rows) of quadrants keep at least two pixels of background between objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from pydit.demo.world import COLOURS, GLYPHS, NUMBERS, RELATIONS, SHAPES, all_prompts

SIZE = 48
CELL = 8
SHAPE_PIXELS = 16
GLYPH_PIXELS = (32, 24)  # height, width of the box; the bitmap inside is 28 x 20
BACKGROUND = (242, 241, 236)
MAX_OBJECTS = max(NUMBERS.values())
_LANES = ((0, 3), (0, 4), (1, 4))  # first cells of the two columns (rows) of quadrants, never adjacent

_BITMAPS = {
    "A": "01110 10001 10001 11111 10001 10001 10001", "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111", "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001", "L": "10000 10000 10000 10000 10000 10000 11111",
    "N": "10001 11001 11001 10101 10011 10011 10001", "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110", "X": "10001 10001 01010 00100 01010 10001 10001",
    "1": "00100 01100 00100 00100 00100 00100 01110", "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110", "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110", "7": "11111 00001 00010 00100 01000 01000 01000",
}


@dataclass(frozen=True)
class Scenes:
    """N scenes of up to four objects; object j of scene n exists when ``present[n, j]``."""

    present: torch.Tensor  # bool [N, 4]
    kind: torch.Tensor  # int64 [N, 4], index into SHAPES, or into GLYPHS where is_glyph
    is_glyph: torch.Tensor  # bool [N]; a glyph is the only object of its scene
    colour: torch.Tensor  # int64 [N, 4], index into COLOURS
    x: torch.Tensor  # int64 [N, 4], left edge of the object's box in pixels
    y: torch.Tensor  # int64 [N, 4], upper edge


@cache
def shape_masks() -> torch.Tensor:
    """Coverage of each shape in its box, float32 [shapes, 16, 16] in [0, 1], anti-aliased by 8x8 supersampling."""
    fine = SHAPE_PIXELS * 8
    y, x = torch.meshgrid(*[(torch.arange(fine) + 0.5) / 8 - SHAPE_PIXELS / 2] * 2, indexing="ij")
    radius = (x**2 + y**2).sqrt()
    inside = {
        "circle": radius < 7,
        "square": (x.abs() < 6.5) & (y.abs() < 6.5),
        "triangle": (y.abs() < 6.5) & (x.abs() < (y + 6.5) * 7.25 / 13),
        "cross": ((x.abs() < 2.25) & (y.abs() < 7)) | ((y.abs() < 2.25) & (x.abs() < 7)),
        "diamond": (x.abs() + y.abs()) < 7.5,
        "ring": (radius < 7.25) & (radius > 3.75),
    }
    return torch.stack([inside[s].float().view(SHAPE_PIXELS, 8, SHAPE_PIXELS, 8).mean((1, 3)) for s in SHAPES])


@cache
def glyph_masks() -> torch.Tensor:
    """Coverage of each glyph in its box, float32 [glyphs, 32, 24]: a 5x7 bitmap at 4 pixels a dot, centred."""
    masks = torch.zeros(len(GLYPHS), *GLYPH_PIXELS)
    for mask, glyph in zip(masks, GLYPHS, strict=True):
        bits = torch.tensor([[float(bit) for bit in row] for row in _BITMAPS[glyph].split()])
        mask[2:30, 2:22] = bits.repeat_interleave(4, 0).repeat_interleave(4, 1)
    return masks


@cache
def _table(device: torch.device) -> tuple[torch.Tensor, ...]:
    """What prompts fix: count, is_glyph, kind [P, 4], colour [P, 4] (-1: open), relation (-1: none), one colour."""
    prompts = all_prompts()
    kind = torch.zeros(len(prompts), MAX_OBJECTS, dtype=torch.long)
    colour = torch.full_like(kind, -1)
    for i, prompt in enumerate(prompts):
        for j, item in enumerate(prompt.objects):
            kind[i, j] = GLYPHS.index(item.kind) if item.kind in GLYPHS else SHAPES.index(item.kind)
            if item.colour is not None:
                colour[i, j] = list(COLOURS).index(item.colour)
    relation = torch.tensor([-1 if p.relation is None else RELATIONS.index(p.relation) for p in prompts])
    tables = (torch.tensor([len(p.objects) for p in prompts]), torch.tensor([p.category == "glyph" for p in prompts]),
              kind, colour, relation, torch.tensor([p.category == "counting" for p in prompts]))
    return tuple(table.to(device) for table in tables)


def sample_scenes(indices: torch.Tensor, generator: torch.Generator) -> Scenes:
    """Scenes that meet the prompts with these indices [N]; colours and places left open are drawn uniformly."""
    device, n = indices.device, len(indices)
    count, is_glyph, kind, colour, relation, one_colour = (table[indices] for table in _table(device))

    def draw_int(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    shared = draw_int(len(COLOURS), n, 1).expand(n, MAX_OBJECTS)  # objects to be counted share a colour
    free = torch.where(one_colour[:, None], shared, draw_int(len(COLOURS), n, MAX_OBJECTS))
    colour = torch.where(colour < 0, free, colour)

    # Quadrants, numbered row by row: a random one for each object, or a pair that stands in the relation.
    quadrant = torch.rand(n, 4, generator=generator, device=device).argsort(1)
    lane = draw_int(2, n)
    horizontal = (relation == 0) | (relation == 1)
    far = ((relation == 1) | (relation == 3)).long()  # 1 when the first object is the right or lower one
    first = torch.where(horizontal, 2 * lane + far, 2 * far + lane)
    second = torch.where(horizontal, 2 * lane + 1 - far, 2 * (1 - far) + lane)
    pair = torch.stack((first, second), 1)
    quadrant = torch.where((relation >= 0)[:, None], torch.cat((pair, quadrant[:, 2:]), 1), quadrant)
    lanes = torch.tensor(_LANES, device=device)
    x = lanes[draw_int(len(_LANES), n)].gather(1, quadrant % 2)
    y = lanes[draw_int(len(_LANES), n)].gather(1, quadrant // 2)

    # A lone object may stand anywhere.
    alone = (count == 1)[:, None]
    box = torch.where(is_glyph, 0, 1)
    cells = torch.tensor([[SIZE - GLYPH_PIXELS[1], SIZE - GLYPH_PIXELS[0]], [SIZE - SHAPE_PIXELS] * 2],
                         device=device)[box] // CELL + 1
    anywhere = (torch.rand(n, 2, generator=generator, device=device) * cells).long()
    x, y = torch.where(alone, anywhere[:, :1], x), torch.where(alone, anywhere[:, 1:], y)
    present = torch.arange(MAX_OBJECTS, device=device) < count[:, None]
    return Scenes(present, kind, is_glyph, colour, x * CELL, y * CELL)


def draw(scenes: Scenes) -> torch.Tensor:
    """Images float32 [N, 3, 48, 48] in [-1, 1] of scenes."""
    device = scenes.x.device
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 127.5 - 1
    background = torch.tensor(BACKGROUND, dtype=torch.float32, device=device) / 127.5 - 1
    image = background.view(1, 3, 1, 1).expand(len(scenes.x), 3, SIZE, SIZE)
    shapes, glyphs = shape_masks().to(device), glyph_masks().to(device)
    for j in range(MAX_OBJECTS):
        shown = scenes.present[:, j] & ~scenes.is_glyph
        alpha = _place(shapes, torch.where(shown, scenes.kind[:, j], 0), scenes.x[:, j], scenes.y[:, j], shown)
        image = torch.lerp(image, palette[scenes.colour[:, j]][:, :, None, None], alpha)
    kind = torch.where(scenes.is_glyph, scenes.kind[:, 0], 0)
    alpha = _place(glyphs, kind, scenes.x[:, 0], scenes.y[:, 0], scenes.is_glyph)
    return torch.lerp(image, palette[scenes.colour[:, 0]][:, :, None, None], alpha)


def _place(masks: torch.Tensor, kind: torch.Tensor, x: torch.Tensor, y: torch.Tensor,
           shown: torch.Tensor) -> torch.Tensor:
    """Coverage [N, 1, 48, 48] of one mask per scene with its upper left corner at (x, y)."""
    grid = torch.arange(SIZE, device=x.device)
    height, width = masks.shape[1:]
    column, row = grid - x[:, None], grid - y[:, None]
    inside = ((column >= 0) & (column < width))[:, None, :] & ((row >= 0) & (row < height))[:, :, None]
    alpha = masks[kind[:, None, None], row.clamp(0, height - 1)[:, :, None], column.clamp(0, width - 1)[:, None, :]]
    return (alpha * (inside & shown[:, None, None]))[:, None]


def to_uint8(images: torch.Tensor):
    """[N, 3, H, W] in [-1, 1] -> numpy uint8 [N, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(images: torch.Tensor, captions: list[str], *, columns: int, headings: tuple[str, ...] = (),
                  zoom: int = 3):
    """A PIL image of captioned samples, row by row, with a heading over each column."""
    import textwrap

    from PIL import Image, ImageDraw, ImageFont

    side, gap, line, head = SIZE * zoom, 20, 15, 34 if headings else 12
    cell_width, cell_height = side + gap, side + 3 * line + 4
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, head + rows * cell_height + 6), "white")
    pen = ImageDraw.Draw(sheet)
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    for column, heading in enumerate(headings):
        pen.text((gap + column * cell_width, 10), heading, fill=(20, 20, 24), font=bold)
    for i, (pixels, caption) in enumerate(zip(to_uint8(images), captions, strict=True)):
        left, top = gap + i % columns * cell_width, head + i // columns * cell_height
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + side, top + side), outline=(205, 204, 198))
        for number, text in enumerate(textwrap.wrap(caption, 24)[:2]):
            pen.text((left, top + side + 4 + number * line), text, fill=(70, 70, 76), font=font)
    return sheet
