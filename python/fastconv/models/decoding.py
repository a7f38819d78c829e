"""From a model that predicts the next token to a sequence: greedy and beam search, with whatever caches the model keeps."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """A sequence under way in a model."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows after ``tokens`` (B, n), which come behind those of the calls before."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Makes row i of the batch what row rows[i] was."""
        ...


def greedy_search(step: Step, first: Tensor, end: int, max_length: int) -> Tensor:
    """The likeliest token at each step after ``first`` (B, n), until each row has met ``end``: (B, at most max_length).

    Rows that are done are filled up with ``end``.
    """
    tokens, found = first, []
    done = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for _ in range(max_length):
        following = step(tokens).argmax(1).masked_fill(done, end)
        found.append(following)
        done |= following == end
        if bool(done.all()):
            break
        tokens = following[:, None]
    return torch.stack(found, 1) if found else first[:, :0]


def _penalty(length: int, alpha: float) -> float:
    """What the log-probability of a sequence is divided by (Wu et al.: Google's neural machine translation, 2016, eq. 14)."""
    return float(((5 + length) / 6) ** alpha)


def beam_search(
    step: Step, first: Tensor, end: int, max_length: int, beams: int, length_penalty: float = 0.0
) -> Tensor:
    """As `greedy_search`, keeping the ``beams`` likeliest sequences of each row; the best by log-probability over its penalty.

    A sequence that has met ``end`` stays in its beam as it is. ValueError where there are no beams.
    """
    if beams < 1:
        raise ValueError(f"beams: got {beams}, expected at least 1")
    B = len(first)
    tokens, device = first, first.device
    scores = torch.zeros(B, 1, device=device)
    found = first.new_empty((B, 1, 0))
    lengths = first.new_zeros((B, 1))
    done = torch.zeros(B, 1, dtype=torch.bool, device=device)
    for _ in range(max_length):
        width = scores.shape[1]
        following = step(tokens).float().log_softmax(1).unflatten(0, (B, width))
        V = following.shape[2]
        # All that a finished sequence can do is to end again, at no cost.
        stay = torch.full((V,), -torch.inf, device=device)
        stay[end] = 0.0
        following = torch.where(done[..., None], stay, following)
        kept = min(beams, width * V)
        scores, places = (scores[..., None] + following).flatten(1).topk(kept, 1)
        parents, choice = places // V, places % V
        done, lengths = done.gather(1, parents), lengths.gather(1, parents) + (~done.gather(1, parents)).long()
        found = torch.cat((found.gather(1, parents[..., None].expand(-1, -1, found.shape[2])), choice[..., None]), 2)
        done = done | (choice == end)
        if bool(done.all()):
            break
        step.reorder((torch.arange(B, device=device)[:, None] * width + parents).flatten())
        tokens = choice.flatten()[:, None]
    penalties = torch.tensor([_penalty(n, length_penalty) for n in range(max_length + 1)], device=device)
    best = (scores / penalties[lengths]).argmax(1)
    return found[torch.arange(B, device=device), best]
