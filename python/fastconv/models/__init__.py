"""Reference models, buildable on fastconv's layers or on torch's; :func:`names` lists them."""

from fastconv.models.outputs import classification_loss, heads, main_output, per_image
from fastconv.models.registry import ModelSpec, create, names, spec
from fastconv.models.weights import load_weights

__all__ = [
    "ModelSpec",
    "classification_loss",
    "create",
    "heads",
    "load_weights",
    "main_output",
    "names",
    "per_image",
    "spec",
]
