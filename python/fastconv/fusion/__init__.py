"""Models with their weights frozen: BatchNorm folded into convolutions, activations and additions done in epilogues."""

from fastconv.fusion.frozen import FrozenConv2d, FrozenLinear
from fastconv.fusion.model import Fused, fuse, unfuse
from fastconv.fusion.report import Report

__all__ = ["FrozenConv2d", "FrozenLinear", "Fused", "Report", "fuse", "unfuse"]
