"""Captioned images from a folder or from tar shards, in a fixed order; what cannot be read is listed, not fatal.

A folder holds ``name.png`` (or jpg, jpeg, webp) beside ``name.txt`` or ``name.json``, at any depth. A shard is a tar
file in the manner of WebDataset: members that share their name up to the first dot make one sample. Nothing is
extracted: links and names that lead out of a shard are listed as skipped.
"""

from __future__ import annotations

import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydit.errors import FormatError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
MAX_BYTES = 256 << 20  # of one file: a compressed shard can hold a thousand times its own size
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
            files = {image.suffix.lower(): image, **{s: file for s, file in files.items() if file.is_file()}}
            large = [file.name for file in files.values() if file.stat().st_size > MAX_BYTES]
            if large:
                yield Skipped(key, f"{large[0]} has more than {MAX_BYTES >> 20} MiB")
                continue
            yield _sample(key, {suffix: file.read_bytes() for suffix, file in files.items()})
        except OSError as error:
            yield Skipped(key, f"cannot be read: {error.strerror or error}")


def _shard(path: Path, name: str) -> Iterator[Sample | Skipped]:
    key, parts = None, {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                problem = _problem(member)
                if problem:
                    yield Skipped(f"{name}:{member.name}", problem)
                if problem or not member.isfile():
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
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        yield Skipped(name, f"no complete tar file, the rest is left out: {' '.join(str(error).split())[:100]}")


def _problem(member: tarfile.TarInfo) -> str | None:
    """Why a member is left alone, or None."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the shard"
    if member.issym() or member.islnk():
        return "a link"
    if member.isfile() and member.issparse():
        return "a sparse file, which announces more bytes than it holds"
    if member.isfile() and not 0 <= member.size <= MAX_BYTES:
        return f"more than {MAX_BYTES >> 20} MiB"
    return None


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
