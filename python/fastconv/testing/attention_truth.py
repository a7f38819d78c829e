"""What attention's kernels must give, and how far from it they may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastconv import reference
from fastconv.testing import tolerance
from fastconv.testing.attention import KEY, Arrays, SdpaCase, options_of

Array = NDArray[np.float64]
Allowed = Callable[[str, np.dtype[Any]], Array]


@dataclass
class _Errors:
    """What rounding does to scores and weights, to first order in eps.

    A score is off by tolerance.bound of its products, its mask and its cap; a weight by that, relative to itself, and by the
    error of lse, which is the average of that over its row and a rounding of its own. Weights below the smallest normal
    number are 0.
    """

    case: SdpaCase
    inputs: Arrays
    a: reference.Attention

    @cached_property
    def sizes(self) -> Array:
        """Of what is summed to a score."""
        mask = self.inputs.get("mask")
        products: Array = np.abs(self.inputs["q"]) @ self.shared(np.abs(self.inputs["k"])).swapaxes(2, 3)
        sizes = abs(self.case.factor) * products + self.case.softcap
        if self.case.biased:
            places = reference.distances(self.case.Lq, self.case.Lkv)
            sizes = sizes + np.abs(self.inputs["bias"])[:, :, 0][:, :, places]
        return sizes if mask is None or self.case.boolean else sizes + np.abs(np.where(np.isinf(mask), 0, mask))

    def shared(self, x: Array) -> Array:
        return np.repeat(x, self.case.Hq // self.case.Hkv, 1)

    def gathered(self, x: Array) -> Array:
        """The sum over the heads that share one of keys and values."""
        total: Array = x.reshape(x.shape[0], self.case.Hkv, self.case.Hq // self.case.Hkv, *x.shape[2:]).sum(axis=2)
        return total

    @cached_property
    def factors(self) -> Array | float:
        case = self.case
        return reference.dropout_factors(self.a.weights.shape, case.dropout, KEY) if case.dropout else 1.0

    def lse(self, dtype: np.dtype[Any]) -> Array:
        average = (self.a.weights * tolerance.bound(self.sizes, dtype)).sum(axis=3, keepdims=True)
        finite = np.where(np.isinf(self.a.lse), 0.0, self.a.lse)[..., None]
        total: Array = average + 4 * tolerance.eps(dtype) * (np.abs(finite) + 1)
        if self.case.sink:
            total = total + 4 * tolerance.eps(dtype) * np.abs(self.inputs["sink"])
        return total

    def weights(self, dtype: np.dtype[Any]) -> Array:
        """Relative, with 8 eps for exp, the sum and the division, and the rounding of the sum that the weight goes into."""
        eps = tolerance.eps(dtype)
        return tolerance.bound(self.sizes + 1, dtype) + self.lse(dtype) + 8 * eps


Rounding = Callable[[str, str], Array | float]


def _rounded(sizes: Array, half: str, summed: Array) -> Array:
    """The error of sizes @ summed where tensor cores get the left one as halves: half a unit in the last place of each."""
    eps, least = tolerance.HALVES[half]
    error: Array = np.where(sizes > 0, eps / 2 * sizes + least / 2, 0.0) @ np.abs(summed)
    return error


def sdpa_truth(op: str, case: SdpaCase, inputs: Arrays) -> tuple[Arrays, Allowed, Rounding]:
    """The expected outputs, the error allowed to each, and what rounding weights to halves on their way adds."""
    q, k, v, mask = inputs["q"], inputs["k"], inputs["v"], inputs.get("mask")
    errors = _Errors(case, inputs, reference.sdpa(q, k, v, mask, **options_of(case, inputs)))
    if op == "sdpa_bwd":
        return _gradient_truth(case, inputs, errors)
    a = errors.a

    def allowed(name: str, dtype: np.dtype[Any]) -> Array:
        if name == "lse":
            return errors.lse(dtype)
        least = float(np.finfo(dtype).tiny)
        result: Array = (a.weights * errors.factors * errors.weights(dtype) + least) @ errors.shared(np.abs(v)) + least
        return result

    def rounding(name: str, half: str) -> Array | float:
        # Beside a row's largest weight, which is 1, those that a half cannot hold are lost.
        return 0.0 if name == "lse" else _rounded(a.weights * errors.factors, half, errors.shared(v))

    return {"out": a.out, "lse": a.lse[..., None]}, allowed, rounding


def _gradient_truth(case: SdpaCase, inputs: Arrays, errors: _Errors) -> tuple[Arrays, Allowed, Rounding]:
    """ds = p (dp - delta): the error of p, and those of dp and delta, which are sums of products with dout."""
    q, k, v, dout = inputs["q"], inputs["k"], inputs["v"], inputs["dout"]
    dlse = inputs["dlse"][..., 0]
    gradients = reference.sdpa_bwd(dout, q, k, v, inputs.get("mask"), dlse, **options_of(case, inputs))
    a, factors = errors.a, errors.factors
    dp = (dout @ errors.shared(v).swapaxes(2, 3)) * factors
    dp_sizes = (np.abs(dout) @ errors.shared(np.abs(v)).swapaxes(2, 3)) * factors
    delta = (dout * a.out).sum(axis=3) - dlse
    # Halves round the outputs, and the gradient's sums are made of what was stored.
    drift = np.abs((dout * (inputs["out"] - a.out)).sum(axis=3))[..., None]
    delta_sizes = (np.abs(dout) * np.abs(a.out)).sum(axis=3) + np.abs(dlse)

    def allowed(name: str, dtype: np.dtype[Any]) -> Array:
        least = float(np.finfo(dtype).tiny)
        relative = errors.weights(dtype)
        slope = np.abs(dp - delta[..., None])
        size = a.weights * slope
        ds: Array = (
            size * relative
            + least * slope
            + a.weights * (tolerance.bound(dp_sizes + delta_sizes[..., None], dtype) + drift)
            + least
        )
        if name == "dmask":
            return ds
        if name == "dbias":
            # A sum along a diagonal of what is itself rounded.
            added: Array = reference.along_distances(ds + tolerance.bound(size, dtype))[:, :, None]
            return added
        if name == "dv":
            dropped = a.weights * factors * relative + least
            return errors.gathered(dropped.swapaxes(2, 3) @ np.abs(dout)) + least
        ds = abs(case.factor) * (ds + tolerance.bound(size, dtype))
        if case.softcap:
            ds = ds + abs(case.factor) * tolerance.bound(size, dtype)
        by_key: Array = (
            errors.gathered(ds.swapaxes(2, 3) @ np.abs(q)) if name == "dk" else ds @ errors.shared(np.abs(k))
        )
        return by_key + least

    def rounding(name: str, half: str) -> Array | float:
        if name == "dv":
            return errors.gathered(_rounded((a.weights * factors).swapaxes(2, 3), half, dout))
        ds = a.weights * np.abs(dp - delta[..., None])
        if name == "dk":
            return abs(case.factor) * errors.gathered(_rounded(ds.swapaxes(2, 3), half, q))
        return abs(case.factor) * _rounded(ds, half, errors.shared(k)) if name == "dq" else 0.0

    named = dict(zip(("dq", "dk", "dv", "dmask"), gradients, strict=True))
    return named | {"dbias": reference.along_distances(named["dmask"])[:, :, None]}, allowed, rounding
