"""Criteria that rank layers, each against a ranking made by brute force, and what they say about their certainty."""

import dataclasses
import itertools
import math
import warnings
import weakref

import pytest
import torch

from pydit import analysis
from pydit.analysis import Ablation, ActivationStats, ablate, collect, detect, score, velocity_error
from pydit.analysis.criteria import get_criterion, names
from pydit.analysis.criteria.layerwise import least_loss
from pydit.errors import FormatError, UserError
from pydit.plan import PruningPlan
from pydit.pruning import prune
from tests.analysis import synthetic
from tests.models import tiny

LAYERWISE = ("amber", "bi", "hierarchical", "laptop", "random", "rel_l1", "uniform")


@pytest.fixture(scope="module")
def model():
    """Six blocks of very different strength: the gates of block k are scaled by its entry."""
    model = tiny.transformer(6)
    with torch.no_grad():
        for block, gain in zip(model.transformer_blocks, (1.0, 0.05, 0.6, 0.01, 0.3, 0.15), strict=True):
            for linear in (block.attn.to_out[0], block.attn.to_add_out, block.img_mlp.net[2], block.txt_mlp.net[2]):
                linear.weight.mul_(gain)
                linear.bias.mul_(gain)
    return model


@pytest.fixture(scope="module")
def batches():
    return [tiny.batch(seed=seed) for seed in range(6)]


@pytest.fixture(scope="module")
def stats(model, batches):
    return collect(model, batches, with_ablation=True, progress=False)


def without(model, layer, batch):
    """The output with one block left out, by running the model without it."""
    kept = torch.nn.ModuleList(block for k, block in enumerate(model.transformer_blocks) if k != layer)
    blocks, model.transformer_blocks = model.transformer_blocks, kept
    try:
        with torch.no_grad():
            return model(**batch, return_dict=False)[0].double()
    finally:
        model.transformer_blocks = blocks


def test_ablation_equals_running_without_the_block(model, batches):
    before = tiny.fingerprint(model)
    found = ablate(model, batches[:2])
    assert tiny.same(before, tiny.fingerprint(model))
    assert found.losses.shape == (6, 6) and found.batches.tolist() == [0, 0, 0, 1, 1, 1]
    for number, batch in enumerate(batches[:2]):
        full = without(model, None, batch)
        here = found.batches == number
        assert torch.equal(found.timesteps[here], batch["timestep"].double())
        torch.testing.assert_close(found.norms[here], full.square().sum((1, 2)))
        for layer in range(6):
            loss = (without(model, layer, batch) - full).square().sum((1, 2))
            torch.testing.assert_close(found.losses[here, layer], loss, rtol=1e-4, atol=1e-9)


def test_ablation_costs_a_triangle_of_blocks(model, batches):
    calls = []
    hooks = [block.register_forward_hook(lambda *_: calls.append(1)) for block in model.transformer_blocks]
    ablate(model, batches[:1])
    for hook in hooks:
        hook.remove()
    assert len(calls) == 6 * 7 // 2


def test_ablation_keeps_one_boundary(model, batches):
    seen, counts = [], []

    def count(_block, _inputs, outputs):
        seen.append(weakref.ref(outputs[1]))
        counts.append(sum(state() is not None for state in seen))

    hooks = [block.register_forward_hook(count) for block in model.transformer_blocks]
    ablate(model, batches[:1])
    for hook in hooks:
        hook.remove()
    assert max(counts) <= 3  # the boundary, and of the forward without a block what one block takes and gives


