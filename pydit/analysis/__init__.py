"""Find what a transformer can do without: activations -> statistics -> scores -> plan."""

from pydit.analysis.activations import ActivationStats
from pydit.analysis.collect import collect
from pydit.analysis.criteria import Scores
from pydit.analysis.detect import detect, score, select
from pydit.analysis.search import greedy_search, velocity_error

__all__ = ["ActivationStats", "Scores", "collect", "detect", "greedy_search", "score", "select", "velocity_error"]
