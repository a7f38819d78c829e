"""Models with their weights frozen: BatchNorm folded into convolutions, activations and additions done in their epilogue."""

from fastconv.fusion.frozen import FrozenConv2d
from fastconv.fusion.model import Fused, fuse, unfuse
from fastconv.fusion.report import Report

__all__ = ["FrozenConv2d", "Fused", "Report", "fuse", "unfuse"]
