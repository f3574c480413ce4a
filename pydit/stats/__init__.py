"""Streaming statistics of activations: second moments, linear probes, debiased CKA. Mergeable and resumable."""

from pydit.stats.cka import CKA, clip_outliers, linear_cka
from pydit.stats.moments import Moments
from pydit.stats.probe import LinearProbe

__all__ = ["CKA", "LinearProbe", "Moments", "clip_outliers", "linear_cka"]
