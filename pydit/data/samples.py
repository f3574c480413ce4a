"""Captioned images from a folder or from tar shards, in a fixed order; what cannot be read is listed, not fatal.

A folder holds ``name.png`` (or jpg, jpeg, webp) beside ``name.txt`` or ``name.json``, at any depth. A shard is a tar
file in the manner of WebDataset: members that share their name up to the first dot make one sample. Nothing is
extracted: links and names that lead out of a shard are listed as skipped.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydit.errors import FormatError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
MAX_BYTES = 256 << 20  # of one sample: a compressed shard can hold a thousand times its own size
MAX_TEXT = 1 << 20  # bytes of a caption, and of what a shard says of one member before its contents
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
CAPTIONS = (".txt", ".json")
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
    shards, images = _files(path)
    for shard in shards:
        yield from _shard(shard, shard.name if path.is_file() else shard.relative_to(path).as_posix())
    for image in images:
        key = _printable(image.relative_to(path).with_suffix("").as_posix())
        files = _captions(image)
        try:
            files = {image.suffix.lower(): image, **{s: file for s, file in files.items() if file.is_file()}}
            large = [suffix for suffix, file in files.items() if file.stat().st_size > _most(suffix)]
            if large:
                yield Skipped(key, f"{files[large[0]].name} has more than {_most(large[0]) >> 20} MiB")
                continue
            yield _sample(key, {suffix: file.read_bytes() for suffix, file in files.items()})
        except OSError as error:
            yield Skipped(key, f"cannot be read: {error.strerror or error}")


def checksum(path: str | os.PathLike) -> str:
    """Of the names and sizes of everything that :func:`read_samples` reads; it raises the same errors."""
    path = Path(path)
    shards, images = _files(path)
    captions = [file for image in images for file in _captions(image).values()]
    digest = hashlib.sha256()
    for file in [*shards, *images, *(file for file in captions if file.is_file())]:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        with contextlib.suppress(OSError):
            digest.update(f"{name} {file.stat().st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _captions(image: Path) -> dict[str, Path]:
    """The files beside an image that may hold its caption, by suffix in small letters."""
    spelled = {suffix: (suffix, suffix.upper()) for suffix in CAPTIONS}
    return {suffix: next((file for file in map(image.with_suffix, ways) if file.is_file()), image.with_suffix(suffix))
            for suffix, ways in spelled.items()}


def _printable(key: str) -> str:
    """A name of bytes that are not UTF-8 as text that can be written to a file."""
    return os.fsencode(key).decode("utf-8", "backslashreplace")


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The shards, or else the images, of a source."""
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
    return shards, images


def _shard(path: Path, name: str) -> Iterator[Sample | Skipped]:
    key, parts = None, {}
    if not path.is_file():  # a pipe would be waited for
        yield Skipped(name, "not a file")
        return
    try:
        with _open(path) as file, tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps them all
                tar.fileobj.left = MAX_TEXT
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                # WebDataset allows several dots ("1.0.jpg" holds the image of sample 1); the last part is the type.
                this = _printable(f"{folder}/{stem}" if folder else stem)
                suffix = dot + suffix.rpartition(".")[2].lower()
                problem = _problem(member, suffix, sum(map(len, parts.values())) if this == key else 0)
                if problem:
                    yield Skipped(f"{name}:{_printable(member.name)}", problem)
                if problem or not member.isfile():
                    continue
                if this != key or parts.get(suffix):  # shards that were joined: another sample of the same name
                    if parts:
                        yield _sample(f"{name}:{key}", parts)
                    key, parts = this, {}
                if suffix not in (*IMAGES, *CAPTIONS):
                    if len(parts) < 16:
                        parts[suffix] = b""  # named where there is no image
                    continue
                tar.fileobj.left += member.size
                parts[suffix] = content = tar.extractfile(member).read()
                if len(content) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
        if parts:
            yield _sample(f"{name}:{key}", parts)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError,
            MemoryError) as error:
        text = str(error) or type(error).__name__
        yield Skipped(name, f"no complete tar file, the rest is left out: {' '.join(text.split())[:100]}")


def _open(path: Path) -> BinaryIO:
    """The bytes of a shard, unpacked as they are read."""
    with path.open("rb") as file:
        first = file.read(6)
    return next((how for magic, how in _COMPRESSED.items() if first.startswith(magic)), open)(path, "rb")


class _Bounded:
    """A file to tarfile, which takes whatever a header announces to be a name or an attribute into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left = file, MAX_TEXT
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """``size`` bytes; ReadError when they are more than ``left``, which they are taken from."""
        if size > self.left:
            raise tarfile.ReadError(f"a header of more than {MAX_TEXT >> 20} MiB")
        self.left -= size
        return self._file.read(size)


def _problem(member: tarfile.TarInfo, suffix: str, held: int) -> str | None:
    """Why a member is left alone, or None; ``held``: bytes that its sample has already."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the shard"
    if member.issym() or member.islnk():
        return "a link"
    if member.isfile() and member.issparse():
        return "a sparse file, which announces more bytes than it holds"
    if member.isfile() and not 0 <= member.size <= (most := _most(suffix)):
        return f"more than {most >> 20} MiB"
    if member.isfile() and suffix in IMAGES and held + member.size > MAX_BYTES:
        return f"a sample of more than {MAX_BYTES >> 20} MiB"
    return None


def _most(suffix: str) -> int:
    """Bytes that a file of a sample may have."""
    return MAX_TEXT if suffix in CAPTIONS else MAX_BYTES


def _sample(key: str, parts: dict[str, bytes]) -> Sample | Skipped:
    image = next((parts[suffix] for suffix in IMAGES if suffix in parts), None)
    if image is None:
        return Skipped(key, f"no image among {', '.join(sorted(parts))}")
    try:
        caption = _caption(parts)
        caption.encode()  # JSON can hold half of a surrogate pair
    except (ValueError, RecursionError) as error:  # UnicodeError is the first
        return Skipped(key, f"caption cannot be read: {str(error)[:100]}")
    return Sample(key, image, caption) if caption else Skipped(key, "no caption")


def _caption(parts: dict[str, bytes]) -> str:
    if ".txt" in parts:
        return parts[".txt"].decode("utf-8-sig").strip()
    if ".json" not in parts:
        return ""
    data = json.loads(parts[".json"].decode("utf-8-sig"))
    found = (data.get(name) for name in CAPTION_KEYS) if isinstance(data, dict) else ()
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")
