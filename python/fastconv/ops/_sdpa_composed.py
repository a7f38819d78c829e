"""Attention composed of torch's differentiable operations: what has no kernel, which is forward mode and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._dispatch import computed_in

if TYPE_CHECKING:
    from .sdpa import MaybeTensor, Operands, Options

_LOW32 = 0xFFFFFFFF


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits, as if x were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def dropout_factors(shape: Sequence[int], options: Options, like: Tensor) -> Tensor:
    """What dropout multiplies the weights (B, H, Lq, Lkv) with: the generator of `reference.dropout_factors`."""
    B, H, Lq, Lkv = shape
    rows = torch.arange(1, B * H * Lq + 1, device=like.device)
    x = rows * _signed(0x9E3779B97F4A7C15) + options.key
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ _shift(x, 31)
    start, twist = (x & _LOW32)[:, None], _shift(x, 32)[:, None]
    y = (torch.arange(Lkv, device=like.device) * 0x9E3779B9 + start) & _LOW32
    y = ((y ^ (y >> 16)) * 0x21F0AAAD) & _LOW32
    y = y ^ (y >> 15) ^ twist
    y = (y * 0xD35A2D97) & _LOW32
    y = y ^ (y >> 15)
    kept = (y >> 8) >= int(options.dropout * (1 << 24) + 0.5)
    factor = 1 / (1 - options.dropout) if options.dropout < 1 else 0.0
    return (kept.to(like.dtype) * factor).reshape(B, H, Lq, Lkv)


class _Parts:
    """Scores, weights, and what is hidden, of one attention."""

    def __init__(self, given: Operands | Sequence[Any], options: Options) -> None:
        q, k, v, mask, bias, sink = given
        self.options, self.group, self.precision = options, q.shape[1] // k.shape[1], computed_in(q.dtype)
        stored = q.dtype
        q = q.to(self.precision)
        self.q, self.k = q, self.shared(k)
        s = options.scale * (q @ self.k.mT)
        if options.softcap:
            t = torch.tanh(s / options.softcap)
            s, self.slope = options.softcap * t, 1 - t * t
        offset = torch.arange(k.shape[2], device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None]
        hidden = (offset < options.low) | (offset > options.high)
        self.place = offset + (q.shape[2] - 1)
        if bias is not None:
            s = s + bias[:, :, self.place]
        if mask is not None and mask.dtype is torch.bool:
            hidden = hidden | ~mask
        elif mask is not None:
            s = s + mask.to(self.precision)
        self.scores = s = s.masked_fill(hidden, -torch.inf)
        self.factors: Tensor | float = dropout_factors(s.shape, options, q) if options.dropout else 1.0
        self.v = self.shared(v)
        # Subtracting the largest changes no derivative.
        most = s.detach().amax(3, keepdim=True) if k.shape[2] else s.new_zeros(*s.shape[:3], 1)
        if sink is not None:
            most = torch.maximum(most, sink.detach()[..., None, None])
        most = torch.where(most == -torch.inf, 0.0, most)
        e = torch.exp(s - most)
        total = e.sum(3, keepdim=True)
        if sink is not None:
            total = total + torch.exp(sink[..., None, None] - most)
        dead = total == 0
        total = torch.where(dead, 1.0, total)
        self.weights = e / total
        self.lse = torch.where(dead, -torch.inf, most + torch.log(total)).squeeze(3)
        self.out = ((self.weights * self.factors) @ self.v).to(stored)

    def shared(self, t: Tensor) -> Tensor:
        t = t.to(self.precision)
        return t if self.group == 1 else t.repeat_interleave(self.group, 1)


def weights(given: Operands, lse: Tensor, options: Options) -> Tensor:
    """exp(scores - lse), and what dropout makes of it. Where a query sees nothing, 0."""
    a = _Parts(given, options)
    dead = lse == -torch.inf
    found = torch.exp(a.scores - torch.where(dead, 0.0, lse)[..., None])
    return (found * a.factors).to(given.q.dtype)


def jvp(given: Operands, options: Options, tangents: Sequence[MaybeTensor]) -> tuple[Tensor, Tensor]:
    """What moves in out and lse when the operands move along tangents; None stands still."""
    tq, tk, tv, tmask, tbias, tsink = tangents
    a = _Parts(given, options)
    ts = torch.zeros_like(a.weights)
    if tq is not None:
        ts = ts + options.scale * (tq.to(a.precision) @ a.k.mT)
    if tk is not None:
        ts = ts + options.scale * (a.q @ a.shared(tk).mT)
    if options.softcap:
        ts = ts * a.slope
    if tmask is not None:
        ts = ts + tmask.to(a.precision)
    if tbias is not None:
        ts = ts + tbias[:, :, a.place]
    tlse = (a.weights * ts).sum(3)
    if tsink is not None and given.sink is not None:
        tlse = tlse + torch.exp(given.sink[..., None] - a.lse) * tsink[..., None]
    tout = (a.weights * (ts - tlse[..., None]) * a.factors) @ a.v
    if tv is not None:
        tout = tout + (a.weights * a.factors) @ a.shared(tv)
    return tout.to(given.q.dtype), tlse


def double_backward(
    inputs: Sequence[MaybeTensor], options: Options, g: Sequence[MaybeTensor], needed: Sequence[bool]
) -> list[MaybeTensor]:
    """The gradients of the inputs (dout, dlse and the operands), where needed, of sdpa_bwd's outputs with gradients g."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves: list[Any] = []
        for t in inputs:
            wants = t is not None and t.is_floating_point()
            # Part of the caller's graph where there is one, for any order of derivatives, but not the caller's own tensor: dout
            # is made of out, and what it says of q by way of out is not asked here.
            leaves.append(t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_(wants))
        dout, dlse, *given = leaves
        a = _Parts(given, options)
        more = [(place, t) for place, t in enumerate(given) if t is not None and t.is_floating_point()]
        moving, g = [t for _, t in more], [g[place] for place, _ in more]
        outs, grads = [a.out], [dout]
        if dlse is not None:
            outs.append(a.lse)
            grads.append(dlse)
        first = torch.autograd.grad(outs, moving, grads, create_graph=True)
        pairs = [(f, t) for f, t in zip(first, g) if t is not None and f.requires_grad]
        wanted = [i for i, need in enumerate(needed) if need and leaves[i] is not None]
        found: list[MaybeTensor] = [None] * len(inputs)
        if pairs and wanted:
            targets = [leaves[i] for i in wanted]
            second = torch.autograd.grad(
                [f for f, _ in pairs], targets, [t for _, t in pairs], create_graph=create, allow_unused=True
            )
            for i, value in zip(wanted, second):
                found[i] = value
    return found
