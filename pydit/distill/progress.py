"""The progress bar of a phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydit.distill.schedule import Budget


@contextmanager
def step_bar(show: bool, name: str, budget: Budget, done: int) -> Iterator[Any]:
    """A tqdm bar over the steps of a phase (open-ended under a pure time budget), or a stand-in without tqdm."""
    if show:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            show = False
    if not show:
        yield _Silent()
        return
    label = name if budget.seconds is None else f"{name} ({budget.seconds / 60:.1f} min at most)"
    with tqdm(total=budget.steps, initial=done, desc=label, unit="step") as bar:
        yield bar


class _Silent:
    """A progress bar that shows nothing."""

    def update(self, steps: int) -> None:
        pass

    def set_postfix(self, **values: Any) -> None:
        pass
