"""Anything in place of any argument of the statistics: a sentence that names it, or a result; never an error of torch's."""

import pytest
import torch

from pydit import stats
from tests import junk


def rows(seed):
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))


def moments():
    return stats.Moments(6, 6).update(rows(0), rows(1))


def cka():
    return stats.CKA(2).update([rows(0), rows(1)]).update([rows(2), rows(3)])


CALLS = {
    "Moments": (stats.Moments, {"dim_x": 6, "dim_y": 6, "device": "cpu"}),
    "Moments.update": (lambda **k: moments().update(**k), {"x": rows(0), "y": rows(1)}),
    "Moments.merge": (lambda **k: moments().merge(**k), {"other": moments()}),
    "Moments.load_state_dict": (lambda **k: moments().load_state_dict(**k), {"state": moments().state_dict()}),
    "LinearProbe.fit": (stats.LinearProbe.fit, {"moments": moments(), "ridge": 1e-6, "residual": False}),
    "LinearProbe.fit_all": (stats.LinearProbe.fit_all, {"moments": [moments()], "ridge": 1e-6, "residual": False}),
    "LinearProbe": (lambda **k: stats.LinearProbe.fit(moments())(**k), {"x": rows(0)}),
    "CKA": (stats.CKA, {"num_layers": 2}),
    "CKA.update": (lambda **k: cka().update(**k), {"features": [rows(0), rows(1)]}),
    "CKA.merge": (lambda **k: cka().merge(**k), {"other": cka()}),
    "CKA.interval": (lambda **k: cka().interval(**k), {"level": 0.9, "resamples": 10, "seed": 0}),
    "CKA.load_state_dict": (lambda **k: cka().load_state_dict(**k), {"state": cka().state_dict()}),
    "clip_outliers": (stats.clip_outliers, {"features": rows(0), "limit": 3.0}),
    "linear_cka": (stats.linear_cka, {"x": rows(0), "y": rows(1), "debiased": True}),
}


@pytest.mark.parametrize(("name", "argument"), junk.arguments(CALLS))
def test_junk_is_named(name, argument):
    junk.check(*CALLS[name], argument, others=("clip", "features"))


def test_the_valid_arguments_pass():
    for call, valid in CALLS.values():
        call(**valid)
