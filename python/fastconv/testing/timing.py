"""Interleaved timing of contestants that do the same work.

On a shared machine the speed of the machine drifts by more than the difference one wants to see. So contestants are
never timed one after the other: every round times each of them once, in a random order, and a slow second hits all of
them alike. Google Benchmark reports 40 % less run-to-run variance from random interleaving; nine rounds are the least a
rank test can use.

The module needs nothing but the standard library.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat

NOISY_IQR_SHARE = 0.10
"""An interquartile range above this share of the median is noise (torch.utils.benchmark warns there too)."""

LEAST_REPETITIONS = 9


def _no_context() -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Contestant:
    """Something to time. ``around`` makes a context (threads, say) that is entered outside the timed region."""

    name: str
    call: Callable[[], object]
    around: Callable[[], AbstractContextManager[object]] = _no_context


@dataclass(frozen=True)
class Probe:
    """Something that measures itself, such as the FMA peak, taken once a round between the contestants."""

    name: str
    measure: Callable[[], float]
    around: Callable[[], AbstractContextManager[object]] = _no_context


@dataclass(frozen=True)
class Protocol:
    """How long and how often. Calls are repeated inside a sample until it lasts ``min_sample_s``.

    Rounds go on from ``repetitions`` to ``max_repetitions`` while some contestant is noisy and ``max_seconds`` are not
    spent.
    """

    repetitions: int = 15
    max_repetitions: int = 45
    min_sample_s: float = 5e-4
    warmup_s: float = 0.02
    max_seconds: float = 15.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repetitions < LEAST_REPETITIONS:
            raise ValueError(f"repetitions must be at least {LEAST_REPETITIONS}, got {self.repetitions}")


@dataclass
class Samples:
    """What one contestant or probe gave: raw values (seconds a call, or the probe's own unit) and their statistics."""

    values: list[float] = field(default_factory=list)
    inner: int = 1
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else math.nan

    @property
    def minimum(self) -> float:
        return min(self.values) if self.values else math.nan

    @property
    def maximum(self) -> float:
        return max(self.values) if self.values else math.nan

    @property
    def iqr_share(self) -> float:
        """Interquartile range divided by the median; 0 for fewer than two values."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / self.median if self.median else 0.0

    @property
    def noisy(self) -> bool:
        return self.iqr_share > NOISY_IQR_SHARE


def geometric_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Weighted geometric mean of positive values; NaN for none."""
    if not values:
        return math.nan
    weights = [1.0] * len(values) if weights is None else weights
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / sum(weights))


def interleave(
    contestants: Sequence[Contestant], probes: Sequence[Probe] = (), protocol: Protocol | None = None
) -> dict[str, Samples]:
    """Times all contestants against each other; returns samples by name.

    A contestant that raises is dropped, and its ``Samples.error`` says why; the others go on. Before each sample the
    contestant runs once untimed, because its neighbours have emptied the caches and put the threads to sleep.
    """
    protocol = protocol or Protocol()
    entrants: list[Contestant | Probe] = [*contestants, *probes]
    names = [entrant.name for entrant in entrants]
    if len(set(names)) != len(names):
        raise ValueError(f"names of contestants and probes must differ, got {names}")
    results = {name: Samples() for name in names}
    running: list[Contestant | Probe] = [c for c in contestants if _warm_up(c, results[c.name], protocol)]
    running += probes
    rng = random.Random(protocol.seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for done in range(protocol.max_repetitions):
            if done >= protocol.repetitions:
                settled = not any(results[c.name].noisy for c in running if isinstance(c, Contestant))
                if settled or time.perf_counter() - started > protocol.max_seconds:
                    break
            rng.shuffle(running)
            for entrant in list(running):
                try:
                    _sample(entrant, results[entrant.name])
                except Exception as error:
                    results[entrant.name].error = describe(error)
                    running.remove(entrant)
    finally:
        if collecting:
            gc.enable()
    return results


def describe(error: BaseException) -> str:
    """One line for an exception: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _warm_up(contestant: Contestant, samples: Samples, protocol: Protocol) -> bool:
    try:
        with contestant.around():
            contestant.call()
            fastest, started = math.inf, time.perf_counter()
            for _ in range(1000):
                begin = time.perf_counter()
                contestant.call()
                end = time.perf_counter()
                fastest = min(fastest, end - begin)
                if end - started > protocol.warmup_s:
                    break
    except Exception as error:
        samples.error = describe(error)
        return False
    samples.inner = max(1, math.ceil(protocol.min_sample_s / max(fastest, 1e-8)))
    return True


def _sample(entrant: Contestant | Probe, samples: Samples) -> None:
    with entrant.around():
        if isinstance(entrant, Probe):
            samples.values.append(entrant.measure())
            return
        call = entrant.call
        call()
        begin = time.perf_counter_ns()
        for _ in repeat(None, samples.inner):
            call()
        end = time.perf_counter_ns()
    samples.values.append((end - begin) * 1e-9 / samples.inner)
