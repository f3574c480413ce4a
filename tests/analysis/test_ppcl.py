"""Detection on layers whose redundancy is known, and the rules on hand-written score matrices."""

import dataclasses
import itertools
import random
import warnings

import numpy as np
import pytest
import torch

from pydit import files
from pydit.analysis import Ablation, Scores, candidates, collect, detect, score
from pydit.analysis import select as select_with_defaults
from pydit.analysis.criteria import PPCL, get_criterion, names, register
from pydit.errors import FormatError, UserError
from pydit.plan import PruningPlan
from pydit.stats import CKA
from tests.analysis import synthetic
from tests.models import tiny


def test_affine_layers_form_one_interval():
    """Layer 2's real output starts the chain; layers 3 to 5 are exactly affine, 6 is not."""
    plan = detect(synthetic.stats("nnnaaann"), min_cka=0.99)
    assert plan.intervals == ((2, 5),)
    assert plan.provenance["scores"][0]["cka"] > 1 - 1e-6
    assert plan.provenance["images"] == 24


def test_own_probe_reading_starts_at_the_first_affine_layer():
    """With first_probe="u" the start layer is replaced by its probe too, so it has to be affine itself."""
    plan = detect(synthetic.stats("nnnaaann"), first_probe="u", min_cka=0.99)
    assert plan.intervals == ((3, 5),)


@pytest.mark.parametrize("first_probe, interval", [("u+1", (2, 5)), ("u", (3, 5))])
def test_optimal_finds_the_affine_layers(first_probe, interval):
    removed = interval[1] - interval[0]
    plan = detect(synthetic.stats("nnnaaann"), selection="optimal", target=removed, first_probe=first_probe)
    assert plan.intervals == (interval,)


def test_fixed_reference_compares_with_the_start():
    """Identity layers keep the activations of layer u, affine ones do not: only "fixed" tells them apart."""
    stats = synthetic.stats("niiiwww")
    fixed, same = score(stats, reference="fixed"), score(stats, reference="same-depth")
    assert float(fixed.matrices["image"][0, 3]) > 1 - 1e-9
    assert float(fixed.matrices["image"][0, 6]) < float(same.matrices["image"][0, 6]) - 1e-4


@pytest.mark.parametrize("reference, first_probe", list(itertools.product(("same-depth", "fixed"), ("u+1", "u"))))
def test_scores_equal_cka_of_chains_by_hand(reference, first_probe):
    stats = synthetic.stats("nwwnw", samples=4, rows=32)
    matrices = score(stats, reference=reference, first_probe=first_probe).matrices
    for stream in ("image", "text"):
        probes = [stats.probe(k, stream) for k in range(5)]
        for u, k in itertools.combinations_with_replacement(range(5), 2):
            cka = CKA(2)
            for batch in stats.samples[stream]:
                chain = batch[u] if first_probe == "u" else batch[u + 1]
                for probe in probes[u if first_probe == "u" else u + 1:k + 1]:
                    chain = probe(chain)
                cka.update([chain, batch[k + 1] if reference == "same-depth" else batch[u + 1]])
            assert abs(float(matrices[stream][u, k] - cka.matrix()[0, 1])) < 1e-9, (stream, u, k)
        assert torch.equal(matrices[stream], matrices[stream].triu())
        low, high = matrices[f"{stream}_low"], matrices[f"{stream}_high"]
        assert (low <= matrices[stream] + 1e-9).all() and (matrices[stream] <= high + 1e-9).all()


def test_biased_scores_equal_the_usual_cka():
    """HSIC_0 averaged over batches, written out; with few tokens it calls unlike features alike, debiased does not."""
    stats = synthetic.stats("nwn", samples=3, rows=9)
    found = score(stats, estimator="biased")
    probes = [stats.probe(k, "image") for k in range(3)]
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in stats.samples["image"]:
        chain, real = probes[2](probes[1](batch[1])), batch[3]
        x, y = chain - chain.mean(0), real - real.mean(0)
        sums += torch.stack([(a.T @ b).square().sum() for a, b in ((x, y), (x, x), (y, y))]) / 64
    assert float(found.matrices["image"][0, 2]) == pytest.approx(float(sums[0] / (sums[1] * sums[2]).sqrt()), rel=1e-9)
    assert found.options["estimator"] == "biased"
    with pytest.raises(UserError, match="estimator: expected 'biased' as in the scores, got 'debiased'"):
        select_with_defaults(found, estimator="debiased")
    assert float(score(stats).matrices["image"][0, 2]) < float(found.matrices["image"][0, 2]) - 0.1


