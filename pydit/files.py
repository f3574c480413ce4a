"""Files the package reads and writes: JSON and safetensors, written atomically, read with care.

A write goes to a temporary directory beside its target, is flushed to disk and renamed over the target, so that a kill
or a full disk leaves what was there before. The directory is locked as long as its process lives; what a killed one
left, the next write of the same target removes. Pickles are refused: loading one runs code chosen by whoever wrote it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydit.errors import MAKE_ROOM, FormatError, UserError

MAX_TEXT = 1 << 30  # bytes of JSON or text that are read: a sparse file can announce more than there is memory
MAX_HEADER = 100_000_000  # bytes of a safetensors header, as in the library of that name
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and the flag of renameat2(2)
_PICKLE_MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def refuse_pickle(path: str | os.PathLike, *, what: str) -> None:
    """Raise FormatError when ``path`` looks like a pickle, by its name or by its first bytes."""
    path = Path(path)
    first = b""
    if path.is_file():
        with path.open("rb") as file:
            first = file.read(9)
    # A safetensors header of 640 bytes begins with the two bytes of a pickle: its length. "{" comes behind it.
    header = first[8:] == b"{" and int.from_bytes(first[:8], "little") <= path.stat().st_size - 8
    if path.suffix.lower() in PICKLE_SUFFIXES or (first.startswith(_PICKLE_MAGIC) and not header):
        raise FormatError(f"{what}: expected a safetensors or JSON file, got a pickle ({path}); "
                          "loading a pickle runs code from whoever wrote it, so it is refused")


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically. NaN and infinity are refused (ValueError)."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike, *, what: str, strict: bool = False) -> Any:
    """Read a JSON file; ``what`` names the argument in errors (FormatError).

    ``strict`` refuses what :func:`write_json` never writes and other programs do: NaN and infinity, and a name twice
    in one object, of which Python would take the last and a reader the first.
    """
    path = existing_file(path, what=what, expected="a JSON file")
    refuse_pickle(path, what=what)
    try:
        text = read_text(path, what=what)
        found = json.loads(text, object_pairs_hook=_each_once if strict else None)
        if strict or re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair can be neither printed nor written
            json.dumps(found, ensure_ascii=False, allow_nan=not strict).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: expected JSON in {path}, got something else ({str(error)[:200]})") from None
    return found


def _each_once(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    """The entries of a JSON object; ValueError when two of them have one name."""
    found = dict(entries)
    if len(found) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} more than once in one object")
    return found


def read_text(path: Path, *, what: str) -> str:
    """A UTF-8 file of at most ``MAX_TEXT`` bytes; FormatError when it has more, UnicodeDecodeError when it is none."""
    if (size := path.stat().st_size) > MAX_TEXT:
        raise FormatError(f"{what}: expected a file of at most {MAX_TEXT} bytes, got {size} ({path})")
    return path.read_text(encoding="utf-8")


def save_safetensors(path: str | os.PathLike, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write tensors (name -> torch.Tensor, any device) as one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replace_file(path) as temporary:
        try:
            save_file(tensors, str(temporary), metadata=metadata)
        except SafetensorError as error:
            raise write_error(error, path) from None


def write_error(error: Exception, path: str | os.PathLike) -> OSError:
    """What safetensors says of a failed write, such as to a full disk, as the system's error that it was."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {error}", str(path))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path))


def load_safetensors(path: str | os.PathLike, *, what: str, device: str = "cpu",
                     wanted: Callable[[str], bool] | None = None) -> tuple[dict, dict[str, str]]:
    """Read a safetensors file -> (tensors, metadata); ``what`` names the argument in errors (FormatError).

    ``wanted`` says of a name whether its tensor is read; None is all.
    """
    from safetensors import SafetensorError, safe_open

    path = existing_file(path, what=what, expected="a safetensors file")
    read_header(path, what=what)
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            names = [name for name in file.keys() if wanted is None or wanted(name)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, UnicodeDecodeError) as error:
        raise FormatError(f"{what}: expected a complete safetensors file, got a broken one ({path}: {error})") from None


