"""All criteria side by side: the table, its order, agreement, and the page."""

import pytest
import torch

from pydit.analysis import agreement, candidates, collect, detect, removed_layers
from pydit.analysis.criteria import PPCL, names
from pydit.reporting import analysis_page
from tests.analysis import synthetic
from tests.models import tiny


@pytest.fixture(scope="module")
def stats():
    return collect(tiny.transformer(6), [tiny.batch(seed=seed) for seed in range(6)], with_ablation=True,
                   progress=False)


def test_every_criterion_proposes(stats):
    found = candidates(stats, target=2)
    assert {c.name for c in found} == {*names(), "ppcl optimal", "ppcl cka"}
    for candidate in found:
        if candidate.plan is None:
            assert candidate.name in ("ppcl", "ppcl cka") and "target" in candidate.note
            continue
        removed = removed_layers(candidate.plan)
        assert len(removed) == 2 and 0 not in removed
        kept = tiny.transformer(6)
        kept.transformer_blocks = kept.transformer_blocks[:4]
        assert candidate.parameters == sum(p.numel() for p in kept.parameters()) and abs(candidate.flops - 4 / 6) < 1e-9
        assert candidate.latency_ms == 1e3 * candidate.plan.num_flops(stats.config) / 989e12
        sums = stats.ablation.losses[:, sorted(removed)].sum() / stats.ablation.norms.sum()
        assert abs(candidate.loss - float(sums)) < 1e-12 and candidate.low <= candidate.loss <= candidate.high
    losses = [c.loss for c in found if c.plan is not None]
    assert losses == sorted(losses)
    assert found[0].loss == min(losses) and {"laptop", "amber"} & {c.name for c in found if c.loss == found[0].loss}


def test_agreement_is_the_share_that_removes_a_layer(stats):
    found = [c for c in candidates(stats, target=2) if c.plan is not None]
    shares = agreement(found, 6)
    assert shares[0] == 0 and abs(sum(shares) - 2) < 1e-9
    assert agreement([], 3) == [0.0, 0.0, 0.0]


def test_without_an_ablation_the_reason_is_told():
    found = {c.name: c for c in candidates(synthetic.stats("nnnaaann"), target=2)}
    assert found["amber"].plan is None and "expected an ablation" in found["amber"].note
    assert found["bi"].plan is not None and found["bi"].loss is None


def test_page_shows_every_candidate(stats, tmp_path):
    pytest.importorskip("matplotlib")
    found = analysis_page.write(stats, tmp_path / "report.html", target=2)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page
    assert all(f">{c.name}<" in page for c in found) and "of bootstrap draws of the batches give the same" in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_curves_are_first_differences():
    stats = synthetic.stats("nnnaaann")
    ppcl = PPCL(min_cka=0.99)
    scores = ppcl.score(stats)
    curve, = ppcl.curves(scores)
    assert (curve["start"], curve["end"]) == (2, 5) == detect(stats, min_cka=0.99).intervals[0]
    assert curve["layers"] == [3, 4, 5, 6]
    cka = ppcl.combined(scores)[2]
    expected = [1 - cka[3], cka[3] - cka[4], cka[4] - cka[5], cka[5] - cka[6]]
    torch.testing.assert_close(torch.tensor(curve["loss"]), torch.stack(expected).float(), atol=1e-6, rtol=0)
    assert all(low - 1e-9 <= loss <= high + 1e-9 for low, loss, high in zip(curve["low"], curve["loss"], curve["high"],
                                                                            strict=True))