def scores_of(cka, *, text=None, last_text_used=True, **options):
    """Scores with a given image matrix; text is the same unless given."""
    cka = torch.as_tensor(cka, dtype=torch.float64)
    criterion = PPCL(**options)
    matrices = {"image": cka, "text": cka if text is None else torch.as_tensor(text, dtype=torch.float64),
                "last_text_used": torch.tensor(float(last_text_used), dtype=torch.float64)}
    return Scores("ppcl", "qwen-image", len(cka), {name: getattr(criterion, name)
                                                   for name in ("reference", "first_probe", "estimator", "ridge")},
                  matrices)


def select(scores, target=None, **options):
    """The rules themselves, without the default floor."""
    return select_with_defaults(scores, target=target, **{"min_cka": None, **options})


def matrix(layers, rows):
    """A score matrix from the losses per step of each start layer; 0.5 per step where nothing is said."""
    cka = torch.zeros(layers, layers, dtype=torch.float64)
    for u in range(layers):
        value, losses = 1.0, rows.get(u, [])
        cka[u, u] = 1.0
        for step, k in enumerate(range(u + 1, layers)):
            value -= losses[step] if step < len(losses) else 0.5
            cka[u, k] = value
    return cka


def test_difference_rule_breaks_at_the_first_increase():
    """The trace of the paper's figure: 1-3 shrink, 4 grows -> [1, 3]; then 5 holds, 6 breaks -> [4, 5]."""
    cka = matrix(8, {0: [0.5, 0.6], 1: [0.10, 0.05, 0.20], 4: [0.03, 0.04], 6: [0.1]})
    literal = dict(first_layer=1, rule="literal")
    plan = select(scores_of(cka), **literal)
    assert plan.intervals == ((1, 3), (4, 5), (6, 7))
    assert select(scores_of(cka), **literal, min_cka=0.9).intervals == ((4, 5), (6, 7))
    assert select(scores_of(cka), **literal, max_length=2).intervals == ((1, 2), (3, 4), (5, 6))


def test_default_rule_asks_for_a_sudden_increase():
    """Without sample batches to draw from the estimates count as certain: 0.03 -> 0.04 goes on, 0.05 -> 0.20 breaks."""
    cka = matrix(8, {0: [0.5, 0.6], 1: [0.10, 0.05, 0.20], 4: [0.03, 0.04, 0.2], 6: [0.1]})
    assert select(scores_of(cka), first_layer=1).intervals == ((1, 3), (4, 6))
    assert select(scores_of(cka), first_layer=1, sudden=0.0).intervals == ((1, 3), (4, 5), (6, 7))
    assert select(scores_of(cka), first_layer=1, sudden=9.0).intervals == ((1, 7),)


def test_default_floor():
    """Deciding by itself, the default rule leaves a unit that has lost much alone; told how much to remove, it ranks."""
    cka = matrix(8, {0: [0.02, 0.015, 0.01, 0.3], 4: [0.01, 0.005, 0.004]})
    scores = scores_of(cka)
    assert select_with_defaults(scores).intervals == ((4, 7),)
    assert select_with_defaults(scores, min_cka=None).intervals == ((0, 3), (4, 7))
    assert select_with_defaults(scores, rule="literal").intervals == ((0, 3), (4, 7))
    assert select_with_defaults(scores, target=6).intervals == ((0, 3), (4, 7))
    for wrong in ("none", True, 1.5):
        with pytest.raises(UserError, match="min_cka: expected a number up to 1"):
            PPCL(min_cka=wrong)


def test_default_rule_needs_more_than_noise():
    """One batch of eight has a break at the third step: the estimate rises, its lower bound does not."""
    def hsic(losses):
        chain = torch.zeros(3, 4, 4, dtype=torch.float64)
        chain[0] = matrix(4, {0: losses})
        chain[1:] = 1.0
        return chain

    batches = torch.stack([hsic([0.001, 0.001, 0.2])] + [hsic([0.001, 0.001, 0.001])] * 7)
    scores = scores_of(batches[:, 0].mean(0))
    for stream in ("image", "text"):
        scores.matrices[f"{stream}_hsic"] = batches
    assert select(scores, rule="literal").intervals == ((0, 2),)
    assert select(scores).intervals == ((0, 3),)
    for stream in ("image", "text"):
        scores.matrices[f"{stream}_hsic"] = torch.stack([hsic([0.001, 0.001, 0.02 + 0.001 * i]) for i in range(8)])
    assert select(scores).intervals == ((0, 2),)


