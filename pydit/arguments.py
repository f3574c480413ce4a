"""Whole numbers as arguments: every reader of one accepts the same kinds. Imports neither torch nor numpy."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from pydit.errors import UserError


def as_integer(value: Any) -> int | None:
    """A whole number as a plain int, numpy's and a tensor without dimensions too; None for anything else, and bools.

    Plain, because what is kept is written as JSON, and because numpy's narrow kinds overflow in a product.
    """
    if getattr(value, "ndim", 0) != 0 or isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def plain(value: Any) -> Any:
    """``value``, with plain ones for the numbers in it, and for what is True or False: :func:`as_integer`, and numpy's
    and torch's floats and bools."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a named tuple
        return value._make(map(plain, value))
    if (number := as_integer(value)) is not None:
        return number
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar and isinstance(value.item(), (bool, float)) else value


def make_plain(options: Any) -> None:
    """:func:`plain` of every field of a frozen dataclass: what is kept is written as JSON."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, plain(getattr(options, field.name)))


def shown(value: Any) -> str:
    """A value in a message: a number, a word or None as it is, anything larger by its type."""
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def integer(name: str, value: Any, least: int = 1, most: int = 2**31 - 1, *, expected: str | None = None) -> int:
    """A whole number from ``least`` to ``most`` as a plain int, or UserError that names the argument.

    expected : what the message says was expected; None says it in general.
    """
    found = as_integer(value)
    if found is None or not least <= found <= most:
        if expected is None:
            expected = f"{'a positive integer' if least == 1 else f'an integer of {least} or more'}, at most {most}"
        raise UserError(f"{name}: expected {expected}, got {shown(value if found is None else found)}")
    return found


def pairs(name: str, value: Any) -> list[tuple[int, int]]:
    """``value`` as pairs of plain ints, or UserError that names the argument."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise UserError(f"{name}: expected [start, end] pairs, got {value!r}")
    found = []
    for item in value:
        try:
            start, end = map(as_integer, item)
        except (TypeError, ValueError):
            start = end = None
        if start is None or end is None:
            raise UserError(f"{name}: expected [start, end] pairs of integers, got {item!r}")
        found.append((start, end))
    return found


def layers(name: str, value: Any) -> list[int]:
    """``value`` as distinct plain ints, or UserError that names the argument."""
    wrong = isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable)
    found = [] if wrong else [as_integer(layer) for layer in value]
    if wrong or None in found:
        raise UserError(f"{name}: expected numbers of layers, got {value!r}")
    if len(set(found)) < len(found):
        raise UserError(f"{name}: expected each layer once, got {found}")
    return found
