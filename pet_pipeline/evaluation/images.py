"""Measures the quality of a pipeline's images against a data set: what `pet-pipeline evaluate` does."""

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
    frechet_distance,
    image_features,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
    validation_loss,
)
from .reference import Reference, balanced_subset


@dataclass
class GeneratedImages:
    """What [`generate_images`] returns.

    Args:
        images (`torch.Tensor` of shape `(N, 3, height, width)`, uint8): the pixels.
        labels (`torch.Tensor` of shape `(N,)`): the classes asked for.
        evaluations (`float`): evaluations of the denoiser per image; a guided step has two.
        seconds (`float`): seconds per image.
    """

    images: torch.Tensor
    labels: torch.Tensor
    evaluations: float
    seconds: float


def generate_images(
    pipeline: DiffusionPipeline, num_images: int, batch_size: int = 64, seed: int = 0, **kwargs: Any
) -> GeneratedImages:
    """Generates images of all classes in turn; each depends on its own seed alone, `seed` upwards.

    Args:
        pipeline ([`PetDiffusionPipeline`]): what to measure.
        num_images (`int`): images in all.
        batch_size (`int`, defaults to 64): images at once.
        seed (`int`, defaults to 0): of the first image.
        kwargs: passed to the pipeline.
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
    extractor: nn.Module,
    classifier: PetClassifier | None = None,
    cache: bool = False,
) -> dict[str, float]:
    """Compares images with as many real ones.

    Args:
        images (`torch.Tensor` of shape `(N, 3, height, width)`, uint8): what to judge.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): their classes.
        reference ([`Reference`]): the real images; its first N, as many of each class, are compared with.
        extractor (`nn.Module`): see [`image_features`].
        classifier ([`PetClassifier`], *optional*): judges whether an image is of its class.
        cache (`bool`, defaults to `False`): keep the features of `images` too; those of the reference are
            kept.

    Returns:
        `dict[str, float]`: `fd_…` and `kid_…` (… names the features), for more than 1,000 images also its
        deviation `kid_…_std`, `precision`, `recall`, `memorization_ratio`, `nearest_distance` (the median,
        RMS in [-1, 1]) and `class_accuracy`.
    """
    real = balanced_subset(reference.images, len(images))
    real_features = image_features(real.images, extractor, cache=True)
    features = image_features(images, extractor, cache=cache)
    neighbors = nearest_neighbors(to_model_range(images), to_model_range(reference.train.images))
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
    """Share of uint8 images `(N, 3, height, width)` that the classifier gives their label."""
    found = [classifier(to_model_range(batch)).argmax(1) for batch in images.split(250)]
    return (torch.cat(found) == labels).float().mean().item()


def load_classifier(names: list[str], resolution: int) -> PetClassifier | None:
    """Loads the classifier of the package if it knows these classes, in this order and size; else `None`."""
    config = PetClassifier.load_config(BUNDLED_CLASSIFIER)
    if config["class_names"] != list(names) or config["sample_size"] != resolution:
        return None
    return PetClassifier.from_pretrained(BUNDLED_CLASSIFIER, dtype=torch.float32)


def floors(
    reference: Reference, num_images: int, extractor: nn.Module, classifier: PetClassifier | None = None
) -> dict[str, dict[str, float]]:
    """Measures sets of images whose quality is known, for the scale of the numbers.

    Args:
        reference ([`Reference`]), extractor (`nn.Module`), classifier ([`PetClassifier`], *optional*): see
            [`measure_images`].
        num_images (`int`): images in each set, fewer where there are fewer.

    Returns:
        `dict[str, dict[str, float]]`: the measures of other training images (perfect, but each a copy), of
        unseen images (perfect; not where the reference is these), and of images of one colour, the mean of a
        real one (the composition is lost).
    """
    half = balanced_subset(
        reference.train, num_images, start=len(reference.train) // (2 * len(reference.train.class_names))
    )
    unseen = balanced_subset(reference.validation, num_images)
    colours = half.images.float().mean((2, 3), keepdim=True).round().byte().expand_as(half.images)
    sets = {
        "other training images": (half.images, half.labels),
        "unseen images": (unseen.images, unseen.labels),
        "mean colours of images": (colours, half.labels),
    }
    if reference.images is reference.validation:
        del sets["unseen images"]  # which would be compared with themselves
    return {
        name: measure_images(images, labels, reference, extractor, classifier, cache=True)
        for name, (images, labels) in sets.items()
    }


def neighbor_grid(images: torch.Tensor, reference: Reference, num_images: int = 12) -> Image.Image:
    """Draws the images that are closest to a copy, over the training images nearest to them.

    Args:
        images (`torch.Tensor` of shape `(N, 3, height, width)`, uint8): generated images.
        reference ([`Reference`]): holds the training images.
        num_images (`int`, defaults to 12): how many, the most suspicious first.
    """
    neighbors = nearest_neighbors(to_model_range(images), to_model_range(reference.train.images))
    ratios = neighbors.distances / neighbors.second_distances
    rows = ratios.argsort()[:num_images]
    pairs = images[rows], reference.train.images[neighbors.indices[rows]]
    return image_grid(
        [[array_image(image) for image in row] for row in pairs],
        ["generated", "nearest training image"],
        [f"{ratio:.2f}" for ratio in ratios[rows].tolist()],
        scale=2,
    )


def generated_grid(generated: GeneratedImages, names: list[str], num_images: int = 8) -> Image.Image:
    """Draws the first of the generated images, a row of `num_images` for each class."""
    rows = [generated.images[generated.labels == label][:num_images] for label in range(len(names))]
    return image_grid([[array_image(image) for image in row] for row in rows], names, scale=4)


def evaluate(
    pipeline: DiffusionPipeline,
    reference: Reference,
    extractor: nn.Module,
    num_images: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    validation_images: int = 512,
    with_floors: bool = False,
    **kwargs: Any,
) -> tuple[dict[str, Any], GeneratedImages]:
    """Generates images and measures them and the denoiser.

    Args:
        pipeline ([`PetDiffusionPipeline`]): what to measure.
        reference ([`Reference`]): the real images.
        extractor (`nn.Module`): see [`image_features`].
        num_images (`int`, defaults to 1000): generated and real images; no more than the reference has.
        batch_size (`int`, defaults to 64), seed (`int`, defaults to 0): see [`generate_images`].
        validation_images (`int`, defaults to 512): held-out images for the validation loss; 0 leaves it out.
        with_floors (`bool`, defaults to `False`): measure [`floors`] too.
        kwargs: passed to the pipeline.

    Returns:
        `tuple[dict, GeneratedImages]`: the record (settings, measures, floors, machine), ready for JSON, and
        the images.

    Raises:
        ValueError: if the reference has fewer images than `num_images`, as many of each class.
    """
    num_real_images = len(balanced_subset(reference.images, num_images))
    if num_images > num_real_images:
        raise ValueError(
            f"{num_images} generated images need as many real ones, as many of each class, but the reference "
            f"has {num_real_images}."
        )
    classifier = load_classifier(pipeline.class_names, pipeline.transformer.config.sample_size)
    generated = generate_images(pipeline, num_images, batch_size, seed, **kwargs)
    # A function, as a schedule of guidance may be, is told by its name.
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
            "pag_scale": getattr(pipeline, "pag_scale", 0.0),
        },
        "evaluations_per_image": generated.evaluations,
        "images_per_second": 1 / generated.seconds,
        "measures": measure_images(generated.images, generated.labels, reference, extractor, classifier),
    }
    if validation_images:
        held_out = reference.validation.subset(
            torch.arange(min(validation_images, len(reference.validation)))
        )
        # One of diffusers does not know the target of the training.
        scheduler = AdaptiveEDMScheduler.from_config(pipeline.scheduler.config)
        errors = validation_loss(pipeline.transformer, scheduler, held_out, batch_size)
        record["measures"]["validation_loss"] = sum(errors.values()) / len(errors)
    if with_floors:
        record["floors"] = floors(reference, num_images, extractor, classifier)
    return record, generated
