"""Captioned images from a folder or from tar shards, in a fixed order; what cannot be read is listed, not fatal.

A folder holds ``name.png`` (or jpg, jpeg, webp) beside ``name.txt`` or ``name.json``, at any depth. A shard is a tar
file in the manner of WebDataset: members that share their name up to the first dot make one sample.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydit.errors import FormatError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION_KEYS = ("caption", "text", "prompt", "caption_en", "prompt_en", "caption_zh", "prompt_zh")


@dataclass(frozen=True)
class Sample:
    """key : its place in the source. image : an encoded image file. caption : text, not empty."""

    key: str
    image: bytes
    caption: str


@dataclass(frozen=True)
class Skipped:
    """A sample, or the rest of a shard, that could not be used, and why."""

    key: str
    reason: str


def read_samples(path: str | os.PathLike) -> Iterator[Sample | Skipped]:
    """Yield the samples of a folder, a folder of ``.tar`` shards or one shard, always in the same order.

    Raises
    ------
    FormatError
        ``path`` does not exist, or there is neither an image nor a shard in it.
    """
    path = Path(path)
    if path.is_file():
        shards, images = [path], []
    elif path.is_dir():
        shards = sorted(path.rglob("*.tar"))
        images = [] if shards else sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())
    else:
        raise FormatError(f"data: expected a folder of captioned images or of tar shards, got {path}, which does not "
                          "exist")
    if not shards and not images:
        raise FormatError(f"data: expected images ({', '.join(IMAGES)}) or .tar shards in {path}, got none")
    for shard in shards:
        yield from _shard(shard, shard.name if path.is_file() else shard.relative_to(path).as_posix())
    for image in images:
        key = image.relative_to(path).with_suffix("").as_posix()
        files = {suffix: image.with_suffix(suffix) for suffix in (".txt", ".json")}
        try:
            parts = {suffix: file.read_bytes() for suffix, file in files.items() if file.is_file()}
            yield _sample(key, {image.suffix.lower(): image.read_bytes(), **parts})
        except OSError as error:
            yield Skipped(key, f"cannot be read: {error.strerror or error}")


def _shard(path: Path, name: str) -> Iterator[Sample | Skipped]:
    key, parts = None, {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if this != key:
                    if parts:
                        yield _sample(f"{name}:{key}", parts)
                    key, parts = this, {}
                # WebDataset allows several dots ("1.0.jpg" holds the image of sample 1); the last part is the type.
                content = tar.extractfile(member).read()
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                parts[dot + suffix.rpartition(".")[2].lower()] = content
        if parts:
            yield _sample(f"{name}:{key}", parts)
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Skipped(name, f"no complete tar file, the rest is left out: {error}")


def _sample(key: str, parts: dict[str, bytes]) -> Sample | Skipped:
    image = next((parts[suffix] for suffix in IMAGES if suffix in parts), None)
    if image is None:
        return Skipped(key, f"no image among {', '.join(sorted(parts))}")
    try:
        caption = _caption(parts)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        return Skipped(key, f"caption cannot be read: {str(error)[:100]}")
    return Sample(key, image, caption) if caption else Skipped(key, "no caption")


def _caption(parts: dict[str, bytes]) -> str:
    if ".txt" in parts:
        return parts[".txt"].decode("utf-8").strip()
    if ".json" not in parts:
        return ""
    data = json.loads(parts[".json"].decode("utf-8"))
    found = (data.get(name) for name in CAPTION_KEYS) if isinstance(data, dict) else ()
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")