def test_tolerance_ignores_small_increases():
    cka = matrix(4, {0: [0.1, 0.1005, 0.1]})
    assert select(scores_of(cka), rule="literal").intervals == ((0, 1), (2, 3))
    assert select(scores_of(cka), rule="literal", tolerance=1e-3).intervals == ((0, 3),)


def test_own_probe_reading_leaves_singletons():
    cka = matrix(4, {0: [0.3], 1: [0.02], 3: []})
    cka[0, 0], cka[0, 1] = 0.9, 0.6  # 0.1 then 0.3: layer 0 stays alone
    cka[1, 1], cka[1, 2], cka[1, 3] = 0.95, 0.93, 0.5
    cka[3, 3] = 0.2
    assert select(scores_of(cka, first_probe="u")).intervals == ((1, 2),)


def test_refused_unit_does_not_hide_the_next():
    cka = matrix(5, {0: [0.4, 0.3, 0.2, 0.1], 1: [0.01, 0.01, 0.01]})
    assert select(scores_of(cka)).intervals == ((0, 4),)
    assert select(scores_of(cka), min_cka=0.9).intervals == ((1, 4),)


def test_target_cuts_the_units(tmp_path):
    cka = matrix(8, {0: [0.1, 0.05, 0.5], 3: [0.01, 0.01, 0.001, 0.5]})
    scores = scores_of(cka)
    assert select(scores).intervals == ((0, 2), (3, 6))
    assert select(scores, target=4).intervals == ((0, 1), (3, 6))
    assert select(scores, target=3).intervals == ((3, 6),)
    assert select(scores, target=1).intervals == ((3, 4),)
    with pytest.raises(UserError, match="at most the 5 layers that the difference rule finds removable, got 6"):
        select(scores, target=6)
    assert select(scores, target=0.5).removed == 4
    files.write_json(tmp_path / "plan.json", select(scores, target=np.float64(0.5)).to_dict())
    assert select(scores, target=0.51).removed == 5


def brute_force(cka, removed, max_length=None, min_cka=None):
    """Every set of disjoint intervals, the slow way."""
    layers = len(cka)

    def extend(start):
        yield []
        for u in range(start, layers):
            for v in range(u + 1, layers):
                if (max_length is None or v - u < max_length) and (min_cka is None or cka[u, v] >= min_cka):
                    yield from ([(u, v), *rest] for rest in extend(v + 1))
    return min((sum(1 - float(cka[pair]) for pair in pairs) for pairs in extend(0)
                if sum(v - u for u, v in pairs) == removed), default=None)


@pytest.mark.parametrize("seed", range(8))
def test_optimal_equals_brute_force(seed):
    random.seed(seed)
    torch.manual_seed(seed)
    cka, removed = torch.rand(8, 8, dtype=torch.float64).triu(), random.randint(1, 7)
    limits = random.choice([{}, {"max_length": 3}, {"min_cka": 0.3}])
    best = brute_force(cka, removed, **limits)
    if best is None:
        with pytest.raises(UserError, match="target: expected at most the"):
            select(scores_of(cka), selection="optimal", target=removed, **limits)
        return
    plan = select(scores_of(cka), selection="optimal", target=removed, **limits)
    assert plan.removed == removed
    assert abs(sum(1 - float(cka[pair]) for pair in plan.intervals) - best) < 1e-12


def heard(scores, errors, noise=0.0):
    """Scores with the error of the output without each layer, and two draws of it."""
    errors = torch.tensor(errors, dtype=torch.float64)
    scores.matrices["output"] = torch.stack((errors, errors * (1 + noise), errors * (1 - noise)))
    return scores


def test_units_that_lose_the_same_cka_differ_in_the_output():
    """[1, 2] and [4, 5] lose 0.01 each, [4, 5] a little less; without layer 5 the output changes 1000 times as much."""
    cka = matrix(6, {1: [0.0101, 0.3], 4: [0.01]})
    scores = heard(scores_of(cka), [1.0, 0.002, 0.0003, 0.002, 0.002, 0.3])
    for rule in ({"min_cka": 0.9}, {"selection": "optimal"}):
        assert select(scores, target=1, budget="cka", **rule).intervals == ((4, 5),)
        assert select(scores, target=1, **rule).intervals == ((1, 2),)
        assert select(scores_of(cka), target=1, **rule).intervals == ((4, 5),)
    with pytest.raises(UserError, match=r"fewer than 2 layers from the units .* of \[4, 5\] .* by 0.3 .* for 0.0023"):
        select(scores, target=2, min_cka=0.9)
    assert select(scores, target=2, min_cka=0.9, budget="cka").intervals == ((1, 2), (4, 5))
    with pytest.raises(UserError, match='stats: expected an ablation for budget="output", got none'):
        select(scores_of(cka), target=1, budget="output")