def read_header(path: str | os.PathLike, *, what: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, checked against the file -> (name -> entry, where the tensors begin).

    What is not there is not asked for: a tensor's bytes must be those of its dtype and shape, the tensors must lie one
    behind the other and fill the file.

    Raises
    ------
    FormatError
        A pickle, or a broken or truncated file; the message names it and what is wrong.
    """
    path = Path(path)
    refuse_pickle(path, what=what)
    size, wrong = path.stat().st_size, None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            wrong = f"{size} bytes, shorter than its header"
        elif length > MAX_HEADER:
            wrong = f"a header of {length} bytes, more than {MAX_HEADER}"
        else:
            try:
                header = json.loads(file.read(length))
            except (ValueError, RecursionError):
                wrong = "unreadable header"
            else:
                wrong = _wrong_header(header, size - 8 - length)
    if wrong:
        raise FormatError(f"{what}: expected a complete safetensors file, got a broken one ({path}: {wrong})")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + length


def _wrong_header(header: Any, payload: int) -> str | None:
    """What is wrong with a header for so many bytes of tensors, or None."""
    from safetensors.torch import _TYPES

    if not isinstance(header, dict):
        return "unreadable header"
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                return "metadata that are not text"
            continue
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            return f"no dtype, shape and offsets of {name!r}"
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _TYPES:
            return f"{name!r} of an unknown dtype {str(dtype)[:40]!r}"
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            return f"no shape and offsets of {name!r}"
        if math.prod(shape) * _TYPES[dtype].itemsize != offsets[1] - offsets[0]:
            return f"{name!r} of shape {str(shape)[:80]} and dtype {dtype} in bytes {offsets[0]} to {offsets[1]}"
        places.append(offsets)
    end = 0
    for start, stop in sorted(places):
        if start != end:
            return f"tensors that {'overlap' if start < end else 'leave a gap'} at byte {min(start, end)}"
        end = stop
    return None if end == payload else f"{payload} bytes of tensors instead of {end}"


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def shard_names(index: str | os.PathLike, *, what: str) -> list[str]:
    """The files that a ``*.safetensors.index.json`` names, each once, sorted. Raises FormatError naming the index."""
    data = read_json(index, what=what)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names:
        raise FormatError(f"{what}: expected a weight_map in {index}, got none")
    for name in names.values():
        require_file_name(name, what=what, where=index)
    return sorted(set(names.values()))


def require_file_name(name: Any, *, what: str, where: str | os.PathLike) -> str:
    """``name``, which a file names beside itself; FormatError when it leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0") or len(os.fsencode(name)) > 255:
        raise FormatError(f"{what}: expected a file name beside {where}, got {str(name)[:200]!r}")
    return name


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path for a new file that takes the place of ``path`` on success and vanishes on failure."""
    path = as_path(path, what="out")
    if path.exists() and not path.is_file():  # the rename would take the place of a device or a pipe
        raise UserError(f"out: expected a file or a new path, got {_kind(path)} ({path})")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_directory(path) as folder:
        temporary = folder / path.name
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors keeps its files from others
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)


@contextlib.contextmanager
def advised() -> Iterator[None]:
    """Errors for want of room, in here, say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.strerror and "make room" not in error.strerror:
            error.strerror += f"; {MAKE_ROOM}"
        raise


@contextlib.contextmanager
def replace_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary sibling of ``path`` that takes its place on success and vanishes on failure.

    What exists is replaced under the conditions of :func:`require_replaceable`.
    """
    path = as_path(path, what="out")
    if path.is_symlink():
        path = path.resolve()  # what it points to is replaced, and it goes on pointing there
    require_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with advised(), _temporary_directory(path) as temporary:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        _fsync_files(temporary)
        if path.exists():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)
        _fsync(path.parent)


def require_replaceable(path: str | os.PathLike) -> None:
    """Raise UserError unless ``path`` is new, empty, or a directory that this package could have written.

    That is one with a ``model_index.json`` or a ``config.json``; anything else is not to be deleted.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"out: expected a directory or a new path, got the file {path}")
    require_room(path)
    if path.is_dir() and any(path.iterdir()) and not any(
            (path / name).is_file() for name in ("model_index.json", "config.json")):
        raise UserError(f"out: expected a new path, an empty directory or a model directory to replace, got {path}")


def require_room(path: str | os.PathLike, *, what: str = "out") -> None:
    """Raise UserError for a new path in something that is no directory, or in one that nothing can be written to."""
    inside = next((parent for parent in _resolved(path).parents if os.path.lexists(parent)), Path("/"))
    if not inside.is_dir():
        raise UserError(f"{what}: expected a path in a directory, got {path}, because {inside} is no directory")
    if not os.access(inside, os.W_OK | os.X_OK):
        raise UserError(f"{what}: expected a path that can be written, got {path} in {inside}, which is read-only")


def require_apart(out: str | os.PathLike, source: str | os.PathLike) -> None:
    """Raise UserError for an output directory that is, holds or lies in one that is read."""
    new, read = _resolved(out), _resolved(source)
    if new in read.parents:
        raise UserError(f"out: expected a directory apart from {source}, which is read, got {out}")
    require_outside(out, source, what="out", use="read")


def require_outside(path: str | os.PathLike, folder: str | os.PathLike, *, what: str, use: str) -> None:
    """Raise UserError for a directory that is or lies in another one, which is ``use``: read, written, removed."""
    new, other = _resolved(path), _resolved(folder)
    if new == other or other in new.parents:
        raise UserError(f"{what}: expected a directory apart from {folder}, which is {use}, got {path}")


