"""Reference models, buildable on fastconv's layers or on torch's: LeNet-5, ResNet-18 to 152, VGG-16 and 19."""

from fastconv.models.registry import ModelSpec, create, names, spec
from fastconv.models.weights import load_weights

__all__ = ["ModelSpec", "create", "load_weights", "names", "spec"]
