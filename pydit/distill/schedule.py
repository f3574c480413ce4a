"""How much of a phase is used up, and what learning rate and averaging window follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Width of the flattest averaging profile, gamma = 0 (a plain mean over the whole run), rounded down.
MAX_EMA_WIDTH = 0.28


@dataclass(frozen=True)
class Budget:
    """A phase ends after ``steps`` steps or ``seconds`` seconds, whichever comes first; None is no limit."""

    steps: int | None
    seconds: float | None

    def spent(self, step: int, seconds: float) -> bool:
        """Whether the phase is over after ``step`` steps and ``seconds`` seconds."""
        return (self.steps is not None and step >= self.steps) or (self.seconds is not None and seconds >= self.seconds)

    def fraction(self, step: int, seconds: float) -> float:
        """Fraction of the budget in the middle of the step about to run, in [0, 1].

        The middle, so that neither the first step of a phase has learning rate 0 nor the last one the rate of an
        unfinished cosine. The duration of the coming step is taken to be the mean so far.
        """
        by_steps = 0.0 if not self.steps else (step + 0.5) / self.steps
        by_time = 0.0
        if self.seconds:
            by_time = (seconds + (0.5 * seconds / step if step else 0.0)) / self.seconds
        return min(1.0, max(by_steps, by_time))


def lr_factor(fraction: float, *, warmup: float, final: float) -> float:
    """Learning rate over its peak: linear up to ``warmup``, then half a cosine down to ``final``.

    ``fraction`` in [0, 1] is that of :meth:`Budget.fraction`. The rise starts at 1 %, not 0, so that no step is wasted.
    """
    if fraction < warmup:
        return max(fraction / warmup, 0.01)
    position = (fraction - warmup) / (1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * position))


def ema_exponent(width: float) -> float:
    """The gamma whose averaging profile ``t^gamma`` has standard deviation ``width`` relative to the run's length.

    Solves ``width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`` for gamma >= 0.
    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696),
    power-function averaging.
    """
    low, high = 0.0, 1e9
    for _ in range(200):  # the right-hand side falls with gamma; 200 halvings exhaust a double
        middle = 0.5 * (low + high)
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2:
            low = middle
        else:
            high = middle
    return low


def ema_decay(step: int, exponent: float) -> float:
    """Weight of the old average after optimiser step ``step`` (1, 2, ...): ``(1 - 1/step)^(exponent + 1)``.

    The window is a fixed part of the run so far, so a run of 200 steps is averaged as well as one of 20,000 and
    the untrained weights are forgotten from the first step.
    """
    return (1 - 1 / step) ** (exponent + 1)
