"""What the Transformer learns in the training check: dates in words and figures, to be written as 1987-03-23."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

PADDING, START, END = 0, 1, 2

_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_WEEKDAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = [
    "zeroth",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
]
_FIGURES = list("0123456789")
_SMALL = ["the", "of", "on", "in", "year", "hundred", "thousand", "and", "oh", ",", "/", "thirtieth"]

_WORDS = [*_FIGURES, *_MONTHS, *_WEEKDAYS, *_ONES, *_TENS[2:], *_ORDINALS[1:], *_SMALL]
_SOURCE = {word: i for i, word in enumerate(_WORDS, 3)}
_TARGET = {sign: i for i, sign in enumerate([*_FIGURES, "-"], 3)}

_FIRST, _LAST = datetime.date(1700, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
# Every tenth day is never trained on.
_KEPT_BACK = 10


def _cardinal(n: int) -> list[str]:
    """0..99 in words."""
    if n < 20:
        return [_ONES[n]]
    return [_TENS[n // 10]] + ([_ONES[n % 10]] if n % 10 else [])


def _ordinal(n: int) -> list[str]:
    """1..31 in words."""
    if n <= 20:
        return [_ORDINALS[n]]
    return ["thirtieth"] if n == 30 else [_TENS[n // 10], _ORDINALS[n % 10]]


def _year(n: int, rng: random.Random) -> list[str]:
    """A year in words, as one of the ways that people say it."""
    century, rest = divmod(n, 100)
    if rng.random() < 0.3 or (century == 20 and rest < 10):
        hundreds = ["two", "thousand"] if century == 20 else [*_cardinal(century), "hundred"]
        return hundreds + (["and", *_cardinal(rest)] if rest else [])
    if rest == 0:
        return [*_cardinal(century), "hundred"]
    return [*_cardinal(century), *(["oh"] if rest < 10 else []), *_cardinal(rest)]


def _figures(n: int) -> list[str]:
    return list(str(n))


_Style = Callable[[datetime.date, random.Random], list[str]]

_STYLES: tuple[_Style, ...] = (
    lambda d, rng: ["the", *_ordinal(d.day), "of", _MONTHS[d.month - 1], *_year(d.year, rng)],
    lambda d, rng: [_MONTHS[d.month - 1], "the", *_ordinal(d.day), ",", *_year(d.year, rng)],
    lambda d, rng: [_WEEKDAYS[d.weekday()], ",", *_figures(d.day), _MONTHS[d.month - 1], *_figures(d.year)],
    lambda d, rng: [_MONTHS[d.month - 1], *_figures(d.day), ",", *_figures(d.year)],
    lambda d, rng: [
        "in",
        "the",
        "year",
        *_year(d.year, rng),
        ",",
        "on",
        "the",
        *_ordinal(d.day),
        "of",
        _MONTHS[d.month - 1],
    ],
    lambda d, rng: [*_figures(d.day), "/", *_figures(d.month), "/", *_figures(d.year)],
)


def written(date: datetime.date, rng: random.Random) -> list[str]:
    """The date in one of six styles, by words and single figures."""
    return rng.choice(_STYLES)(date, rng)


def _translations(count: int, rng: random.Random, kept_back: bool) -> tuple[Tensor, Tensor]:
    """Random dates as tokens: sources (count, S), padded, and targets (count, 12) from the start symbol to the end symbol."""
    sources: list[Tensor] = []
    targets: list[Tensor] = []
    while len(sources) < count:
        ordinal = rng.randint(_FIRST, _LAST)
        if (ordinal % _KEPT_BACK == 0) == kept_back:
            date = datetime.date.fromordinal(ordinal)
            sources.append(torch.tensor([_SOURCE[word] for word in written(date, rng)]))
            targets.append(torch.tensor([START, *(_TARGET[sign] for sign in date.isoformat()), END]))
    return nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=PADDING), torch.stack(targets)


@dataclass(frozen=True)
class Dates:
    """Dates of four centuries, written in six styles, to ISO 8601; Adam with a warm-up and a cosine schedule.

    A date counts as right when all ten signs are, decoded greedily with the cache of keys and values.

    Training multiplies what rounding differs by: with another of its own attentions, torch differs from itself by 1.1e-6 after
    100 steps, 6.6e-6 after 150, 2e-4 after 200 and 0.1 after 350 (fastconv from torch: 6.0e-7, 3.1e-6, 1.4e-4, 0.07). So the
    losses are compared while that means something, and the dates that were kept back decide about the rest. For the same reason
    GELU is in the place of ReLU, whose kink one rounding in ten steps crosses, and epsilon is above the 1e-9 that rounding makes
    of gradients that are 0, as those of the keys' biases.
    """

    steps: int = 600
    batch: int = 32
    learning_rate: float = 3e-3
    warmup: int = 60
    epsilon: float = 1e-5
    seed: int = 0
    tests: int = 500
    compared: int = 120
    loss_tolerance: float = 2e-5
    min_accuracy: float = 0.98

    title: ClassVar[str] = "written dates"
    unit: ClassVar[str] = "dates"
    extras: ClassVar[tuple[str, ...]] = ("matplotlib",)
    config: ClassVar[dict[str, Any]] = {
        "source_size": 3 + len(_SOURCE),
        "target_size": 3 + len(_TARGET),
        "d_model": 64,
        "num_heads": 2,
        "num_layers": 2,
        "d_ff": 128,
        "dropout": 0.0,
        "activation": "gelu",
        "padding": PADDING,
    }

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        rng = random.Random(self.seed)
        for _ in range(self.steps):
            yield _translations(self.batch, rng, False)

    def optimise(self, network: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), eps=self.epsilon)
        # A schedule that starts at 0 for a run no longer than its warm-up.
        warmup = min(self.warmup, self.steps // 2 + 1)
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.steps - warmup, 1))
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        source, target = batch
        logits: Tensor = network(source, target[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())

    def accuracy(self, network: nn.Module) -> float:
        source, target = _translations(self.tests, random.Random(self.seed + 1), True)
        expected = target[:, 1:]
        found = network.greedy(source, start=START, end=END, max_length=expected.shape[1])  # type: ignore[operator]
        found = functional.pad(found, (0, expected.shape[1] - found.shape[1]), value=END)
        return float((found == expected).all(1).double().mean())