def require_file(path: str | os.PathLike | None, *apart: str | os.PathLike | None, what: str, kind: str) -> None:
    """Raise UserError for an output file whose place is taken by what is read, or by something of another kind.

    Parameters
    ----------
    path : None is no output. An empty file is as good as none.
    apart : what the command reads, and its other outputs; None is left out.
    what : the argument, for errors.
    kind : what may be replaced: a format of our JSON and safetensors files, "picture" (PNG) or "page" (HTML).
    """
    if path is None:
        return
    path = Path(path)
    for other in apart:
        if other is not None and _resolved(other) == _resolved(path):
            raise UserError(f"{what}: expected a file apart from {other}, which is read or written too, got {path}")
    if path.exists() and not path.is_file():
        raise UserError(f"{what}: expected a file or a new path, got {_kind(path)} ({path})")
    require_room(path, what=what)
    if path.is_file() and path.stat().st_size and (found := format_of(path)) != kind:
        raise UserError(f"{what}: expected a new file or a {kind} to replace, got {path}, which is "
                        f"{f'a {found}' if found else 'something else'}")


def format_of(path: Path) -> str:
    """What a file says that it is, as ``kind`` of :func:`require_file`; "" where it says nothing known, or is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        first = file.read(4096)
        length = int.from_bytes(first[:8], "little")
        if first[8:9] == b"{" and length <= MAX_HEADER:
            file.seek(8)
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                return str(json.loads(file.read(length)).get("__metadata__", {}).get("format", ""))
    if first.startswith(b"\x89PNG"):
        return "picture"
    if first.lower().startswith(b"<!doctype html"):
        return "page"
    found = re.match(rb'\s*\{\s*"format":\s*"([\w-]+)"', first)
    return found[1].decode() if found else ""


def remove_directory(path: str | os.PathLike) -> None:
    """Remove a directory in one step: a kill leaves it whole, or gone but for what the next removal clears away."""
    path = Path(path)
    with contextlib.suppress(OSError), _temporary_directory(path) as temporary:
        os.rename(path, temporary / path.name)
    if path.exists():  # no room for another directory: file by file
        shutil.rmtree(path)


@contextlib.contextmanager
def _temporary_directory(path: Path) -> Iterator[Path]:
    """Yield a new directory beside ``path``, locked until the end of the block, then removed.

    An error that names something in it, or nothing, as that of a write does, names ``path`` instead.
    """
    remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.part")
    temporary, lock = _locked_directory(path)
    try:
        yield temporary
    except OSError as error:
        named = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
        if error.errno is None or (named and not any(Path(name).is_relative_to(temporary) for name in named)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _locked_directory(path: Path) -> tuple[Path, int]:
    """A new directory beside ``path`` and the handle that locks it."""
    while True:
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        except OSError as error:
            error.filename = str(path)
            raise
        lock = os.open(temporary, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: nothing can be told apart there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, lock
        os.close(lock)  # another process locked it first, and removed it


def remove_leftovers(directory: Path, pattern: str) -> None:
    """Remove temporary directories of killed writes, by a glob pattern that ends in ``.part``.

    A lock ends with its process, whatever ends that, on whatever machine: a directory that can be locked belongs to
    nobody. Where a file system has no locks nothing is removed.
    """
    for left in directory.glob(pattern):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def is_unused(directory: str | os.PathLike) -> bool:
    """Whether a directory does not exist, or holds at most what killed writes left."""
    directory = Path(directory)
    return not directory.exists() or (directory.is_dir() and all(
        name.startswith(".") and name.endswith(".part") for name in os.listdir(directory)))


def _exchange(new: Path, path: Path) -> None:
    """Let two directories change places, in one step where the system can, so that ``path`` is never missing."""
    with contextlib.suppress(AttributeError):
        if ctypes.CDLL(None).renameat2(_HERE, os.fsencode(new), _HERE, os.fsencode(path), _RENAME_EXCHANGE) == 0:
            return
    previous = new.with_suffix(".old")
    os.rename(path, previous)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(previous, path)
        raise
    shutil.rmtree(previous)


def put_directory(temporary: Path, path: Path) -> None:
    """Flush a finished directory to the disk and give it the name of a sibling that does not exist."""
    _fsync_files(temporary)
    os.rename(temporary, path)
    _fsync(path.parent)


def as_path(path: str | os.PathLike, *, what: str) -> Path:
    """``path`` as a Path; UserError when it is none."""
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"{what}: expected a path, got {type(path).__name__}")
    return Path(path)


def existing_file(path: str | os.PathLike, *, what: str, expected: str) -> Path:
    """``path``, when it is a file; else FormatError."""
    path = as_path(path, what=what)
    if not path.exists():
        raise FormatError(f"{what}: expected {expected}, got a path that does not exist ({path})")
    if not path.is_file():
        raise FormatError(f"{what}: expected {expected}, got {_kind(path)} ({path})")
    return path


def _resolved(path: str | os.PathLike) -> Path:
    """``path`` without links. Path.resolve raises RuntimeError for one that leads to itself."""
    return Path(os.path.realpath(path))


def _kind(path: Path) -> str:
    """What a path that is no file is."""
    return "a directory" if path.is_dir() else "a device or a pipe"


def _fsync_files(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            _fsync(file)
    _fsync(directory)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
