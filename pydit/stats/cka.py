"""Debiased linear CKA, averaged over batches, with bootstrap intervals.

With K = X X^T of one batch (n >= 4 rows) and U(K) its U-centred form (Szekely and Rizzo 2014), the unbiased HSIC of
Song et al. (2012) is HSIC_1(K, L) = <U(K), U(L)> / (n (n - 3)). Self-HSIC is then a sum of squares, so it is never
negative and CKA is never NaN, and |CKA| <= 1. HSIC values are averaged over batches, never CKA values
(Nguyen, Raghu and Kornblith 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pydit.arguments import integer
from pydit.errors import UserError
from pydit.ops import hsic_matrix
from pydit.ops.reference import centred, u_centred_gram
from pydit.stats import checks

_MAX_GRAM_ROWS = 2048  # beyond this many rows an [n, n] Gram matrix costs more memory than the feature form


def clip_outliers(features: torch.Tensor, limit: float) -> torch.Tensor:
    """Limit features [..., n, d] to ``limit`` times the median magnitude of each [n, d], in their dtype; where that is
    0, which says nothing of the rest, they stay as they are.

    A few massive activations decide CKA, cosines and norms: 8 of 4096 tokens that share one channel at 100 standard
    deviations make unrelated features look alike (CKA 0.9).
    """
    limit = checks.number("limit", limit, "a number above 0", lambda x: x > 0)
    if checks.tensor("features", features).ndim < 2 or not features.is_floating_point():
        raise UserError(f"features: expected floats [..., n, d], got {features.dtype} {list(features.shape)}")
    bound = limit * features.abs().flatten(-2).median(-1).values[..., None, None]
    bound = torch.where(bound == 0, torch.inf, bound)
    return torch.minimum(torch.maximum(features, -bound), bound)


def normalise(cross: torch.Tensor, self_x: torch.Tensor, self_y: torch.Tensor) -> torch.Tensor:
    """cross / sqrt(self_x self_y), elementwise; 0 where a feature set is constant (CKA is undefined there)."""
    scale = self_x.clamp_min(0).sqrt() * self_y.clamp_min(0).sqrt()
    return torch.where(scale > 0, cross / torch.where(scale > 0, scale, 1.0), 0.0)


def bootstrap_weights(batches: int, resamples: int, seed: int) -> torch.Tensor:
    """Weights [resamples, batches], float64, rows summing to 1: batches drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(batches, (resamples, batches), generator=generator)
    weights = torch.zeros(resamples, batches, dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.full_like(weights, 1 / batches))
    return weights


def bootstrap_ratios(numerators: torch.Tensor, denominators: torch.Tensor, resamples: int) -> torch.Tensor:
    """Ratios of sums over batches [B, L] (or [B, 1]): over all, then over draws with replacement -> [1 + R, L].

    Batches that add nothing to either sum are not drawn: a draw of them alone would be 0 / 0.

    Raises
    ------
    UserError
        A batch with a denominator of 0 under something else, or no batch with more.
    """
    some = (denominators != 0).any(1)
    if not bool(some.any()) or bool((numerators[~some] != 0).any()):
        raise UserError("stats: expected batches whose outputs (or weights) are not all 0, got some that are")
    numerators, denominators = numerators[some], denominators[some]
    weights = torch.cat((torch.full((1, len(numerators)), 1 / len(numerators), dtype=torch.float64),
                         bootstrap_weights(len(numerators), resamples, 0)))
    return weights @ numerators / (weights @ denominators)


def describe_rows(rows: Sequence[int]) -> str:
    """Batches and their rows in one line; batches shorter than the longest are named, the first few of them."""
    longest = max(rows, default=0)
    short = [f"batch {index} has {n}" for index, n in enumerate(rows) if n < longest]
    more = f" and {len(short) - 4} more are shorter" if len(short) > 4 else ""
    return f"{len(rows)} batches of {longest} rows" + (f"; {', '.join(short[:4])}{more}" if short else "")


