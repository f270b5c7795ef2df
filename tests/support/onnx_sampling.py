"""A sampler that knows an exported folder only: NumPy, ONNX Runtime, and no PyTorch."""

import json
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession


def draw(folder: Path, labels: list[int], noises: list[np.ndarray]) -> np.ndarray:
    """Draws images in about [-1, 1]. `noises` are the starting noise, and then that of the steps."""
    plan = json.loads((folder / "sampling.json").read_text())
    transformer = InferenceSession(folder / "transformer.onnx")
    guide = InferenceSession(folder / "guide.onnx") if "guide.onnx" in plan["files"] else transformer
    classes = np.array(labels)
    negative = np.full_like(classes, plan["negative_class"])
    x, fresh = plan["init_noise_sigma"] * noises[0], iter(noises[1:])
    previous = np.zeros_like(x)
    for step in plan["steps"]:
        inputs = {
            "hidden_states": (step["c_in"] * x).astype(np.float32),
            "timestep": np.full(len(x), step["timestep"], np.float32),
        }
        output = conditional = transformer.run(None, {**inputs, "class_labels": classes})[0]
        own = guide.run(None, {**inputs, "class_labels": classes})[0]
        other = guide.run(None, {**inputs, "class_labels": negative})[0]
        output = output + (step["guidance_scale"] - 1) * (own - other)
        output = output + (step["autoguidance_scale"] - 1) * (conditional - own)
        denoised = step["c_skip"] * x + step["c_out"] * output
        x = step["sample"] * x + step["denoised"] * denoised + step["previous"] * previous
        if step["noise"]:
            x = x + step["noise"] * next(fresh)
        previous = denoised
    return x
