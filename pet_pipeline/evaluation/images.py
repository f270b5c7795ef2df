"""Measures the quality of generated images against a data set, for `pet-pipeline evaluate`."""

import platform
import time
from dataclasses import dataclass
from datetime import date
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ..sampling import generate
from ..scheduling_adaptive_edm import AdaptiveEDMScheduler
from ..training.data import to_model_range
from ..visualization import array_image, image_grid
from .classifier import BUNDLED_CLASSIFIER, PetClassifier
from .metrics import (
    FeatureExtractor,
    frechet_distance,
    image_features,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
    validation_loss,
)
from .reference import Reference, balanced_subset, num_balanced


@dataclass
class GeneratedImages:
    """The output of [`generate_images`].

    Args:
        images (`torch.Tensor` of shape `(N, channels, height, width)`, uint8): the images.
        labels (`torch.Tensor` of shape `(N,)`): the class of each image.
        evaluations (`float`): evaluations of the denoiser for each image. A guided step has two.
        seconds (`float`): seconds for each image.
    """

    images: torch.Tensor
    labels: torch.Tensor
    evaluations: float
    seconds: float


def generate_images(
    pipeline: DiffusionPipeline, num_images: int, batch_size: int = 64, seed: int = 0, **kwargs: Any
) -> GeneratedImages:
    """Generates images of all classes in turn, with the seeds `seed`, `seed` + 1, and so on.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline that draws.
        num_images (`int`): number of images of all classes together.
        batch_size (`int`, defaults to 64): number of images that are drawn at once.
        seed (`int`, defaults to 0): seed of the first image.
        kwargs: further arguments of the pipeline.
    """
    num_classes = pipeline.transformer.config.num_classes
    labels_and_seeds = [(index % num_classes, seed + index) for index in range(num_images)]
    evaluations = 0

    def count(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal evaluations
        evaluations += len(output[0])

    hook = pipeline.transformer.register_forward_hook(count)
    images = []
    began = time.perf_counter()
    drawn = generate(pipeline, labels_and_seeds, batch_size, output_type="pt", **kwargs)
    try:
        for _, _, image in tqdm(drawn, "images", num_images, leave=False):
            images.append((image * 255).round().clamp(0, 255).to("cpu", torch.uint8))
    finally:
        hook.remove()
    seconds = time.perf_counter() - began
    labels = torch.tensor([label for label, _ in labels_and_seeds])
    return GeneratedImages(torch.stack(images), labels, evaluations / num_images, seconds / num_images)


def measure_images(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    reference: Reference,
    extractor: FeatureExtractor,
    classifier: PetClassifier | None = None,
    cache: bool = False,
) -> dict[str, float]:
    """Compares N images with N real images.

    Args:
        images (`torch.Tensor` of shape `(N, channels, height, width)`, uint8): the images to measure.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): the class of each image.
        reference ([`Reference`]): the real images. The comparison uses a [`balanced_subset`] of N images.
        extractor ([`FeatureExtractor`]): see [`image_features`].
        classifier ([`PetClassifier`], *optional*): the network that decides which class an image shows.
        cache (`bool`, defaults to `False`): whether the features of `images` are kept on disk. The features
            of the reference always are.

    Returns:
        `dict[str, float]`: `fd_NAME` and `kid_NAME`, where NAME is the name of the features; the deviation
        `kid_NAME_std` for more than 1,000 images; `precision`, `recall` and `memorization_ratio`;
        `nearest_distance`, which is the median, as RMS of pixels in [-1, 1]; and `class_accuracy` if labels
        and a classifier are given.
    """
    real = balanced_subset(reference.images, len(images))
    real_features = image_features(real.images, extractor, cache=True)
    features = image_features(images, extractor, cache=cache)
    neighbors = nearest_neighbors(to_model_range(images), reference.train)
    kid, kid_std = kernel_distance(real_features, features)
    precision, recall = precision_recall(real_features, features)
    name = extractor.name.lower()
    measures = {
        "num_images": len(images),
        "num_reference_images": len(real),
        f"fd_{name}": frechet_distance(real_features, features),
        f"kid_{name}": kid,
        **({} if kid_std is None else {f"kid_{name}_std": kid_std}),
        "precision": precision,
        "recall": recall,
        "memorization_ratio": neighbors.memorization_ratio(),
        "nearest_distance": neighbors.distances.median().item(),
    }
    if classifier is not None and labels is not None:
        measures["class_accuracy"] = class_accuracy(images, labels, classifier)
    return measures


@torch.no_grad()
def class_accuracy(images: torch.Tensor, labels: torch.Tensor, classifier: PetClassifier) -> float:
    """Returns the share of uint8 images `(N, 3, height, width)` whose label the classifier finds."""
    found = [classifier(to_model_range(batch)).argmax(1) for batch in images.split(250)]
    return (torch.cat(found) == labels).float().mean().item()


def load_classifier(names: list[str], resolution: int, num_channels: int = 3) -> PetClassifier | None:
    """Loads the bundled classifier, or returns `None` if it classifies other classes or images."""
    config = PetClassifier.load_config(BUNDLED_CLASSIFIER)
    known = [config["class_names"], config["sample_size"], config["in_channels"]]
    if known != [list(names), resolution, num_channels]:
        return None
    return PetClassifier.from_pretrained(BUNDLED_CLASSIFIER, dtype=torch.float32)


def floors(
    reference: Reference,
    num_images: int,
    extractor: FeatureExtractor,
    classifier: PetClassifier | None = None,
) -> dict[str, dict[str, float]]:
    """Measures sets of images of known quality, which give the other measures a scale.

    Args:
        reference ([`Reference`]): see [`measure_images`].
        num_images (`int`): number of images in each set, or fewer if the reference has fewer.
        extractor ([`FeatureExtractor`]): see [`measure_images`].
        classifier ([`PetClassifier`], *optional*): see [`measure_images`].

    Returns:
        `dict[str, dict[str, float]]`: the measures of three sets. "other training images" are perfect, but
        every image is a copy. "unseen images" are perfect, and are left out if the reference consists of
        them. "mean colours of images" have lost everything but the mean colour of a real image.
    """
    half = balanced_subset(reference.train, min(num_images, num_balanced(reference.train, 0.5)), 0.5)
    unseen = balanced_subset(reference.validation, min(num_images, num_balanced(reference.validation)))
    colours = half.images.float().mean((2, 3), keepdim=True).round().byte().expand_as(half.images)
    sets = {
        "other training images": (half.images, half.labels),
        "unseen images": (unseen.images, unseen.labels),
        "mean colours of images": (colours, half.labels),
    }
    if reference.images is reference.validation:
        del sets["unseen images"]  # they would be compared with themselves
    return {
        name: measure_images(images, labels, reference, extractor, classifier, cache=True)
        for name, (images, labels) in sets.items()
    }


def neighbor_grid(images: torch.Tensor, reference: Reference, num_images: int = 12) -> Image.Image:
    """Shows the images that are most likely copies, above the training images that are nearest to them.

    Args:
        images (`torch.Tensor` of shape `(N, channels, height, width)`, uint8): generated images.
        reference ([`Reference`]): holds the training images.
        num_images (`int`, defaults to 12): number of images, of which the most likely copy comes first.
    """
    neighbors = nearest_neighbors(to_model_range(images), reference.train)
    ratios = neighbors.distances / neighbors.second_distances
    rows = ratios.argsort()[:num_images]
    pairs = images[rows], reference.train.subset(neighbors.indices[rows]).load().images
    return image_grid(
        [[array_image(image) for image in row] for row in pairs],
        ["generated", "nearest training image"],
        [f"{ratio:.2f}" for ratio in ratios[rows].tolist()],
        scale=2,
    )


def generated_grid(generated: GeneratedImages, names: list[str], num_images: int = 8) -> Image.Image:
    """Shows the first `num_images` generated images of each class, in one row for each class."""
    rows = [generated.images[generated.labels == label][:num_images] for label in range(len(names))]
    return image_grid([[array_image(image) for image in row] for row in rows], names, scale=4)


def evaluate(
    pipeline: DiffusionPipeline,
    reference: Reference,
    extractor: FeatureExtractor,
    num_images: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    validation_images: int = 512,
    with_floors: bool = False,
    **kwargs: Any,
) -> tuple[dict[str, Any], GeneratedImages]:
    """Generates images, and measures the images and the denoiser.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline to measure.
        reference ([`Reference`]): the real images.
        extractor ([`FeatureExtractor`]): see [`image_features`].
        num_images (`int`, defaults to 1000): number of generated images, and of real images.
        batch_size (`int`, defaults to 64), seed (`int`, defaults to 0): see [`generate_images`].
        validation_images (`int`, defaults to 512): number of held-out images for the validation loss; 0 means
            that the validation loss is not measured. A model that was tuned to draw in a few steps has none.
        with_floors (`bool`, defaults to `False`): whether [`floors`] are measured too.
        kwargs: further arguments of the pipeline.

    Returns:
        `tuple[dict, GeneratedImages]`: the record of settings, measures, floors and machine, which JSON can
        hold, and the images.

    Raises:
        ValueError: if the reference has fewer images in equal shares of each class than `num_images`.
    """
    num_real_images = num_balanced(reference.images)
    if num_images > num_real_images:
        raise ValueError(
            f"`num_images` must be at most {num_real_images}, the number of real images with equal shares of "
            f"each class, but is {num_images}."
        )
    config = pipeline.transformer.config
    classifier = load_classifier(pipeline.class_names, config.sample_size, config.in_channels)
    generated = generate_images(pipeline, num_images, batch_size, seed, **kwargs)
    # A guidance schedule may be a function, which JSON cannot hold: the record keeps its name.
    given = {
        name: getattr(value, "__name__", str(value)) if callable(value) else value
        for name, value in kwargs.items()
    }
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {pipeline.device.type}",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "settings": {
            "num_images": num_images,
            "seed": seed,
            **given,
            "num_inference_steps": given.get("num_inference_steps") or pipeline.config.num_inference_steps,
            "guidance_scale": pipeline.guidance_scale,
            "pag_scale": pipeline.pag_scale,
            "autoguidance_scale": pipeline.autoguidance_scale,
        },
        "evaluations_per_image": generated.evaluations,
        "images_per_second": 1 / generated.seconds,
        "measures": measure_images(generated.images, generated.labels, reference, extractor, classifier),
    }
    if validation_images and not pipeline.is_tuned:
        held_out = reference.validation.first(validation_images)
        # The schedulers of diffusers do not have the method for the training target.
        scheduler = AdaptiveEDMScheduler.from_config(pipeline.scheduler.config)
        errors = validation_loss(pipeline.transformer, scheduler, held_out, batch_size)
        record["measures"]["validation_loss"] = sum(errors.values()) / len(errors)
    if with_floors:
        record["floors"] = floors(reference, num_images, extractor, classifier)
    return record, generated
