"""What `fastconv.fuse` did to a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fastconv.conversion import Kept


@dataclass(frozen=True)
class Report:
    """What was fused, and what was not.

    ``frozen`` names the convolutions and ``linears`` the linear layers that run with frozen weights, ``norms`` and ``residuals``
    those of them that took over a BatchNorm and an addition. ``joined`` names the other BatchNorms that are one call with the
    activation behind them, ``grown`` the first of each chain of concatenations that is done in one memory, and ``cascades`` the
    first of convolutions that may run one after the other on bands of rows. ``activations`` counts what is done in those calls.
    ``left`` lists such layers, other convolutions, norms, and activations after them that are as they were; ``untraced`` the
    modules that torch.fx could not follow, whose parts were fused by themselves.
    """

    model: str
    frozen: list[str] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    cascades: list[str] = field(default_factory=list)
    activations: Counter[str] = field(default_factory=Counter)
    residuals: list[str] = field(default_factory=list)
    left: list[Kept] = field(default_factory=list)
    untraced: list[Kept] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The counts in one line."""
        counts = {"convolution": len(self.frozen), "linear layer": len(self.linears)}
        parts = [f"{_counted(count, what)} frozen" for what, count in counts.items() if count] or ["nothing frozen"]
        if self.norms or self.frozen:
            parts.append(f"{_counted(len(self.norms), 'norm')} folded")
        if self.joined:
            parts.append(f"{_counted(len(self.joined), 'norm')} joined with an activation")
        parts += [f"{count} {name}" for name, count in sorted(self.activations.items())]
        if self.grown:
            parts.append(f"{_counted(len(self.grown), 'chain')} of concatenations in place")
        if self.cascades:
            parts.append(f"{_counted(len(self.cascades), 'cascade')}")
        if self.residuals:
            parts.append(_counted(len(self.residuals), "residual addition"))
        return f"{self.model}: {', '.join(parts)}"

    def __str__(self) -> str:
        lines = [f"fused {self.summary}"]
        for title, layers in (("left", self.left), ("not traced:", self.untraced)):
            groups: dict[tuple[str, str], list[str]] = {}
            for layer in layers:
                groups.setdefault((layer.kind, layer.reason), []).append(layer.name or "the model itself")
            for (kind, reason), names in groups.items():
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                lines.append(f"{title} {kind} ({shown}): {reason}")
        return "\n".join(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
