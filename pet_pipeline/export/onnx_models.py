"""The networks of a pipeline as ONNX files, exported by `torch.export` and checked with ONNX Runtime."""

import json
import shutil
import textwrap
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..pipeline_pet_classification import PetClassificationPipeline
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import SampleSettings
from .plan import sampling_plan
from .web_page import write_page


if TYPE_CHECKING:
    from onnx import GraphProto


MAX_BATCH = 4096
# Highest error of an exported network, as a share of the root mean square of its output.
TOLERANCES = {"float32": 1e-3, "int8": 0.1}


class _Denoiser(nn.Module):
    """A denoiser whose output is a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        return self.model(hidden_states, timestep, class_labels, return_dict=False)[0]


class _Classifier(nn.Module):
    """The probe of a pipeline and the part of the denoiser that it reads."""

    def __init__(self, classifier: PetClassificationPipeline) -> None:
        super().__init__()
        self.classifier = classifier
        self.transformer, self.probe = classifier.transformer, classifier.probe

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        config = self.probe.config
        return self.probe(self.classifier._features_of_batch(images, config.layer, config.sigmas))


def export_onnx(
    pipeline: PetDiffusionPipeline,
    folder: str | Path,
    settings: SampleSettings | None = None,
    weights: str = "float32",
    classifier: PetClassificationPipeline | None = None,
    web: bool = False,
) -> dict[str, float]:
    """Writes the networks of a pipeline as ONNX files, and `sampling.json`, the plan of [`sampling_plan`].

    - `transformer.onnx` and, if the settings use the guide, `guide.onnx` map `hidden_states` of shape (batch,
      channels, height, width) in float32, `timestep` (batch,) in float32 and `class_labels` (batch,) in int64
      to `sample`, the network output F.
    - `classifier.onnx`, if there is a classifier, maps `images` (batch, channels, height, width) in [-1, 1]
      to `log_odds` (batch, classes) by the probe.

    The batch may be of any size up to 4096. ONNX Runtime runs each file, and its output is compared with that
    of PyTorch. No file is written to the folder before everything has worked.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline, on the CPU in float32.
        folder (`str` or `Path`): where the files are written: a folder that is new, empty or of an earlier
            export, whose files are replaced.
        settings ([`SampleSettings`], *optional*): how the plan samples; the default is as the pipeline does.
        weights (`str`, defaults to `"float32"`): `"float32"`, or `"int8"` for matrices of 8 bits with a scale
            for each output, which makes the files a quarter as large.
        classifier ([`PetClassificationPipeline`], *optional*): a pipeline with a probe.
        web (`bool`, defaults to `False`): also write the page of [`write_page`].

    Returns:
        `dict[str, float]`: for each file, the largest difference from PyTorch as a share of the root mean
        square of the output.

    Raises:
        ValueError: if the pipeline cannot be exported so, the folder holds other files, or a difference
            exceeds [`TOLERANCES`].
        OSError: if a file cannot be written, or `npm` cannot fetch what the page needs.
    """
    plan = sampling_plan(pipeline, settings or SampleSettings())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "sampling.json").exists():
        raise ValueError(f"{str(folder)!r} holds other files; choose a folder that is new or empty.")
    shape, generator = (2, *plan["shape"]), torch.Generator().manual_seed(0)
    networks: dict[str, tuple[nn.Module, dict[str, torch.Tensor], str]] = {}
    for name in ("transformer", "guide") if pipeline.autoguidance_scale != 1 else ("transformer",):
        inputs = {
            "hidden_states": torch.randn(shape, generator=generator),
            "timestep": torch.randn(2, generator=generator),
            "class_labels": torch.tensor([0, plan["negative_class"]]),
        }
        networks[name] = (_Denoiser(getattr(pipeline, name)), inputs, "sample")
    if classifier is not None:
        images = {"images": torch.rand(shape, generator=generator) * 2 - 1}
        networks["classifier"] = (_Classifier(classifier), images, "log_odds")

    differences = {}
    with TemporaryDirectory() as temporary:
        if web:
            write_page(Path(temporary))
        for name, (network, inputs, output_name) in networks.items():
            path = Path(temporary) / f"{name}.onnx"
            _write(network.eval(), inputs, output_name, path, weights)
            differences[path.name] = _difference(network, inputs, path)
            if not differences[path.name] <= TOLERANCES[weights]:
                raise ValueError(
                    f"{path.name} differs from PyTorch by {differences[path.name]:.2g} of the root mean "
                    f"square of its output, more than {TOLERANCES[weights]:g}."
                )
        plan["files"] = {name: (Path(temporary) / name).stat().st_size for name in differences}
        (Path(temporary) / "sampling.json").write_text(json.dumps(plan, indent=1) + "\n")
        for earlier in folder.glob("*.onnx"):
            earlier.unlink()
        shutil.copytree(temporary, folder, dirs_exist_ok=True)
    return differences


def _write(
    network: nn.Module, inputs: dict[str, torch.Tensor], output_name: str, path: Path, weights: str
) -> None:
    """Exports a network with a dynamic batch to one file."""
    # PyTorch 2.9 wants at least 2 here. The file takes a batch of 1 nevertheless, which is checked.
    batch = torch.export.Dim("batch", min=2, max=MAX_BATCH)
    with warnings.catch_warnings(), torch.no_grad():
        network(**inputs)  # says what is wrong with a network in one sentence, which the exporter would not
        warnings.simplefilter("ignore")  # of the exporter, about names of axes
        try:
            program = torch.onnx.export(
                network,
                kwargs=inputs,
                input_names=list(inputs),
                output_names=[output_name],
                dynamic_shapes={name: {0: batch} for name in inputs},
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = textwrap.shorten(str(error.__cause__ or error), 300)
            raise ValueError(f"{path.name} cannot be exported: {reason}") from error
    assert program is not None  # it is for other ways to export
    model = program.model_proto
    if weights == "int8":
        _store_in_eight_bits(model.graph)
    path.write_bytes(model.SerializeToString())


def _store_in_eight_bits(graph: "GraphProto") -> None:
    """Stores matrices as int8 with a scale for each output; they become float32 when the file is loaded.

    The quantizers of ONNX Runtime change the computation instead: one rounds activations too, which makes the
    error eight times as high, and the other leaves a third of the weights as they are.
    """
    from onnx import TensorProto, helper, numpy_helper

    # Matrices are multiplied as (in, out) by MatMul, and are (out, in) elsewhere.
    transposed = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    restored = []
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or np.prod(tensor.dims) < 1024:
            continue
        matrix = numpy_helper.to_array(tensor)
        axes = tuple(range(matrix.ndim - 1)) if tensor.name in transposed else tuple(range(1, matrix.ndim))
        scale = np.maximum(np.abs(matrix).max(axes, keepdims=True) / 127, np.finfo(np.float32).tiny)
        name = tensor.name
        parts = {f"{name}_int8": np.round(matrix / scale).astype(np.int8), f"{name}_scale": scale}
        graph.initializer.remove(tensor)
        graph.initializer.extend(numpy_helper.from_array(part, key) for key, part in parts.items())
        # ONNX Runtime computes these two when it loads the file, which it does not do for DequantizeLinear.
        restored.append(helper.make_node("Cast", [f"{name}_int8"], [f"{name}_cast"], to=TensorProto.FLOAT))
        restored.append(helper.make_node("Mul", [f"{name}_cast", f"{name}_scale"], [name]))
    nodes = [*restored, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _difference(network: nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> float:
    """Runs a file with ONNX Runtime and returns its largest difference from PyTorch, for two batch sizes."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for rows in ([0], [1, 0, 1]):
        chosen = {name: tensor[rows] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected = network(**chosen).numpy()
        output = session.run(None, {name: tensor.numpy() for name, tensor in chosen.items()})[0]
        scale = max(float(np.sqrt(np.mean(expected**2))), np.finfo(np.float32).tiny)
        largest = float(np.maximum(largest, np.abs(output - expected).max() / scale))  # keeps NaN
    return largest
