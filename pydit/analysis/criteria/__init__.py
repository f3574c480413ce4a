"""Redundancy criteria, by name.

A criterion is a dataclass of options with two methods: ``score(stats)`` turns statistics into matrices that can be
saved and looked at, ``select(scores, target)`` turns those into a plan. A new one is a module here with a class under
``@register(name)``.
"""

from pydit.analysis.criteria.base import Criterion, Scores, get_criterion, names, register
from pydit.analysis.criteria.layerwise import (
    Amber,
    BlockInfluence,
    Hierarchical,
    Laptop,
    Layerwise,
    Random,
    RelativeL1,
    Uniform,
)
from pydit.analysis.criteria.ppcl import PPCL

__all__ = ["PPCL", "Amber", "BlockInfluence", "Criterion", "Hierarchical", "Laptop", "Layerwise", "Random",
           "RelativeL1", "Scores", "Uniform", "get_criterion", "names", "register"]