@pytest.mark.parametrize("seed", range(4))
def test_output_budget_equals_brute_force(seed):
    torch.manual_seed(seed)
    cka, errors = torch.rand(7, 7, dtype=torch.float64).triu(), torch.rand(7, dtype=torch.float64).tolist()
    cost = torch.tensor([[(1 - float(cka[u, v])) * max(errors[u + 1:v + 1], default=0) for v in range(7)]
                         for u in range(7)])
    plan = select(heard(scores_of(cka), errors), selection="optimal", target=4)
    assert abs(sum(float(cost[pair]) for pair in plan.intervals) - brute_force(1 - cost, 4)) < 1e-6


def test_last_layers_can_be_protected():
    cka = matrix(6, {0: [0.02, 0.5], 2: [0.01, 0.008, 0.006]})
    assert select(scores_of(cka), protect_last=2).intervals == ((0, 1), (2, 3))
    assert select(scores_of(cka), target=3, selection="optimal", protect_last=1).intervals == ((0, 1), (2, 4))
    with pytest.raises(UserError, match="at most the 3 layers that .* protect_last leave removable, got 4"):
        select(scores_of(cka), target=4, selection="optimal", protect_last=2)


def test_warns_when_the_choice_is_inside_the_noise():
    """Two units whose losses differ less than batches do, then two that every batch tells apart."""
    def scores(first, second):
        losses = [matrix(4, {0: [a, 0.5, 0.5], 2: [b]}) for a, b in zip(first, second, strict=True)]
        hsic = torch.stack([torch.stack((cka, torch.ones(4, 4), torch.ones(4, 4))) for cka in losses])
        found = scores_of(hsic[:, 0].mean(0))
        return dataclasses.replace(found, matrices={**found.matrices, "image_hsic": hsic, "text_hsic": hsic})

    near = scores([0.01, 0.02, 0.01, 0.02], [0.02, 0.01, 0.02, 0.011])
    for selection in ("difference", "optimal"):
        with pytest.warns(UserWarning, match="ppcl: the choice is inside the noise"):
            assert 0.2 < select(near, target=1, selection=selection).provenance["stability"] < 0.95
    far = scores([0.01, 0.012, 0.01, 0.012], [0.2, 0.1, 0.2, 0.1])
    assert select(far, target=1).provenance["stability"] == 1.0


def test_warns_when_the_units_are_inside_the_noise():
    """Without a target: batches that put a unit now above the floor, now below, or agree; by either rule."""
    def scores(losses):
        hsic = torch.stack([torch.stack((matrix(4, {2: [a]}), torch.ones(4, 4), torch.ones(4, 4))) for a in losses])
        found = scores_of(hsic[:, 0].mean(0))
        return dataclasses.replace(found, matrices={**found.matrices, "image_hsic": hsic, "text_hsic": hsic})

    for rule in ("bootstrap", "literal"):
        with pytest.warns(UserWarning, match="ppcl: the choice is inside the noise"):
            plan = select(scores([0.01, 0.048] * 4), min_cka=0.97, rule=rule)
        assert plan.intervals == ((2, 3),) and 0.2 < plan.provenance["stability"] < 0.95
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert select(scores([0.01, 0.02] * 4), min_cka=0.97, rule=rule).provenance["stability"] == 1.0


def test_a_criterion_that_does_not_hear_the_output_is_named():
    """Layers 3 and 6 are affine and CKA takes them; the output needs 6 and 3, and does without 1 and 2."""
    stats = synthetic.stats("nnnanna")
    losses = torch.tensor([[9.0, 0.01, 0.011, 3.0, 0.5, 0.5, 4.0]], dtype=torch.float64).repeat(6, 1)
    stats.add_ablation(Ablation(losses, torch.full((6,), 10.0, dtype=torch.float64),
                                torch.ones(6, dtype=torch.float64), torch.arange(6)))
    with pytest.warns(UserWarning, match="ppcl does not hear the output here: leaving out layer 6 alone changes it by "
                                         "0.4 .* all 2 layers by 0.7 .* by 0.0021"):
        plan = detect(stats, target=2, budget="cka", selection="optimal")
    assert plan.provenance["output"] == pytest.approx({"predicted": 0.7, "least": 0.0021})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detect(stats, "uniform", target=2)
    deaf = next(c for c in candidates(stats, target=2) if c.name == "rel_l1")
    assert ("rel_l1 does not hear the output" in deaf.note) == (deaf.loss > 0.021)