@pytest.mark.parametrize("method", ["amber", "laptop", "hierarchical"])
def test_output_criteria_rank_as_brute_force(method, model, batches, stats):
    chosen = [batches[k] for k in (1, 3, 5)]  # collect's sample batches
    losses = []
    for layer in range(6):
        error = total = 0.0
        for batch in chosen:
            full = without(model, None, batch)
            weight = batch["timestep"].double()[:, None, None] if method == "amber" else 1.0
            error += float((weight * (without(model, layer, batch) - full).square()).sum())
            total += float((weight * full.square()).sum())
        position = torch.exp(torch.tensor((layer - 6) / 6)).item() if method == "hierarchical" else 1.0
        losses.append(error / total / position)
    scores = score(stats, method=method)
    torch.testing.assert_close(scores.matrices["score"], torch.tensor(losses, dtype=torch.float64), rtol=1e-4, atol=0)
    order = sorted(range(1, 6), key=losses.__getitem__)
    for count in (1, 2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = detect(stats, method=method, target=count)
        assert plan.provenance["removed"] == sorted(order[:count])


def test_amber_weighs_high_noise_more():
    """Layer 1 matters at high noise, layer 2 at low noise."""
    stats = synthetic.stats("nnn")
    stats.add_ablation(Ablation(torch.tensor([[9.0, 4.0, 1.0], [9.0, 1.0, 4.0]], dtype=torch.float64).repeat(4, 1),
                                torch.full((8,), 10.0, dtype=torch.float64),
                                torch.tensor([0.9, 0.1], dtype=torch.float64).repeat(4), torch.arange(8) // 2))
    assert detect(stats, method="amber", target=1).provenance["removed"] == [2]
    even = score(stats, method="amber", timestep_power=0.0).matrices["score"]
    assert even[1] == even[2] and even[1] == 0.25


@pytest.mark.parametrize("method, value", [("bi", lambda x, y: 1 - torch.cosine_similarity(x, y, dim=1)),
                                           ("rel_l1", lambda x, y: (y - x).abs().sum(1) / x.abs().sum(1))])
def test_local_criteria_are_their_formulas(method, value, stats):
    for streams in ("image", "text", "mean"):
        scores = score(stats, method=method, streams=streams).matrices
        expected = []
        for layer in range(6):
            parts = []
            for stream in (("image", "text") if streams == "mean" else (streams,)):
                source = "image" if stream == "text" and layer == 5 else stream
                batches = [batch.double() for batch in stats.samples[source]]
                parts.append(torch.cat([value(b[layer], b[layer + 1]) for b in batches]).mean())
            expected.append(sum(parts) / len(parts))
        torch.testing.assert_close(scores["score"], torch.stack(expected))
        assert (scores["score_low"] <= scores["score"]).all() and (scores["score"] <= scores["score_high"]).all()
    order = torch.argsort(score(stats, method=method).matrices["score"][1:]) + 1
    assert order[0] == 3 and order[1] == 1  # the two weakest blocks of the model


def test_clip_takes_massive_channels_out_of_the_cosine():
    stats = synthetic.stats("nw")
    for batch in stats.samples["image"] + stats.samples["text"]:
        batch[:, :, 0] = 1e4
    assert score(stats, method="bi").matrices["score"].max() < 1e-4
    assert score(stats, method="bi", clip=10.0).matrices["score"][0] > 0.01


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_is_the_best_of_all_sets(seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(9, generator=generator).tolist()
    sizes = [(3, 5, 8)[int(k)] for k in torch.randint(3, (9,), generator=generator)]
    for share in (0.2, 0.5, 0.7):
        budget = share * sum(sizes)
        sets = [s for n in range(9) for s in itertools.combinations(range(1, 9), n) if sum(sizes[k] for k in s) >= budget]
        found = least_loss(losses, sizes, range(1, 9), budget)
        if not sets:
            assert found is None
            continue
        best = min(sum(losses[k] for k in s) for s in sets)
        assert sum(sizes[k] for k in found) >= budget and abs(sum(losses[k] for k in found) - best) < 1e-12
        assert [losses[k] for k in found] == sorted(losses[k] for k in found)


def test_knapsack_of_a_deep_model_whose_blocks_all_differ():
    """By dynamic programming over sums of sizes; to try every set would take 2^40 steps."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(40, generator=generator, dtype=torch.float64).tolist()
    sizes = torch.randint(50, 150, (40,), generator=generator).tolist()
    least = [0.0] + [float("inf")] * sum(sizes)
    for k in range(1, 40):
        for total in range(len(least) - 1, sizes[k] - 1, -1):
            least[total] = min(least[total], least[total - sizes[k]] + losses[k])
    budget = 0.4 * sum(sizes)
    found = least_loss(losses, sizes, range(1, 40), budget)
    assert sum(sizes[k] for k in found) >= budget
    assert abs(sum(losses[k] for k in found) - min(least[math.ceil(budget):])) < 1e-12


def test_images_of_no_weight_count_for_nothing(stats, tmp_path):
    """A batch whose noise level is 0 has no weight in amber: a draw of it alone has no error, and JSON no NaN."""
    ablation = stats.ablation
    silent = dataclasses.replace(ablation, timesteps=torch.where(ablation.batches == 0, 0.0, ablation.timesteps))
    rest = ablation.batches > 0
    criterion = get_criterion("amber")
    draws = criterion.draws(with_ablation(silent))
    expected = criterion.draws(with_ablation(Ablation(silent.losses[rest], silent.norms[rest], silent.timesteps[rest],
                                                      silent.batches[rest] - 1)))
    assert torch.equal(draws, expected) and bool(torch.isfinite(draws).all())
    nothing = dataclasses.replace(ablation, norms=torch.zeros_like(ablation.norms))
    for method in ("laptop", "amber", "hierarchical"):
        with pytest.raises(UserError, match=r"stats: expected batches whose outputs .* are not all 0"):
            detect(with_ablation(nothing), method, target=1)


def with_ablation(ablation):
    """Statistics of the model's depth that hold nothing else."""
    found = ActivationStats("qwen-image", ablation.losses.shape[1], 4)
    found.add_ablation(ablation)
    return found


@pytest.mark.parametrize("method", ["bi", "rel_l1"])
def test_text_alone_does_not_judge_a_block_by_a_text_that_nothing_reads(method):
    """SD3's last block has no text output: by its text it would do nothing and always go first."""
    model = tiny.sd3()
    found = collect(model, [tiny.sd3_batch(seed) for seed in range(4)], progress=False)
    text, image = (score(found, method, streams=stream).matrices for stream in ("text", "image"))
    assert torch.equal(text["score"][-1], image["score"][-1]) and float(text["score"][-1]) > 1e-6
    assert torch.equal(text["resamples"][:, -1], image["resamples"][:, -1])
    assert not torch.equal(text["score"][0], image["score"][0])


def test_laptop_counts_parameters(stats):
    """One block as large as three: it alone meets the target."""
    sizes = (1, 1, 3, 1, 1, 1)
    plan = detect(stats, method="laptop", target=3, sizes=sizes)
    removed = plan.provenance["removed"]
    assert sum(sizes[k] for k in removed) >= 3 * sum(sizes) / 6
    with pytest.raises(UserError, match="sizes: expected 6 positive numbers, got 2"):
        detect(stats, method="laptop", target=1, sizes=(1, 2))


def test_laptop_knows_the_sizes_of_the_blocks():
    """FLUX.1: a single block has 0.42 of a dual one's parameters, and the target counts those."""
    stats = ActivationStats("flux.1", 57, 8, starts=(0, 19), config={})
    losses = torch.ones(4, 57, dtype=torch.float64)
    losses[:, 1], losses[:, 20:25] = 0.5, 0.3  # per parameter a dual block at 0.5 is cheaper than a single one at 0.3
    stats.add_ablation(Ablation(losses, torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64),
                                torch.arange(4)))
    scores = score(stats, method="laptop")
    model = tiny.flux()
    config = {name: model.config[name] for name in ("num_attention_heads", "attention_head_dim", "num_layers",
                                                    "num_single_layers")}
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    own = ActivationStats("flux.1", len(blocks), 8, starts=(0, len(model.transformer_blocks)), config=config)
    own.add_ablation(Ablation(losses[:, :len(blocks)], *(torch.ones(4, dtype=torch.float64) for _ in range(2)),
                              torch.arange(4)))
    assert score(own, method="laptop").matrices["sizes"].tolist() == [sum(p.numel() for p in b.parameters())
                                                                      for b in blocks]
    dual, single = scores.matrices["sizes"][[0, 20]].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = analysis.select(scores, target=dual / (19 * dual + 38 * single))
        assert plan.provenance["removed"] == [1]
        assert analysis.select(scores, target=1 / 57, sizes=(1,) * 57).provenance["removed"] == [20]


def test_uniform_and_random(stats):
    assert detect(stats, method="uniform", target=3).provenance["removed"] == [1, 3, 5]
    assert detect(stats, method="uniform", target=1).provenance["removed"] == [3]
    draws = {tuple(detect(stats, method="random", target=2, seed=seed).provenance["removed"]) for seed in range(99)}
    assert len(draws) == 10 and detect(stats, method="random", target=2, seed=3) == detect(stats, method="random",
                                                                                           target=2, seed=3)


@pytest.mark.parametrize("method", LAYERWISE)
def test_protected_layers_stay(method, stats):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = detect(stats, method=method, target=2, protect_first=3, protect_last=1)
        assert plan.provenance["removed"] == [3, 4]
        with pytest.raises(UserError, match="at most the 2 layers that protect_first"):
            detect(stats, method=method, target=3, protect_first=3, protect_last=1)


def test_warns_when_the_decision_is_inside_the_noise():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(40, 4, generator=generator, dtype=torch.float64) + torch.tensor([9.0, 1.0, 1.001, 5.0])
    stats = synthetic.stats("nnnn")
    stats.add_ablation(Ablation(losses, torch.full((40,), 50.0, dtype=torch.float64),
                                torch.ones(40, dtype=torch.float64), torch.arange(40) // 4))
    with pytest.warns(UserWarning, match="inside the noise"):
        margin = detect(stats, method="amber", target=1).provenance["margin"]
    assert margin["within_noise"] and margin["low"] <= 0 < margin["high"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        margin = detect(stats, method="amber", target=2).provenance["margin"]
    assert margin["low"] > 0 and (margin["removed"] in (1, 2)) and margin["kept"] == 3


def test_intervals_are_paired_over_batches():
    """What moves all layers of a batch together does not blur their order."""
    shared = torch.linspace(1, 100, 12, dtype=torch.float64)[:, None]
    stats = synthetic.stats("nnn")
    stats.add_ablation(Ablation(shared * torch.tensor([3.0, 1.0, 1.01]), torch.full((12,), 500.0, dtype=torch.float64),
                                torch.ones(12, dtype=torch.float64), torch.arange(12)))
    matrices = score(stats, method="amber").matrices
    assert matrices["score_high"][1] > matrices["score_low"][2]  # the intervals overlap
    assert detect(stats, method="amber", target=1).provenance["margin"]["low"] > 0


def test_ablation_is_saved_and_merged(stats, tmp_path):
    stats.save(tmp_path / "stats.safetensors")
    loaded = ActivationStats.load(tmp_path / "stats.safetensors")
    assert torch.equal(loaded.ablation.losses, stats.ablation.losses)
    loaded.merge(stats)
    assert loaded.ablation.losses.shape == (18, 6) and loaded.ablation.batches.tolist() == sorted(list(range(6)) * 3)
    torch.testing.assert_close(score(loaded, method="amber").matrices["score"],
                               score(stats, method="amber").matrices["score"])


def test_scores_survive_a_file(stats, tmp_path):
    for method in LAYERWISE:
        found = score(stats, method=method)
        found.save(tmp_path / "scores.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = analysis.select(analysis.Scores.load(tmp_path / "scores.safetensors"), target=2)
            assert again.intervals == detect(stats, method=method, target=2).intervals


@pytest.mark.parametrize(("method", "options", "words"), [
    ("amber", {}, "stats: expected an ablation for method 'amber'"),
    ("bi", {"streams": "audio"}, "streams: expected one of mean, image, text, got 'audio'"),
    ("bi", {"clip": 0}, "clip: expected a number above 0"),
    ("amber", {"timestep_power": -1}, "timestep_power: expected a number of 0 or more"),
    ("uniform", {"protect_first": 0}, "protect_first: expected a whole number of at least 1, got 0"),
    ("uniform", {"target": None}, "target: expected a number or share of layers for method 'uniform'")])
def test_bad_options(method, options, words):
    with pytest.raises(UserError, match=words):
        detect(synthetic.stats("nnn"), method=method, **{"target": 1, **options})


@pytest.mark.parametrize("change, words", [
    (lambda s: {"num_layers": 10**9}, "num_layers: expected 1 to 4096, got 1000000000"),
    (lambda s: {"num_layers": 5}, r"expected \[5.*\], got \[4"),
    (lambda s: {"options": [1]}, "options: expected an object, got list"),
    (lambda s: {"starts": (7,)}, r"starts: expected layers from 0 on, below 4, got \[7\]"),
    (lambda s: {"matrices": {}}, "expected .*, got none"),
    (lambda s: {"matrices": {name: t.flatten()[:1] for name, t in s.matrices.items()}}, r"expected \[.*\], got \[1\]"),
    (lambda s: {"matrices": {name: t.long() for name, t in s.matrices.items()}}, "expected finite float64, got torch.int64"),
    (lambda s: {"matrices": {name: t * torch.nan for name, t in s.matrices.items()}}, "expected finite float64"),
])
@pytest.mark.parametrize("method", ["ppcl", "bi"])
def test_a_file_of_scores_that_does_not_fit(method, change, words, tmp_path):
    found = score(synthetic.stats("nana", samples=2, rows=8), method)
    dataclasses.replace(found, **change(found)).save(tmp_path / "scores.safetensors")
    with pytest.raises(FormatError, match=f"^scores: expected complete pydit-scores in .*{words}"):
        analysis.Scores.load(tmp_path / "scores.safetensors")


def test_every_criterion_is_registered():
    assert set(names()) >= {*LAYERWISE, "ppcl"}
    for name in LAYERWISE:
        assert get_criterion(name).method == name


def test_joint_removal(model, batches):
    """Measured is what the pruned model does; predicted the sum of single losses."""
    plan = PruningPlan.from_intervals(6, [(0, 1), (2, 4)])
    found = analysis.joint_removal(model, plan, batches[:2])
    assert abs(found["measured"] - velocity_error(model, prune(model, plan), batches[:2])) < 1e-6
    given = [{**batch, "return_dict": True} for batch in batches[:2]]  # as of a pipeline's own calls
    assert velocity_error(model, prune(model, plan), given) == velocity_error(model, prune(model, plan), batches[:2])
    singles = ablate(model, batches[:2])
    assert abs(found["predicted"] - float(singles.losses[:, [1, 3, 4]].sum() / singles.norms.sum())) < 1e-12
    assert abs(found["ratio"] - found["measured"] / found["predicted"]) < 1e-12
    with pytest.raises(UserError, match="plan: expected a plan for the model's 6 layers, got one for 5"):
        analysis.joint_removal(model, PruningPlan.from_intervals(5, [(0, 1)]), batches[:1])
    for other, shown in (([], "list"), (analysis.ablate(tiny.transformer(2), batches[:1]), "with 2")):
        with pytest.raises(UserError, match=f"ablation: expected one of a model with 6 layers, got {shown}"):
            analysis.joint_removal(model, plan, batches[:1], ablation=other)


def test_recoverability_trains_every_student(model, batches):
    plans = {"strong": PruningPlan.from_intervals(6, [(1, 2)]), "weak": PruningPlan.from_intervals(6, [(2, 3)])}
    before = tiny.fingerprint(model)

    def make_batches(start):
        return (batches[k % 4] for k in itertools.count(start))

    rows = analysis.recoverability(model, plans, make_batches, steps=8, judge=batches[4:])
    assert tiny.same(before, tiny.fingerprint(model))
    by_name = {row["plan"]: row for row in rows}
    assert [row["rank_after"] for row in rows] == [1, 2]
    assert by_name["weak"]["rank_before"] == 1 and by_name["strong"]["after"] < by_name["strong"]["before"]
    with pytest.raises(UserError, match="plans: expected at least one"):
        analysis.recoverability(model, {}, make_batches, judge=batches)
