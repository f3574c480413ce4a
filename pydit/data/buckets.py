"""Image sizes of one area and many shapes, so that images keep their aspect ratio and batches one size."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np

from pydit.errors import UserError

_FORMATS = ("PNG", "JPEG", "WEBP")
_WIDEST = 2.0  # from 1:2 to 2:1


def buckets(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """(height, width) pairs, multiples of ``step``, of about ``resolution`` squared pixels, from tall to wide."""
    if resolution < step:
        raise UserError(f"resolution: expected at least {step} pixels, got {resolution}")
    sizes = set()
    for width in range(step, int(resolution * math.sqrt(_WIDEST)) + step, step):
        height = max(step, round(resolution * resolution / width / step) * step)
        if max(height / width, width / height) <= _WIDEST + 1e-9:
            sizes |= {(height, width), (width, height)} if _near(height * width, resolution ** 2) else set()
    return tuple(sorted(sizes, key=lambda size: size[1] / size[0])) or ((resolution // step * step,) * 2,)


def _near(area: int, wanted: int) -> bool:
    """Rounding to few steps of a small image may double its area."""
    return max(area / wanted, wanted / area) <= 1.4


def nearest(sizes: tuple[tuple[int, int], ...], height: int, width: int) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest (in its logarithm) to that of an image."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[1] / size[0]) - wanted), size))


def decode(image: bytes, sizes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3] of its bucket: scaled to cover it and cut at the centre.

    Raises
    ------
    ValueError
        No image, a broken one, or one of an unreasonable size.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        # Pillow warns above 89 megapixels and refuses twice as many; its reader of PostScript would start a program.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(image), formats=_FORMATS)
        with opened:
            if min(opened.size) < 1:
                raise ValueError("an empty image")
            height, width = nearest(sizes, opened.height, opened.width)
            upright = _eight_bits(ImageOps.exif_transpose(opened)).convert("RGB")
            if (upright.height > upright.width) != (opened.height > opened.width):
                height, width = nearest(sizes, upright.height, upright.width)
            return np.asarray(ImageOps.fit(upright, (width, height), method=Image.Resampling.LANCZOS))
    except UnidentifiedImageError:  # its own message holds an address
        raise ValueError("no readable image: of no known format") from None
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning, ValueError,
            MemoryError) as error:
        raise ValueError(f"no readable image: {str(error)[:100] or type(error).__name__}") from None


def _eight_bits(image: Any) -> Any:
    """A grey picture of 16 bits in 8: Pillow's own conversion clips at 255."""
    if not image.mode.startswith("I"):
        return image
    from PIL import Image

    return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
