"""PPCL on the committed demo teacher, where 1 - CKA misjudges the last block and an ablation knows."""

import itertools
import warnings

import pytest
import torch

from pydit.analysis import collect, detect, removed_layers
from pydit.demo import data
from pydit.demo.teacher import ASSETS
from pydit.inference.pipeline import load_pipeline


@pytest.fixture(scope="module")
def stats():
    pipe = load_pipeline(ASSETS, dtype=torch.float32)
    batches = itertools.islice(data.make_batches(pipe, batch_size=8, seed=0), 4)
    return collect(pipe.transformer, [batch for batch, _ in batches], tokens_per_batch=96, with_ablation=True,
                   progress=False)


@pytest.mark.parametrize("selection", ["difference", "optimal"])
def test_last_block_is_cheap_by_cka_and_dear_to_the_output(selection, stats):
    with pytest.warns(UserWarning, match="ppcl does not hear the output here: leaving out layer 15 alone"):
        plan = detect(stats, target=8, budget="cka", selection=selection)
    found = plan.provenance["output"]
    assert 15 in removed_layers(plan) and found["predicted"] > 100 * found["least"]


@pytest.mark.parametrize("target", [7, 8, 10])
def test_budget_that_hears_the_output(target, stats):
    """The seven planted blocks, and beyond them none that the output needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two sample batches: inside the noise
        plan = detect(stats, target=target, selection="optimal")
    assert {1, 3, 5, 7, 9, 11, 13} <= removed_layers(plan) and not removed_layers(plan) & {0, 14, 15}
    found = plan.provenance["output"]
    assert found["predicted"] < (1.0001 if target == 7 else 2) * found["least"]