@pytest.mark.parametrize("target, message", [
    (None, 'expected a number or share of layers for selection="optimal", got none'),
    (0, "expected 1 to 7 removed layers, got 0"),
    (8, "expected 1 to 7 removed layers, got 8"),
    (1.5, "expected a share between 0 and 1"),
    (True, "expected a number of layers or a share"),
    ("40%", "expected a number of layers or a share"),
])
def test_bad_targets(target, message):
    with pytest.raises(UserError, match=f"target: {message}"):
        select(scores_of(torch.ones(8, 8)), selection="optimal", target=target)


def test_streams_combine():
    image, text = torch.full((3, 3), 0.8), torch.full((3, 3), 0.6)
    scores = scores_of(image, text=text)
    for streams, value in (("mean", 0.7), ("min", 0.6), ("image", 0.8), ("text", 0.6)):
        assert abs(float(PPCL(streams=streams).combined(scores)[0, 1]) - value) < 1e-7
    unused = scores_of(image, text=text, last_text_used=False)
    combined = PPCL(streams="min").combined(unused)
    assert abs(float(combined[0, 2]) - 0.8) < 1e-7 and abs(float(combined[0, 1]) - 0.6) < 1e-7


@pytest.mark.parametrize("options, message", [
    ({"reference": "other"}, "reference: expected one of same-depth, fixed, got 'other'"),
    ({"first_probe": "v"}, "first_probe: expected one of"),
    ({"streams": "max"}, "streams: expected one of"),
    ({"selection": "best"}, "selection: expected one of difference, optimal"),
    ({"tolerance": -1}, "tolerance: expected a number >= 0"),
    ({"max_length": 1}, "max_length: expected at least 2 layers"),
    ({"speed": 1}, "speed: no option of method 'ppcl'; expected one of reference"),
])
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        detect(synthetic.stats("na", samples=1), **options)


def test_unknown_method_and_stale_options():
    with pytest.raises(UserError, match="method: expected one of amber, bi, .*, got 'clairvoyance'"):
        detect(synthetic.stats("na", samples=1), method="clairvoyance")
    with pytest.raises(UserError, match="reference: expected 'same-depth' as in the scores, got 'fixed'; score again"):
        select(scores_of(torch.ones(3, 3)), reference="fixed")


def test_registry_takes_a_new_criterion():
    from pydit.analysis.criteria import base

    @register("keep-all")
    class KeepAll:
        __dataclass_fields__ = {}  # noqa: RUF012

        def score(self, stats):
            return Scores("keep-all", stats.family, stats.num_layers, {}, {})

        def select(self, scores, target):
            return PruningPlan(scores.family, scores.num_layers)

    try:
        assert "keep-all" in names() and isinstance(get_criterion("keep-all"), KeepAll)
        assert detect(synthetic.stats("na", samples=1), "keep-all").intervals == ()
    finally:
        del base._CRITERIA["keep-all"]


def test_scores_file_round_trip(tmp_path):
    scores = score(synthetic.stats("nwa", samples=2), first_probe="u")
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert (loaded.method, loaded.num_layers, loaded.options) == ("ppcl", 3, scores.options)
    assert loaded.matrices.keys() == scores.matrices.keys()
    assert all(torch.equal(value, scores.matrices[name]) for name, value in loaded.matrices.items())
    assert select(loaded, target=1, selection="optimal") == select(scores, target=1, selection="optimal")
    with pytest.raises(FormatError, match="does not exist"):
        Scores.load(tmp_path / "none.safetensors")


def test_too_few_tokens():
    with pytest.raises(UserError, match="expected a sample batch with at least 4 image tokens, got none"):
        score(synthetic.stats("na", rows=3))


def test_from_a_model_to_a_saved_plan(tmp_path):
    model = tiny.transformer(8)
    with torch.no_grad():  # layers 3 to 5 do nothing
        for block in model.transformer_blocks[3:6]:
            for modulation in (block.img_mod, block.txt_mod):
                modulation[1].weight.zero_(), modulation[1].bias.zero_()
    stats = collect(model, [tiny.batch(images=8, seed=seed) for seed in range(8)], progress=False)
    plan = detect(stats, selection="optimal", target=3)
    assert plan.intervals == ((2, 5),)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert plan.matches(model)
    for target in (0.4, 0.45, 7):
        assert detect(stats, selection="optimal", target=target).removed in (4, 7)
