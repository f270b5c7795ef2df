"""Calibrates and measures the diffusion classifier, for `pet-pipeline calibrate` and `evaluate`."""

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..pipeline_pet_classification import BAND_RANGE, NUM_BANDS, PetClassificationPipeline
from ..training.data import ImageDataset


@dataclass
class ClassErrors:
    """What [`class_errors`] returns.

    Args:
        errors (`torch.Tensor` of shape `(N, classes, draws)`): mean squared error of the network's output.
        sigmas (`torch.Tensor` of shape `(draws,)`): noise levels, ascending.
    """

    errors: torch.Tensor
    sigmas: torch.Tensor


def class_errors(
    pipeline: PetClassificationPipeline,
    dataset: ImageDataset,
    num_evaluations: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> ClassErrors:
    """Measures the errors of every class on every image, without stopping early.

    Args:
        pipeline ([`PetClassificationPipeline`]): the classifier.
        dataset ([`ImageDataset`]): images of the model's size.
        num_evaluations (`int`, defaults to 32): evaluations for each class and image.
        batch_size (`int`, defaults to 64): evaluations at once.
        seed (`int`, defaults to 0): of the noise.
    """
    evidence = []
    with warnings.catch_warnings():
        # The errors do not depend on the weights, which may be about to be found.
        warnings.filterwarnings("ignore", "This pipeline is not calibrated")
        for images in tqdm(dataset.images.split(50), desc="images of 50", leave=False):
            evidence += pipeline(
                images,
                num_evaluations,
                adaptive=False,
                batch_size=batch_size,
                generator=torch.Generator().manual_seed(seed),
                return_evidence=True,
            ).evidence
    return ClassErrors(torch.stack([item.errors for item in evidence]), evidence[0].sigmas)


def fit_calibration(errors: ClassErrors, labels: torch.Tensor, penalty: float = 1e-3) -> dict[str, Any]:
    """Fits the weights of the bands of noise levels by logistic regression of the labels.

    The scores of the classes are their negative weighted errors; the weights, none negative, maximise the
    likelihood of the labels.

    Args:
        errors ([`ClassErrors`]): of images that the denoiser was not trained on.
        labels (`torch.Tensor` of shape `(N,)`): their classes.
        penalty (`float`, defaults to 1e-3): on the squares of the weights, in units of the errors' spread.

    Returns:
        `dict`: `{"weights": [...]}`, the `calibration` of the pipelines.

    Raises:
        ValueError: if a band has no draw, so that nothing tells its weight.
    """
    low, high = BAND_RANGE
    bands = ((errors.sigmas / low).log() / math.log(high / low) * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)
    if len(bands.unique()) < NUM_BANDS:
        raise ValueError(
            f"The noise levels drawn lie in {len(bands.unique())} of the {NUM_BANDS} bands; a calibration "
            f"needs all of them, which {2 * NUM_BANDS} evaluations for each class reach."
        )
    one_hot = F.one_hot(bands, NUM_BANDS).double() / len(bands)
    features = (
        errors.errors.double() @ one_hot
    )  # (N, classes, bands): their weighted sum is the mean over draws
    features = features - features.mean(1, keepdim=True)
    scale = features.std((0, 1)).clamp_min(1e-12)
    raw = torch.zeros(NUM_BANDS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights = F.softplus(raw)
        value = F.cross_entropy(-(features / scale) @ weights, labels) + penalty * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return {"weights": [round(weight, 4) for weight in (F.softplus(raw.detach()) / scale).tolist()]}


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(confidences: torch.Tensor, hits: torch.Tensor, num_bins: int = 10) -> float:
    """Returns the expected calibration error (Guo et al. 2017), over bins of equal numbers of images."""
    order = confidences.argsort(stable=True)
    total = 0.0
    for rows in order.tensor_split(num_bins):
        if len(rows):
            total += len(rows) * (confidences[rows].mean() - hits[rows].float().mean()).abs().item()
    return total / len(order)


def measure_classification(
    probabilities: torch.Tensor, labels: torch.Tensor, names: list[str]
) -> dict[str, Any]:
    """Measures predictions.

    Args:
        probabilities (`torch.Tensor` of shape `(N, classes)`): of each class.
        labels (`torch.Tensor` of shape `(N,)`): the true classes.
        names (`list[str]`): names of the classes.

    Returns:
        `dict`: `accuracy` with its 95 % interval, `recall` of each class that has images, `log_loss` in nats,
        `calibration_error`.
    """
    confidences, found = probabilities.max(1)
    hits = found == labels
    recall = {
        name: hits[labels == index].float().mean().item()
        for index, name in enumerate(names)
        if (labels == index).any()
    }
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return {
        "num_images": len(labels),
        "accuracy": hits.float().mean().item(),
        "accuracy_low": low,
        "accuracy_high": high,
        "recall": recall,
        "log_loss": F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item(),
        "calibration_error": calibration_error(confidences, hits),
    }


def evaluate_classification(
    pipeline: PetClassificationPipeline,
    dataset: ImageDataset,
    num_evaluations: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Classifies a data set as a user would and measures the answers.

    Args:
        pipeline ([`PetClassificationPipeline`]): the classifier.
        dataset ([`ImageDataset`]): images of its classes.
        num_evaluations (`int`, defaults to 32), batch_size (`int`, defaults to 64): see the pipeline.
        seed (`int`, defaults to 0): of the noise, drawn anew for every 50 images, so that no single draw
            decides; a calibration with the same seed was fitted on other noise.

    Returns:
        `tuple[dict, torch.Tensor]`: the measures, with `evaluations_per_image` and `images_per_second`, and
        the probabilities `(N, classes)`.
    """
    rows, evaluations = [], 0
    began = time.perf_counter()
    for number, images in enumerate(tqdm(dataset.images.split(50), desc="images of 50", leave=False)):
        generator = torch.Generator().manual_seed(seed + 1 + number)
        output = pipeline(images, num_evaluations, batch_size=batch_size, generator=generator)
        rows += [list(probabilities.values()) for probabilities in output.probabilities]
        evaluations += sum(output.num_evaluations)
    seconds = time.perf_counter() - began
    probabilities = torch.tensor(rows)
    measures = measure_classification(probabilities, dataset.labels, dataset.class_names)
    measures["evaluations_per_image"] = evaluations / len(dataset)
    measures["images_per_second"] = len(dataset) / seconds
    return measures, probabilities


def accuracy_curve(
    pipeline: PetClassificationPipeline,
    dataset: ImageDataset,
    num_evaluations: int = 32,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measures accuracy against evaluations for each class, with and without calibration.

    Args:
        pipeline ([`PetClassificationPipeline`]), dataset ([`ImageDataset`]), batch_size (`int`, defaults to
            64), seed (`int`, defaults to 0): see [`class_errors`].
        num_evaluations (`int`, defaults to 32): the most evaluations for each class.

    Returns:
        `list[dict]`: `weighting`, `num_evaluations` and `accuracy` of each point, without early stopping.
    """
    num_draws = num_evaluations // 2
    found = class_errors(pipeline, dataset, num_evaluations, batch_size, seed)
    order = draw_order(pipeline, num_draws, seed)
    errors, sigmas = found.errors[..., order], found.sigmas[order]  # in the order they were drawn
    points = []
    for weighting in ("calibrated", "uncalibrated") if pipeline.config.calibration else ("uncalibrated",):
        calibration = pipeline.config.calibration if weighting == "calibrated" else None
        weighted = errors * pipeline.band_weights(sigmas, calibration, dataset.images[0].numel())
        count = 1
        while count <= num_draws:
            hits = weighted[..., :count].mean(-1).argmin(1) == dataset.labels
            point = {"weighting": weighting, "num_evaluations": 2 * count}
            points.append(point | {"accuracy": hits.float().mean().item()})
            count *= 2
    return points


def draw_order(pipeline: PetClassificationPipeline, num_draws: int, seed: int) -> torch.Tensor:
    """Returns where each draw of a seed, in the order of drawing, stands among them by noise level."""
    sigmas = pipeline.draw_sigmas(num_draws, "calibrated", torch.Generator().manual_seed(seed))
    return sigmas.argsort().argsort()
