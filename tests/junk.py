"""What a test puts in place of an argument: the message has to name the argument, or the call to work."""

import torch

from pydit.errors import UserError

JUNK = {"none": None, "three": 3, "minus": -1, "zero": 0, "fraction": 2.5, "nan": float("nan"), "inf": float("inf"),
        "word": "a", "bytes": b"x", "list": [], "dict": {}, "tuple": (), "object": object(), "short": torch.zeros(2),
        "whole": torch.zeros(20, 6, dtype=torch.int64), "narrow": torch.zeros(20, 5), "numbers": [3], "words": ["a"],
        "named": {"a": 1}, "true": True, "huge": 10**30, "nested": [[1]], "reversed": [(3, 1)], "hole": [None]}


def arguments(calls):
    """(call, argument) of every argument of ``calls``: name -> (function, valid arguments by name)."""
    return [(name, argument) for name, (_, valid) in calls.items() for argument in valid]


def check(call, valid, argument, *, others=()):
    """One argument replaced by everything in turn: a result, or a sentence on one line that starts with its name or one
    of ``others``."""
    wrong = {}
    for name, value in JUNK.items():
        try:
            call(**{**valid, argument: value})
        except UserError as error:
            text = str(error)
            if "expected " not in text or not any(text.startswith(start) for start in (*valid, *others)) or (
                    not isinstance(value, torch.Tensor) and ("\n" in text or len(text) >= 400)):
                wrong[name] = text
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
    assert not wrong, wrong
