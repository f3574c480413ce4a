"""Ranks together hold what one process with all rows would."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pydit.stats import CKA, Moments
from tests.stats.test_cka import features, reference_matrix
from tests.stats.test_moments import assert_same, reference, rows


def _rank(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    x, y = rows(offset=100)
    for cut in (120, 0):  # with 0, rank 0 has seen no rows
        part = slice(0, cut) if rank == 0 else slice(cut, None)
        moments = Moments(6, 4).update(x[part], y[part]).all_reduce()
        assert moments.count == 200
        assert_same(moments, reference(x, y), rtol=1e-10)
    assert Moments(6, 4).all_reduce().count == 0

    cka = CKA(2)
    for seed in ((0, 1, 2), (3,))[rank]:
        cka.update(features(10, (4, 4), seed=seed))
    expected = reference_matrix([features(10, (4, 4), seed=seed) for seed in range(4)])
    assert torch.allclose(cka.all_reduce().matrix(), expected)
    assert cka.batches == 4
    dist.destroy_process_group()


def test_all_reduce(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path / "store"),), nprocs=2)
