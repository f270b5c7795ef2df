"""Measures of a denoiser."""

import math

import torch
from diffusers.models.modeling_utils import ModelMixin

from .data import ImageDataset, to_model_range
from .scheduling_adaptive_edm import AdaptiveEDMScheduler


# 16 levels, evenly spaced in ln σ from e^-4.5 (0.011) to e^3 (20).
VALIDATION_SIGMAS = tuple(math.exp(-4.5 + 7.5 * i / 15) for i in range(16))


@torch.no_grad()
def validation_loss(
    transformer: ModelMixin,
    scheduler: AdaptiveEDMScheduler,
    dataset: ImageDataset,
    batch_size: int = 64,
    seed: int = 0,
    sigmas: tuple[float, ...] = VALIDATION_SIGMAS,
) -> dict[float, float]:
    """Mean squared error of the network's output (F-space, target of unit variance) at each of some noise
    levels.

    Args:
        transformer (`ModelMixin`): the denoiser, in evaluation mode.
        scheduler ([`AdaptiveEDMScheduler`]): its preconditioning.
        dataset ([`ImageDataset`]): unseen images, each measured once per level with its true label.
        batch_size (`int`, defaults to 64): images per evaluation; the result does not depend on it.
        seed (`int`, defaults to 0): of the noise, which is drawn once per image.
        sigmas (`tuple[float, ...]`): noise levels σ.

    Returns:
        `dict[float, float]`: the error by noise level.
    """
    device = transformer.device
    noise = torch.randn(dataset.images.shape, generator=torch.Generator().manual_seed(seed))
    errors = {}
    for sigma in sigmas:
        total = 0.0
        for start in range(0, len(dataset), batch_size):
            rows = slice(start, start + batch_size)
            images = to_model_range(dataset.images[rows].to(device))
            noisy_images = images + sigma * noise[rows].to(device)
            timesteps = scheduler.precondition_noise(torch.full((len(images),), sigma, device=device))
            model_input = scheduler.precondition_inputs(noisy_images, sigma)
            model_output = transformer(
                model_input, timesteps, dataset.labels[rows].to(device), return_dict=False
            )[0]
            target = scheduler.training_target(images, noisy_images, sigma)
            total += (model_output.float() - target).square().mean((1, 2, 3)).sum().item()
        errors[sigma] = total / len(dataset)
    return errors
