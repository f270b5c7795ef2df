"""The bundled model that draws in a few steps: low-rank updates of the weights of the bundled model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file


if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

FAST = Path(__file__).parent / "pretrained" / "fast"
UPDATES = "pytorch_lora_weights.safetensors"

# The configuration of the pipeline, and components of the bundled model that do not belong to it.
OPTIONS: dict[str, Any] = {
    "guidance_scale": 1.0,
    "autoguidance_scale": 1.0,
    "num_inference_steps": 4,
    "guide": None,
    "probe": None,
    "calibration": None,
}


@torch.no_grad()
def tune(pipeline: "DiffusionPipeline") -> None:
    """Turns the bundled model, loaded with [`OPTIONS`], into the one that draws in a few steps.

    Each update adds a product B·A to a matrix of the weights.
    """
    updates = load_file(FAST / UPDATES)
    weights = dict(pipeline.transformer.named_parameters())
    for name, down in updates.items():
        if ".lora_A." in name:
            up = updates[name.replace(".lora_A.", ".lora_B.")]
            weight = weights[name.replace(".lora_A.", ".")]
            weight += (up.float() @ down.float()).to(weight)
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, solver="consistency")
