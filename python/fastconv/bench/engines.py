"""Inference engines that people export a model to for its speed, as contestants of whole networks.

Both get the network in float32, on images of one fixed size and a fixed number of threads, the best that they can do with:
they choose layouts, fuse and transform filters ahead. The packages come with ``pip install 'fastconv[bench]'``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastconv import models

Engine = Callable[[nn.Module, Tensor, int], Callable[[], Tensor]]


class _MainOutput(nn.Module):
    """A network's first output: Inception's and GoogLeNet's heads for training are not exported."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return models.main_output(self.network(x))


def openvino(network: nn.Module, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """OpenVINO's CPU plugin in f32, for latency.

    Raises:
        ModuleNotFoundError: without the package ``openvino``.
    """
    import openvino as ov

    with torch.no_grad():
        model = ov.convert_model(_MainOutput(network).eval(), example_input=x, input=list(x.shape))
    hints = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    image = x.numpy()
    return lambda: torch.from_numpy(request.infer({0: image})[0])


def onnxruntime(network: nn.Module, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """ONNX Runtime's CPU provider with all of its graph optimisations.

    Raises:
        ModuleNotFoundError: without the packages ``onnxruntime``, ``onnx`` and ``onnxscript``, which torch exports with.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's about itself
        path = str(Path(folder, "network.onnx"))
        torch.onnx.export(_MainOutput(network).eval(), (x,), path, input_names=["x"], verbose=False)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, image)[0])


ENGINES: dict[str, Engine] = {"openvino": openvino, "onnxruntime": onnxruntime}
