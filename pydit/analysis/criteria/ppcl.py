"""PPCL redundancy detection (arXiv 2511.16156, stage 1): chains of linear probes, judged by CKA.

Every block gets a linear probe, the affine map closest to it. From a start layer u, real activations are sent through
a chain of probes instead of blocks; cka(u, k) compares the chain's end with the teacher's activations. While the loss
per step, cka(u, k-1) - cka(u, k), keeps shrinking, the layers form one unit; where it grows, a new unit starts. A unit
[u, v] is then an interval that one block can stand for.

Where the published descriptions disagree or are silent, an option says which reading is taken; every score is kept,
so that all of them can be replayed without a model.

What the rule cannot know: how much the output changes with what CKA calls lost at a boundary. CKA relates it to the
variance there, the blocks after it and the head do not. On the committed demo teacher (16 blocks; 16 sample batches
of 32 images) units [5, 6] and [14, 15] lose the same, 0.006; with the probe in place of block 6 the output changes by
0.0004 (squared, relative), in place of block 15 by 0.065, and without block 15 by 0.35. Up to 7 blocks of that teacher
the units by 1 - CKA are those that a greedy search finds (0.0012); the eighth takes the last block (0.42, where 0.0044
is possible). Hence the option ``budget``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from pydit.analysis.activations import ActivationStats
from pydit.analysis.criteria.base import DEAF, Scores, register, removal_target
from pydit.arguments import integer, make_plain, plain, shown
from pydit.errors import UserError
from pydit.models.adapter import STREAMS
from pydit.ops.reference import centred, u_centred_gram
from pydit.plan import PruningPlan
from pydit.stats import LinearProbe, checks
from pydit.stats.cka import bootstrap_weights, normalise

_CHOICES = {"reference": ("same-depth", "fixed"), "first_probe": ("u+1", "u"),
            "streams": ("mean", "min", "image", "text"), "selection": ("difference", "optimal"),
            "rule": ("bootstrap", "literal"), "budget": ("auto", "cka", "output"),
            "estimator": ("debiased", "biased")}
_SCORE_OPTIONS = ("reference", "first_probe", "estimator", "ridge")
_RULE_DRAWS = 500
_STABLE_DRAWS = 50
_UNIT_DRAWS, _RULE_DRAWS_AGAIN = 20, 100  # where the rule itself, a bootstrap, runs again in every draw
_FLOOR = 0.97  # finds 120 of 120 planted units of held-out synthetic teachers; without a floor 87, and false ones


def _redrawn(hsic: torch.Tensor, draws: int) -> torch.Tensor:
    """CKA [R, L, L] from HSIC [B, 3, L, L] averaged over draws of the batches with replacement."""
    means = torch.einsum("rb,bsuk->rsuk", bootstrap_weights(len(hsic), draws, 0), hsic)
    return normalise(means[:, 0], means[:, 1], means[:, 2])


def _centred_gram(features: torch.Tensor) -> torch.Tensor:
    """H X X^T H of features [..., n, C], whose inner products are the biased HSIC."""
    features = centred(features)
    return features @ features.mT


def _is_cka(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 1


@register("ppcl")
@dataclass(frozen=True)
class PPCL:
    """Options of the criterion.

    Parameters
    ----------
    reference : what the end of the chain is compared with: ``"same-depth"``, the teacher's output of layer k (the
        paper's figure), or ``"fixed"``, its output of layer u (the paper's Eq. 3 as transcribed).
    first_probe : ``"u+1"``: the chain starts from the real output of layer u and the first probe is that of layer
        u + 1, so cka(u, u) = 1 and units hold two layers or more; ``"u"``: it starts from the input of layer u, and a
        layer whose first step loses less than its second stays alone.
    estimator : of CKA, which no description names. ``"debiased"``, or ``"biased"``, that of the usual definition, which
        is high for any two sets of features with more channels than tokens.
    streams : how image and text scores combine into one: ``"mean"``, ``"min"``, or one stream.
    selection : ``"difference"``: units as above. ``"optimal"``: the disjoint intervals that remove exactly
        ``target`` layers at the least cost, found by dynamic programming over all intervals.
    budget : what an interval costs, where a target makes intervals compete; the published rule is unknown.
        ``"cka"``: 1 - cka(u, v). ``"output"``: that times the largest relative error of the output without one of the
        layers u + 1 to v, which asks for statistics with an ablation; the difference rule's units are refused if
        they cost the output more than ten times what as many layers can. ``"auto"``: output, where there is an
        ablation.
    rule : when a step's loss counts as grown. ``"bootstrap"``: when the lower ``level`` bound of its rise over the
        step before, under draws of sample batches (paired: the same for all steps), is above ``tolerance`` and above
        ``sudden`` times the loss of the step before. The differences are of the order of 1e-4 and mostly noise; and
        the error of a chain grows with its length, which is no break. ``"literal"``: when the estimate of the rise is
        above ``tolerance``, which is the paper's rule. On 20 synthetic teachers with planted redundancy it misses 32
        of 60 intervals, and the default none (``pytest tests/analysis/test_planted.py -rP``).
    level : confidence of that bound, one-sided.
    sudden : see ``rule``; 1 asks for more than a doubling.
    min_cka : refuse intervals whose cka(u, v) is below; None refuses none. Where the difference rule finds such a
        unit, layer u is kept and the search goes on from u + 1. ``"auto"``: 0.97 for the bootstrap rule without a
        target, when the statistics alone decide what is redundant: a chain that loses ever less, but had lost much
        before, is no redundancy. With a target the best units come first anyway, and the literal rule is the paper's.
    max_length : longest interval in layers (both selections).
    first_layer : layers before this one are kept.
    protect_last : layers at the end that are kept.
    tolerance : a rise of no more than this does not count.
    ridge : of the probes, relative to the mean variance of their input.

    Scores
    ------
    ``image``, ``text`` and ``<stream>_low``, ``<stream>_high`` (95 % paired bootstrap over sample batches; equal to
    the estimate when there is one batch): cka(u, k) at [u, k], float64 [L, L], 0 below the diagonal. Text at k = L - 1
    is NaN-free but meaningless where the model drops that output; such entries count the image only. ``<stream>_hsic``:
    float64 [batches, 3, L, L], HSIC of (chain, reference), (chain, chain), (reference, reference) per sample batch,
    from which all of the above follows and on which every rule can be replayed. ``output``, with an ablation: float64
    [1 + R, L], relative squared error of the output without each layer, over all batches and under the same draws.
    """

    reference: str = "same-depth"
    first_probe: str = "u+1"
    estimator: str = "debiased"
    streams: str = "mean"
    selection: str = "difference"
    budget: str = "auto"
    rule: str = "bootstrap"
    level: float = 0.95
    sudden: float = 1.0
    min_cka: float | str | None = "auto"
    max_length: int | None = None
    first_layer: int = 0
    protect_last: int = 0
    tolerance: float = 1e-6
    ridge: float = 1e-6
    matrices: ClassVar = {name: sizes for stream in STREAMS for name, sizes in (
        (stream, (True, "L", "L")), (f"{stream}_low", (True, "L", "L")), (f"{stream}_high", (True, "L", "L")),
        (f"{stream}_hsic", (True, -1, 3, "L", "L")))} | {"last_text_used": (True,),
                                                         "output": (False, -1 - _RULE_DRAWS, "L")}

    def __post_init__(self) -> None:
        make_plain(self)
        for name, allowed in _CHOICES.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in allowed:
                raise UserError(f"{name}: expected one of {', '.join(allowed)}, got {shown(getattr(self, name))}")
        for name in ("tolerance", "ridge", "sudden"):
            checks.number(name, getattr(self, name), "a number >= 0", lambda x: x >= 0)
        for name in ("first_layer", "protect_last"):
            integer(name, getattr(self, name), 0, expected="a number >= 0")
        if self.min_cka is not None and self.min_cka != "auto" and not _is_cka(self.min_cka):
            raise UserError(f"min_cka: expected a number up to 1, \"auto\" or None, got {shown(self.min_cka)}")
        checks.number("level", self.level, "a number from 0.5 up to 1", lambda x: 0.5 <= x < 1)
        if self.max_length is not None:
            integer("max_length", self.max_length, 2, expected="at least 2 layers")

    def score(self, stats: ActivationStats) -> Scores:
        """cka(u, k) of both streams with intervals; see the class."""
        matrices: dict[str, torch.Tensor] = {}
        for stream in STREAMS:
            batches = self._batches(stats, stream)
            probes = stats.probes(stream, ridge=self.ridge)
            hsic = torch.stack([self._chain_hsic(probes, batch) for batch in batches])
            matrices[stream], matrices[f"{stream}_hsic"] = normalise(*hsic.mean(0)), hsic
            spread = _redrawn(hsic, 1000)
            matrices[f"{stream}_low"] = torch.quantile(spread, 0.025, dim=0)
            matrices[f"{stream}_high"] = torch.quantile(spread, 0.975, dim=0)
        if stats.ablation is not None:
            matrices["output"] = stats.ablation.relative(_RULE_DRAWS)
        matrices["last_text_used"] = torch.tensor(float(stats.last_text_used), dtype=torch.float64)
        return Scores("ppcl", stats.family, stats.num_layers, {name: getattr(self, name) for name in _SCORE_OPTIONS},
                      matrices, stats.starts)

    @staticmethod
    def _batches(stats: ActivationStats, stream: str) -> list[torch.Tensor]:
        batches = stats.sample_batches(stream)
        if not batches:
            raise UserError(f"stats: expected a sample batch with at least 4 {stream} tokens, got none; "
                            "collect more images per batch")
        if min(moments.count for moments in stats.moments[stream]) < 2:
            raise UserError(f"stats: expected {stream} tokens in the probe batches, got fewer than 2")
        return batches

    def _chain_hsic(self, probes: list[LinearProbe], batch: torch.Tensor) -> torch.Tensor:
        """One batch [L + 1, n, C] -> [3, L, L]: HSIC of (chain, reference), (chain, chain), (reference, reference)."""
        layers, own_start = len(probes), self.first_probe == "u"
        batch = batch.double()
        gram = u_centred_gram if self.estimator == "debiased" else _centred_gram
        outputs = gram(batch[1:])  # of the real output of every layer
        hsic = torch.zeros(3, layers, layers, dtype=torch.float64)
        chains = batch.new_zeros(0, *batch.shape[1:])
        for k in range(layers):
            if own_start:
                chains = probes[k](torch.cat([chains, batch[k, None]]))
            else:
                chains = torch.cat([probes[k](chains), batch[k + 1, None]])
            grams = gram(chains)
            reference = outputs[k] if self.reference == "same-depth" else outputs[:k + 1]
            hsic[0, :k + 1, k] = (grams * reference).sum((-2, -1))
            hsic[1, :k + 1, k] = grams.square().sum((-2, -1))
            hsic[2, :k + 1, k] = reference.square().sum((-2, -1))
        n = batch.shape[1]
        return hsic / (n * (n - 3) if self.estimator == "debiased" else (n - 1) ** 2)

    def combined(self, scores: Scores) -> torch.Tensor:
        """cka(u, k) over both streams, float64 [L, L], by the option ``streams``."""
        return self._combine(scores, scores.matrices["image"], scores.matrices["text"])

    def drawn(self, scores: Scores, draws: int = _RULE_DRAWS) -> torch.Tensor:
        """The same under draws of sample batches, float64 [R, L, L]; R = 1, the estimate, by the literal rule."""
        if self.rule == "literal" or "image_hsic" not in scores.matrices:
            return self.combined(scores)[None]
        return self._combine(scores, *(_redrawn(scores.matrices[f"{stream}_hsic"], draws) for stream in STREAMS))

    def _combine(self, scores: Scores, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        if not bool(scores.matrices["last_text_used"]):
            text = torch.cat((text[..., :-1], image[..., -1:]), -1)
        if self.streams == "mean":
            return (image + text) / 2
        if self.streams == "min":
            return torch.minimum(image, text)
        return image if self.streams == "image" else text

    def select(self, scores: Scores, target: float | int | None = None) -> PruningPlan:
        """Choose intervals.

        With ``selection="difference"`` and a target, units are taken in order of their cost per removed layer,
        smallest first; the one that would overshoot is cut at its end. A UserWarning says when draws of the sample
        batches would choose other layers (``provenance["stability"]``: the share of draws that choose the same;
        without a target the rule runs anew in every draw).

        Raises
        ------
        UserError
            The target cannot be reached (the message says how many layers can be removed) or only by units that the
            output refuses, selection ``"optimal"`` without a target, or budget ``"output"`` without an ablation.
        """
        if self.min_cka == "auto":
            floor = _FLOOR if target is None and self.rule == "bootstrap" else None
            return replace(self, min_cka=floor).select(scores, target)
        if self.budget == "output" and "output" not in scores.matrices:
            raise UserError('stats: expected an ablation for budget="output", got none; collect with '
                            "with_ablation=True (pydit analyze --ablate)")
        removed = removal_target(target, scores.num_layers)
        cka = self.combined(scores)
        cost = self._cost(scores, cka, 0)
        if self.selection == "optimal":
            if removed is None:
                raise UserError('target: expected a number or share of layers for selection="optimal", got none')
            intervals = self._optimal(cost, cka, removed, scores.starts)
        else:
            intervals = units = self._units(cka, self.drawn(scores), scores.starts)
            if removed is not None:
                intervals = self._cut(cost, units, removed)
                self._require_heard(scores, cost, cka, intervals, removed)
        found = [{"interval": [u, v], "cka": float(cka[u, v]),
                  **{stream: float(scores.matrices[stream][u, v]) for stream in STREAMS}}
                 for u, v in sorted(intervals)]
        provenance = {"method": "ppcl", "options": asdict(self), "target": plain(target), "scores": found}
        if len(scores.matrices.get("image_hsic", ())) > 1:
            if removed is None:
                again = [self._units(self.combined(one), self.drawn(one, _RULE_DRAWS_AGAIN), scores.starts)
                         for one in self._resampled(scores)]
            else:
                drawn = self._combine(scores, *(_redrawn(scores.matrices[f"{stream}_hsic"], _RULE_DRAWS)[:_STABLE_DRAWS]
                                                for stream in STREAMS))
                again = [self._optimal(self._cost(scores, one, 1 + r), cka, removed, scores.starts)
                         if self.selection == "optimal" else self._cut(self._cost(scores, one, 1 + r), units, removed)
                         for r, one in enumerate(drawn)]
            provenance["stability"] = stability = sum(set(other) == set(intervals) for other in again) / len(again)
            if stability < 0.95:
                warnings.warn(f"ppcl: the choice is inside the noise: {100 * stability:.0f} % of bootstrap draws of "
                              "the sample batches choose the same intervals; more calibration batches would tell",
                              stacklevel=3)
        return PruningPlan.from_intervals(scores.num_layers, intervals, family=scores.family, provenance=provenance)

    @staticmethod
    def _resampled(scores: Scores) -> Iterator[Scores]:
        """The scores that draws of the sample batches with replacement would have given."""
        counts = {stream: bootstrap_weights(len(scores.matrices[f"{stream}_hsic"]), _UNIT_DRAWS, 0)
                  for stream in STREAMS}
        for r in range(_UNIT_DRAWS):
            matrices = dict(scores.matrices)
            for stream, weights in counts.items():
                hsic = scores.matrices[f"{stream}_hsic"]
                hsic = hsic.repeat_interleave((weights[r] * len(hsic)).round().long(), 0)
                matrices[stream], matrices[f"{stream}_hsic"] = normalise(*hsic.mean(0)), hsic
            yield replace(scores, matrices=matrices)

    def _cost(self, scores: Scores, cka: torch.Tensor, draw: int) -> torch.Tensor:
        """What intervals cost, [L, L]; ``draw`` is the row of the scores' ``output``."""
        if self.budget == "cka" or "output" not in scores.matrices:
            return 1 - cka
        errors = scores.matrices["output"][draw].expand(len(cka), -1).triu(1)  # of the layers after u
        return (1 - cka) * errors.cummax(1).values

    def _require_heard(self, scores: Scores, cost: torch.Tensor, cka: torch.Tensor, intervals: list[tuple[int, int]],
                       removed: int) -> None:
        """Refuse units that cost the output far more than as many layers must."""
        if self.budget == "cka" or "output" not in scores.matrices:
            return
        errors = scores.matrices["output"][0]

        def predicted(pairs: list[tuple[int, int]]) -> float:
            return sum(float(errors[u + 1:v + 1].sum()) for u, v in pairs)

        possible = predicted(replace(self, min_cka=None)._optimal(cost, cka, removed, scores.starts))
        if predicted(intervals) > DEAF * possible:
            worst = max(intervals, key=lambda pair: predicted([pair]))
            raise UserError(f"target: expected fewer than {removed} layers from the units of the difference rule: "
                            f"without the removed ones of {list(worst)} the output changes by {predicted([worst]):.3g} "
                            f'(squared, relative); selection="optimal" finds {removed} layers for {possible:.3g} in '
                            'all, and budget="cka" does not look at the output')

    def _units(self, cka: torch.Tensor, drawn: torch.Tensor, starts: tuple[int, ...]) -> list[tuple[int, int]]:
        """The difference rule, from the first layer on; ``drawn`` [R, L, L] says how sure a rise is."""
        layers, units, u = len(cka), [], self.first_layer
        while u < layers:
            # losses[:, i]: the CKA lost by probe number i of the chain; before the first probe CKA is 1.
            first = u if self.first_probe == "u" else u + 1
            chain = torch.cat((drawn.new_ones(len(drawn), 1), drawn[:, u, first:]), 1)
            losses = chain[:, :-1] - chain[:, 1:]
            rises = losses.diff(dim=1)
            if self.rule == "bootstrap":
                rises = torch.minimum(rises, rises - self.sudden * losses[:, :-1])
            rises = torch.quantile(rises, 1 - self.level, dim=0).tolist() if rises.numel() else []
            end = u
            for k in range(first, layers):
                if (k > u and k in starts) or k >= layers - self.protect_last:
                    break
                if (k > first and rises[k - first - 1] > self.tolerance) or \
                        (self.max_length and k - u + 1 > self.max_length):
                    break
                end = k
            if end > u and self._good_enough(float(cka[u, end])):
                units.append((u, end))
                u = end + 1
            else:
                u += 1  # alone, or refused: the layers after u may still form a good unit
        return units

    def curves(self, scores: Scores) -> list[dict[str, Any]]:
        """The CKA lost per step of the chain of every unit, one step beyond its end.

        Returns
        -------
        list of dict
            ``start``, ``end`` of the unit; ``layers`` (of the steps), ``loss``, and its 95 % bounds ``low``, ``high``.
        """
        cka, drawn = self.combined(scores), self.drawn(scores)
        found = []
        for u, v in self._units(cka, drawn, scores.starts):
            layers = list(range(u if self.first_probe == "u" else u + 1, min(v + 2, len(cka))))
            losses = [torch.cat((x.new_ones(len(x), 1), x[:, u, layers]), 1).diff(dim=1).neg()
                      for x in (cka[None], drawn)]
            low, high = torch.quantile(losses[1], torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).tolist()
            found.append({"start": u, "end": v, "layers": layers, "loss": losses[0][0].tolist(), "low": low,
                          "high": high})
        return found

    def _cut(self, cost: torch.Tensor, units: list[tuple[int, int]], removed: int) -> list[tuple[int, int]]:
        """Best units first until exactly ``removed`` layers are gone; the last one is cut at its end."""
        possible = sum(v - u for u, v in units)
        if possible < removed:
            raise UserError(f"target: expected at most the {possible} layers that the difference rule finds removable, "
                            f'got {removed}; selection="optimal" reaches any number')
        chosen = []
        for u, v in sorted(units, key=lambda unit: float(cost[unit]) / (unit[1] - unit[0])):
            v = min(v, u + removed)
            if v > u:
                chosen.append((u, v))
                removed -= v - u
        return chosen

    def _optimal(self, cost: torch.Tensor, cka: torch.Tensor, removed: int,
                 starts: tuple[int, ...]) -> list[tuple[int, int]]:
        """Least sum of ``cost`` over disjoint intervals that remove exactly ``removed`` layers."""
        layers, infinity = len(cka), float("inf")
        costs, values = cost.tolist(), cka.tolist()
        # best[i][r]: least cost of layers 0..i-1 with r of them removed; last[i][r]: start of an interval ending there.
        best = [[0.0] + [infinity] * removed] + [[infinity] * (removed + 1) for _ in range(layers)]
        last: list[list[int | None]] = [[None] * (removed + 1) for _ in range(layers + 1)]
        for i in range(1, layers + 1):
            best[i] = best[i - 1].copy()
            for u in range(self.first_layer, i - 1 if i <= layers - self.protect_last else 0):
                gone = i - 1 - u
                if (self.max_length and gone + 1 > self.max_length) or not self._good_enough(values[u][i - 1]) or \
                        any(u < start < i for start in starts):
                    continue
                for r in range(gone, removed + 1):
                    if best[u][r - gone] + costs[u][i - 1] < best[i][r]:
                        best[i][r], last[i][r] = best[u][r - gone] + costs[u][i - 1], u
        if best[layers][removed] == infinity:
            most = max(r for r in range(removed + 1) if best[layers][r] < infinity)
            raise UserError(f"target: expected at most the {most} layers that min_cka, max_length, first_layer and "
                            f"protect_last leave removable, got {removed}")
        intervals, i, r = [], layers, removed
        while i > 0:
            u = last[i][r]
            if u is None:
                i -= 1
            else:
                intervals.append((u, i - 1))
                i, r = u, r - (i - 1 - u)
        return intervals

    def _good_enough(self, value: float) -> bool:
        return self.min_cka in (None, "auto") or value >= self.min_cka