class CKA:
    """Debiased linear CKA between every pair of L layers, over batches of paired rows.

    Keeps one L x L matrix of HSIC_1 values per batch, float64, and no activations. Every batch counts equally,
    whatever its number of rows, so batches should be of one size; ``rows`` tells.

    Attributes
    ----------
    rows : list of int, rows of every batch
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = integer("num_layers", num_layers)
        self._hsic: list[torch.Tensor] = []
        self.rows: list[int] = []

    def update(self, features: Sequence[torch.Tensor]) -> CKA:
        """Add one batch: ``features[l]`` is [n, d_l], any float dtype, the same n >= 4 rows in every layer.

        Raises
        ------
        UserError
            Another number of layers, rows that differ or are fewer than 4, or values that are not finite.
        """
        if not isinstance(features, Sequence):
            raise UserError(f"features: expected a list of {self.num_layers} tensors, got {type(features).__name__}")
        if len(features) != self.num_layers:
            raise UserError(f"features: expected {self.num_layers} layers, got {len(features)}")
        for x in features:
            checks.tensor("features", x)
        shapes = [tuple(x.shape) for x in features]
        if any(x.ndim != 2 or not x.is_floating_point() or len(x) != len(features[0]) for x in features):
            raise UserError(f"features: expected float [n, d] tensors with one n, got {shapes}")
        if len(features[0]) < 4:
            raise UserError(f"features: expected at least 4 rows for the unbiased HSIC, got {len(features[0])}")
        one_dtype = len({x.dtype for x in features}) == 1
        hsic = hsic_matrix([x.detach() if one_dtype else x.detach().double() for x in features]).cpu()
        if not bool(torch.isfinite(hsic).all()):
            raise UserError("features: expected finite values, got NaN or infinity")
        self._hsic.append(hsic)
        self.rows.append(len(features[0]))
        return self

    @property
    def batches(self) -> int:
        """Batches seen."""
        return len(self._hsic)

    def describe(self) -> str:
        """:func:`describe_rows` of what was seen."""
        return describe_rows(self.rows)

    def merge(self, other: CKA) -> CKA:
        """Add the batches that ``other`` has seen. Returns self."""
        if not isinstance(other, CKA):
            raise UserError(f"other: expected a CKA, got {type(other).__name__}")
        if other.num_layers != self.num_layers:
            raise UserError(f"other: expected {self.num_layers} layers, got {other.num_layers}")
        self._hsic.extend(other._hsic)
        self.rows.extend(other.rows)
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> CKA:
        """Give every rank the batches of all ranks. Call once. Returns self."""
        gathered: list[tuple[list[torch.Tensor], list[int]]] = [([], []) for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered, (self._hsic, self.rows), group=group)
        self._hsic = [hsic for part, _ in gathered for hsic in part]
        self.rows = [n for _, part in gathered for n in part]
        return self

    def matrix(self) -> torch.Tensor:
        """CKA of every pair of layers, float64 [L, L]; 0 where a layer is constant."""
        return _cka_of(self._stacked(1).mean(0))

    def interval(self, level: float = 0.95, *, resamples: int = 1000,
                 seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Percentile bootstrap over batches -> (low, high), float64 [L, L] each.

        The resampled batches are the same for all pairs (paired), so differences between entries may be judged
        against the width. Needs at least 2 batches; fewer than about 20 make it narrow.
        """
        level = checks.number("level", level, "a number between 0 and 1", lambda x: 0 < x < 1)
        resamples, seed = integer("resamples", resamples), integer("seed", seed, 0, 2**63 - 1)
        hsic = self._stacked(2)
        means = bootstrap_weights(len(hsic), resamples, seed) @ hsic.flatten(1)
        values = _cka_of(means.unflatten(1, (self.num_layers, self.num_layers)))
        low, high = torch.quantile(values.flatten(1).T, torch.tensor([(1 - level) / 2, (1 + level) / 2],
                                                                     dtype=torch.float64), dim=1)
        return low.view(self.num_layers, -1), high.view(self.num_layers, -1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{"hsic": float64 [batches, L, L], "rows": int64 [batches]}."""
        shape = (0, self.num_layers, self.num_layers)
        return {"hsic": torch.stack(self._hsic) if self._hsic else torch.zeros(shape, dtype=torch.float64),
                "rows": torch.tensor(self.rows, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state saved by :meth:`state_dict`. Raises UserError when it does not fit."""
        state = checks.state(state)
        hsic = state.get("hsic")
        if hsic is None or hsic.ndim != 3 or tuple(hsic.shape[1:]) != (self.num_layers, self.num_layers):
            raise UserError(f"state: expected hsic [batches, {self.num_layers}, {self.num_layers}], "
                            f"got {None if hsic is None else list(hsic.shape)}")
        rows = state.get("rows")
        if rows is None or tuple(rows.shape) != (len(hsic),):
            raise UserError(f"state: expected rows [{len(hsic)}], got {None if rows is None else list(rows.shape)}")
        self._hsic = [batch.clone() for batch in hsic.double().cpu()]
        self.rows = rows.tolist()

    def _stacked(self, least: int) -> torch.Tensor:
        if len(self._hsic) < least:
            raise UserError(f"CKA: expected at least {least} {'batch' if least == 1 else 'batches'}, "
                            f"got {len(self._hsic)}")
        return torch.stack(self._hsic)


def linear_cka(x: torch.Tensor, y: torch.Tensor, *, debiased: bool = True) -> float:
    """Linear CKA of features x [n, p] and y [n, q] of the same n rows, computed in float64.

    Parameters
    ----------
    debiased : bool
        True: from unbiased HSIC (n >= 4; may be slightly negative for unrelated features). False: the plain
        formula, which tends to 1 for unrelated features when n is small against p (n >= 2).

    Raises
    ------
    UserError
        Shapes that do not pair up, too few rows, or values that are not finite.
    """
    checks.flag("debiased", debiased)
    for name, tensor in (("x", x), ("y", y)):
        checks.tensor(name, tensor)
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise UserError(f"{name}: expected a float [n, d] tensor, got {tensor.dtype} {list(tensor.shape)}")
    least = 4 if debiased else 2
    if len(x) != len(y) or len(x) < least:
        raise UserError(f"x, y: expected the same number of rows, at least {least}, got {len(x)} and {len(y)}")
    if debiased and len(x) <= _MAX_GRAM_ROWS:
        u, v = u_centred_gram(x), u_centred_gram(y)
        terms = (u * v).sum(), (u * u).sum(), (v * v).sum()
    else:
        hsic = debiased_hsic_features if debiased else _biased_hsic_features
        x, y = centred(x), centred(y)
        terms = hsic(x, y), hsic(x, x), hsic(y, y)
    if not bool(torch.isfinite(torch.stack(terms)).all()):
        raise UserError("x, y: expected finite values, got NaN or infinity")
    return float(normalise(*terms))


def debiased_hsic_features(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """n (n - 3) HSIC_1 of column-centred features [n, p], [n, q] without any n x n matrix."""
    n = len(x)
    a, b = x.square().sum(1), y.square().sum(1)
    first = (y.T @ x).square().sum()
    hsic = first - n / (n - 2) * (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))
    return torch.where(hsic.abs() <= 1e-12 * first, 0.0, hsic)  # rounding alone, as in u_centred_gram


def _biased_hsic_features(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y.T @ x).square().sum()


def _cka_of(hsic: torch.Tensor) -> torch.Tensor:
    """CKA [..., L, L] from averaged HSIC [..., L, L]."""
    diagonal = hsic.diagonal(dim1=-2, dim2=-1)
    return normalise(hsic, diagonal.unsqueeze(-1), diagonal.unsqueeze(-2))
