"""Find what a transformer can do without: activations -> statistics -> scores -> plan."""

from pydit.analysis.ablation import Ablation, ablate
from pydit.analysis.activations import ActivationStats
from pydit.analysis.candidates import Candidate, agreement, candidates
from pydit.analysis.collect import collect
from pydit.analysis.criteria import Scores
from pydit.analysis.criteria.base import removed_layers
from pydit.analysis.detect import detect, score, select
from pydit.analysis.learned_mask import learn_mask
from pydit.analysis.search import choose_linear_ffns, greedy_search, velocity_error
from pydit.analysis.trial import joint_removal, recoverability

__all__ = ["Ablation", "ActivationStats", "Candidate", "Scores", "ablate", "agreement", "candidates",
           "choose_linear_ffns", "collect", "detect", "greedy_search", "joint_removal", "learn_mask", "recoverability",
           "removed_layers", "score", "select", "velocity_error"]
