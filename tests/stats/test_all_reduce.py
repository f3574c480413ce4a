"""Ranks together hold what one process with all rows would."""

import pytest
import torch
import torch.distributed as dist

from pydit.stats import CKA, Moments
from tests import processes
from tests.stats.test_cka import features, reference_matrix
from tests.stats.test_moments import assert_same, reference, rows

BATCHES = {1: [(0, 1, 2, 3)], 2: [(0, 1, 2), (3,)], 3: [(3,), (), (2, 0, 1)]}  # of each rank


def _rank(rank, ranks, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    x, y = rows(offset=100)
    for first in (120, 0):  # rows of rank 0; with 0 it has seen none
        cuts = {1: (0, 200), 2: (0, first, 200), 3: (0, first, 150, 200)}[ranks]
        part = slice(cuts[rank], cuts[rank + 1])
        moments = Moments(6, 4).update(x[part], y[part])
        moments.rounded = moments.count  # as if a kernel had taken them
        moments.all_reduce()
        assert moments.count == moments.rounded == 200
        assert_same(moments, reference(x, y), rtol=1e-10)
    assert Moments(6, 4).all_reduce().count == 0

    cka = CKA(2)
    for seed in BATCHES[ranks][rank]:
        cka.update(features(10, (4, 4), seed=seed))
    expected = reference_matrix([features(10, (4, 4), seed=seed) for seed in range(4)])
    assert torch.allclose(cka.all_reduce().matrix(), expected)
    assert cka.batches == 4
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", BATCHES)
def test_all_reduce(tmp_path, ranks):
    processes.together(_rank, ranks, ranks, str(tmp_path / "store"))
