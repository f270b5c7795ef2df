"""Samples with one denoiser at high noise levels and with another at low ones: which decide about the images?

    python tests/benchmarks/combine_denoisers.py comparison/reference-0 comparison/dit-0 --below 0.3 \\
        --dataset_name uoft-cs/cifar10

Both are output folders of `train_pet.py`, `train_baseline.py` or `compare_recipes.py`. Prints FD-EffLite0 and
KID-EffLite0 of the images, without guidance.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from train_baseline import load_denoiser

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.evaluation.images import generate_images, measure_images
from pet_pipeline.evaluation.metrics import EfficientNetLite0Features
from pet_pipeline.evaluation.reference import load_reference


class CombinedDenoiser(ModelMixin, ConfigMixin):
    """Two denoisers, of which the noise level chooses one; all images of a batch have the same."""

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, num_classes: int, threshold: float) -> None:
        super().__init__()
        self.high: torch.nn.Module | None = None
        self.low: torch.nn.Module | None = None

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma = math.exp(4 * torch.as_tensor(timestep).flatten()[0].item())
        denoiser = self.high if sigma > self.config.threshold else self.low
        return denoiser(hidden_states, timestep, *args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("high", type=Path, help="folder of the denoiser above the threshold")
    parser.add_argument("low", type=Path, help="folder of the one below")
    parser.add_argument("--below", type=float, nargs="+", default=[0.06, 0.3, 2.0], help="thresholds, σ")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--cache_dir")
    args = parser.parse_args()

    reference = load_reference(args.dataset_name, ["cat", "dog"], 32, cache_dir=args.cache_dir)
    features = EfficientNetLite0Features()
    high, low = load_denoiser(args.high), load_denoiser(args.low)
    print("| the second below σ | FD-EffLite0 | KID-EffLite0 ×10³ |\n|---|---|---|")
    for threshold in args.below:
        config = high.config
        denoiser = CombinedDenoiser(config.sample_size, config.in_channels, config.num_classes, threshold)
        denoiser.high, denoiser.low = high, low
        pipeline = PetDiffusionPipeline(denoiser.eval(), AdaptiveEDMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        images = generate_images(pipeline, args.num_images, guidance_scale=1.0).images
        measures = measure_images(images, None, reference, features)
        kid = 1000 * measures["kid_efflite0"]
        print(f"| {threshold:g} | {measures['fd_efflite0']:.1f} | {kid:.1f} |", flush=True)


if __name__ == "__main__":
    main()
