"""Measures of a denoiser and of its samples."""

import math
from dataclasses import dataclass
from typing import Any

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
    """Mean squared error of the network's output, whose target has unit variance, by noise level.

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


@dataclass
class NearestNeighbors:
    """What [`nearest_neighbors`] returns, each of shape `(N,)`.

    Args:
        indices (`torch.Tensor`): the nearest training image of each sample.
        distances (`torch.Tensor`): root-mean-square pixel distance to it.
        second_distances (`torch.Tensor`): the same to the nearest training image that is another one.
    """

    indices: torch.Tensor
    distances: torch.Tensor
    second_distances: torch.Tensor


@torch.no_grad()
def nearest_neighbors(
    samples: torch.Tensor,
    training_images: torch.Tensor,
    duplicate_distance: float = 0.1,
    chunk_size: int = 256,
) -> NearestNeighbors:
    """Finds the training images closest to each sample, mirrored or not.

    Args:
        samples (`torch.Tensor` of shape `(N, channels, height, width)`): images in [-1, 1].
        training_images (`torch.Tensor` of shape `(M, channels, height, width)`): images in [-1, 1], at least
            two.
        duplicate_distance (`float`, defaults to 0.1): training images closer than this to the nearest one
            (root mean square, mirrored or not) count as copies of it and not as the second nearest.
        chunk_size (`int`, defaults to 256): samples compared at once.
    """
    pixels = training_images[0].numel()
    known = training_images.flatten(1)
    mirrored = training_images.flip(-1).flatten(1)

    def distances_to_known(images: torch.Tensor) -> torch.Tensor:  # (n, M)
        images = images.flatten(1)
        return torch.minimum(torch.cdist(images, known), torch.cdist(images, mirrored)) / pixels**0.5

    results = []
    for chunk in samples.split(chunk_size):
        distances = distances_to_known(chunk)
        nearest, indices = distances.min(1)
        copies = distances_to_known(training_images[indices]) < duplicate_distance
        copies[torch.arange(len(chunk)), indices] = True
        results.append((indices, nearest, distances.masked_fill(copies, math.inf).min(1).values))
    return NearestNeighbors(*(torch.cat(column) for column in zip(*results)))


def memorization_ratio(
    samples: torch.Tensor, training_images: torch.Tensor, threshold: float = 1 / 3, **kwargs: Any
) -> float:
    """Share of samples that are copies of training images.

    The criterion is that of Yoon et al. (2023), "Diffusion Probabilistic Models Generalize when They Fail to
    Memorize".

    A sample is a copy if its distance to the nearest training image is under a third of that to the second
    nearest.

    Args:
        samples (`torch.Tensor` of shape `(N, channels, height, width)`): images in [-1, 1].
        training_images (`torch.Tensor` of shape `(M, channels, height, width)`): images in [-1, 1], at least
            two.
        threshold (`float`, defaults to 1/3): the ratio of distances below which a sample is a copy.
        kwargs: see [`nearest_neighbors`].
    """
    neighbors = nearest_neighbors(samples, training_images, **kwargs)
    return (neighbors.distances < threshold * neighbors.second_distances).float().mean().item()
