"""Code that loads a saved pipeline in another process and draws an image, and the image's expected sum."""

from pathlib import Path

import torch


ROOT = Path(__file__).parents[2]
GENERIC = """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({!r}, trust_remote_code=True)
"""
INSTALLED = """
from pet_pipeline import PetDiffusionPipeline
pipe = PetDiffusionPipeline.from_pretrained({!r})
"""
DRAW = """
import torch
pipe.set_progress_bar_config(disable=True)
print(type(pipe).__module__, type(pipe.transformer).__module__)
generator = torch.Generator().manual_seed(0)
print(pipe("dog", 3, generator=generator, output_type="pt").images.double().sum().item())
"""


def image_sum(pipeline) -> float:
    generator = torch.Generator().manual_seed(0)
    return pipeline("dog", 3, generator=generator, output_type="pt").images.double().sum().item()
