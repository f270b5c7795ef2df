"""Calibrates and measures the diffusion classifier, for `pet-pipeline calibrate` and `evaluate`."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..pipeline_pet_classification import (
    NUM_BANDS,
    ClassificationEvidence,
    PetClassificationPipeline,
    noise_bands,
    pool_tokens,
)
from ..probe_pet import PetLinearProbe
from ..training.data import ImageDataset, ImageSet
from .reference import balanced_subset


# The block is chosen by fits to a part of the images at the last of these noise levels.
PROBE_SIGMAS = (0.1, 0.3)
PROBE_PENALTIES = (1e-3, 1e-2, 1e-1)
PROBE_SEARCH_IMAGES = 2000
MAX_PROBE_IMAGES = 10_000


@dataclass
class ClassErrors:
    """The output of [`class_errors`].

    Args:
        errors (`torch.Tensor` of shape `(N, classes, draws)`): mean squared errors of the network's output.
        sigmas (`torch.Tensor` of shape `(draws,)`): noise levels in ascending order.
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
    """Measures the errors of every class on every image, without early stopping.

    Args:
        pipeline ([`PetClassificationPipeline`]): the classifier.
        dataset ([`ImageDataset`]): images of the model's size.
        num_evaluations (`int`, defaults to 32): evaluations for each class and image.
        batch_size (`int`, defaults to 64): number of evaluations at once.
        seed (`int`, defaults to 0): random seed of the noise.
    """
    evidence: list[ClassificationEvidence] = []
    with warnings.catch_warnings():
        # The errors do not depend on the calibration, which may be about to be fitted.
        warnings.filterwarnings("ignore", "This pipeline is not calibrated")
        for images in tqdm(dataset.images.split(50), desc="images of 50", leave=False):
            output: Any = pipeline(
                images,
                num_evaluations,
                adaptive=False,
                batch_size=batch_size,
                generator=torch.Generator().manual_seed(seed),
                return_evidence=True,
                method="denoising",
            )
            evidence += output.evidence
    return ClassErrors(torch.stack([item.errors for item in evidence]), evidence[0].sigmas)


def fit_calibration(errors: ClassErrors, labels: torch.Tensor, penalty: float = 1e-3) -> dict[str, Any]:
    """Fits a weight for each band of noise levels by logistic regression of the labels.

    The score of a class is its negative weighted error. The fit finds the non-negative weights that maximise
    the likelihood of the labels.

    Args:
        errors ([`ClassErrors`]): the errors on images that the denoiser was not trained on.
        labels (`torch.Tensor` of shape `(N,)`): the classes of these images.
        penalty (`float`, defaults to 1e-3): strength of the penalty on the squares of the weights, after each
            score is scaled to unit standard deviation.

    Returns:
        `dict`: `{"weights": [...]}`, which is the `calibration` of the pipelines.

    Raises:
        ValueError: if a band has no noise level, because its weight could not be determined.
    """
    bands = noise_bands(errors.sigmas)
    if len(bands.unique()) < NUM_BANDS:
        raise ValueError(
            f"A calibration needs noise levels in all {NUM_BANDS} bands, but they lie in only "
            f"{len(bands.unique())} of them. Use at least {2 * NUM_BANDS} evaluations for each class."
        )
    one_hot = F.one_hot(bands, NUM_BANDS).double() / len(bands)
    # The weighted sum of these features over the bands is the weighted mean over the draws.
    features = errors.errors.double() @ one_hot  # (N, classes, bands)
    return {"weights": fit_weights(-features, labels, penalty)}


def fit_weights(scores: torch.Tensor, labels: torch.Tensor, penalty: float = 1e-3) -> list[float]:
    """Finds the non-negative weights of several scores that maximise the likelihood of the labels.

    Args:
        scores (`torch.Tensor` of shape `(N, classes, scores)`): scores of every class, of which only
            differences between classes count.
        labels (`torch.Tensor` of shape `(N,)`): the true classes.
        penalty (`float`, defaults to 1e-3): see [`fit_calibration`].
    """
    scores = scores.double() - scores.double().mean(1, keepdim=True)
    scale = scores.std((0, 1)).clamp_min(1e-12)
    raw = torch.zeros(scores.shape[2], dtype=torch.float64, requires_grad=True)
    minimize(
        [raw],
        lambda: (
            F.cross_entropy((scores / scale) @ F.softplus(raw), labels)
            + penalty * F.softplus(raw).square().sum()
        ),
    )
    return [round(weight, 4) for weight in (F.softplus(raw.detach()) / scale).tolist()]


def minimize(parameters: list[torch.Tensor], function: Callable[[], torch.Tensor]) -> None:
    """Minimises a smooth convex function of the parameters in place."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = function()
        value.backward()
        return value

    optimizer.step(closure)


def dataset_features(
    pipeline: PetClassificationPipeline,
    dataset: ImageDataset,
    layer: int,
    sigmas: Sequence[float],
    batch_size: int = 64,
) -> torch.Tensor:
    """Returns [`PetClassificationPipeline.image_features`] of a data set."""
    parts = tqdm(dataset.images.split(50), desc="images of 50", leave=False)
    return torch.cat(
        [
            pipeline.image_features(pipeline.prepare_images(images), layer, sigmas, batch_size)
            for images in parts
        ]
    )


def block_features(
    pipeline: PetClassificationPipeline, dataset: ImageDataset, sigma: float, batch_size: int = 64
) -> list[torch.Tensor]:
    """Returns the [`dataset_features`] of every block at one noise level, by one evaluation of all blocks."""
    blocks = pipeline.transformer.transformer_blocks
    found: list[list[torch.Tensor]] = [[] for _ in blocks]
    hooks = [
        block.register_forward_hook(
            lambda module, args, output, parts=parts: parts.append(pool_tokens(output).cpu())
        )
        for block, parts in zip(blocks, found)
    ]
    try:
        dataset_features(pipeline, dataset, len(blocks) - 1, [sigma], batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in found]


def fit_linear(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fits a multinomial logistic regression.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): the inputs, which are standardised for the fit.
        labels (`torch.Tensor` of shape `(N,)`): the classes.
        num_classes (`int`): number of classes.
        penalty (`float`): strength of the penalty on the squares of the weights of standardised inputs.

    Returns:
        `tuple`: the weights `(classes, D)` and the biases `(classes,)` for the inputs as they are.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    minimize(
        [weight, bias],
        lambda: F.cross_entropy(inputs @ weight.T + bias, labels) + penalty * weight.square().sum(),
    )
    weight, bias = weight.detach() / std, bias.detach()
    return weight, bias - weight @ mean


def fit_probe(
    pipeline: PetClassificationPipeline,
    train: ImageSet,
    validation: ImageDataset,
    batch_size: int = 64,
) -> tuple[PetLinearProbe, torch.Tensor]:
    """Fits a probe to training images, and chooses its block and its penalty by held-out images.

    The held-out images also set the scale of the log-odds, because the denoiser knows the training images.

    Args:
        pipeline ([`PetClassificationPipeline`]): the denoiser.
        train ([`ImageSet`]): images that the denoiser was trained on.
        validation ([`ImageDataset`]): images that it was not trained on.
        batch_size (`int`, defaults to 64): number of evaluations at once.

    Returns:
        `tuple[PetLinearProbe, torch.Tensor]`: the probe, and its log-odds of the held-out images.
    """
    num_classes = pipeline.null_class_id

    def fitted(
        features: torch.Tensor, labels: torch.Tensor, unseen: torch.Tensor
    ) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the loss on the held-out images, weights, biases, and the log-odds of the images."""
        candidates = []
        for penalty in PROBE_PENALTIES:
            weight, bias = fit_linear(features, labels, num_classes, penalty)
            scores = unseen @ weight.T + bias
            (scale,) = fit_weights(scores[..., None], validation.labels)
            loss = F.cross_entropy(scale * scores, validation.labels).item()
            candidates.append((loss, scale * weight, scale * bias, scale * scores))
        return min(candidates, key=lambda candidate: candidate[0])

    few, many = (balanced_subset(train, number) for number in (PROBE_SEARCH_IMAGES, MAX_PROBE_IMAGES))
    blocks = zip(
        *(block_features(pipeline, each, PROBE_SIGMAS[-1], batch_size) for each in (few, validation))
    )
    losses = [fitted(features, few.labels, unseen)[0] for features, unseen in blocks]
    layer = losses.index(min(losses))
    features, unseen = (
        dataset_features(pipeline, each, layer, PROBE_SIGMAS, batch_size) for each in (many, validation)
    )
    _, weight, bias, scores = fitted(features, many.labels, unseen)
    token_dim = features.shape[1] // (2 * len(PROBE_SIGMAS))
    probe = PetLinearProbe(num_classes, token_dim, layer, list(PROBE_SIGMAS))
    probe.linear.weight.data, probe.linear.bias.data = weight, bias
    return probe.requires_grad_(False).eval().to(pipeline._execution_device), scores


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of the share `successes` / `trials` (Wilson 1927)."""
    z, share = 1.96, successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(confidences: torch.Tensor, hits: torch.Tensor, num_bins: int = 10) -> float:
    """Returns the expected calibration error (Guo et al. 2017) over bins with equal numbers of images.

    Args:
        confidences (`torch.Tensor` of shape `(N,)`): the probability of each predicted class.
        hits (`torch.Tensor` of shape `(N,)`): whether each prediction is right.
        num_bins (`int`, defaults to 10): number of bins.
    """
    order = confidences.argsort(stable=True)
    total = 0.0
    for rows in order.tensor_split(num_bins):
        if len(rows):
            total += len(rows) * (confidences[rows].mean() - hits[rows].float().mean()).abs().item()
    return total / len(order)


def measure_classification(
    probabilities: torch.Tensor, labels: torch.Tensor, names: list[str]
) -> dict[str, Any]:
    """Measures the quality of predicted probabilities.

    Args:
        probabilities (`torch.Tensor` of shape `(N, classes)`): the predicted probability of each class.
        labels (`torch.Tensor` of shape `(N,)`): the true classes.
        names (`list[str]`): the names of the classes.

    Returns:
        `dict`: `accuracy` with its 95 % interval from `accuracy_low` to `accuracy_high`, `recall` of each
        class that has images, `log_loss` in nats, and `calibration_error`.
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
    method: str | None = None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Classifies a data set with the default settings, early stopping included, and measures the answers.

    Args:
        pipeline ([`PetClassificationPipeline`]): the classifier.
        dataset ([`ImageDataset`]): images of the classes of the classifier.
        num_evaluations (`int`, defaults to 32), batch_size (`int`, defaults to 64), method (`str`,
            *optional*): see [`PetClassificationPipeline.__call__`].
        seed (`int`, defaults to 0): random seed of the noise. Every 50 images have new noise, so that the
            result does not depend on a single draw, and a calibration with the same seed used other noise.

    Returns:
        `tuple[dict, torch.Tensor]`: the measures of [`measure_classification`] with `evaluations_per_image`
        and `images_per_second`, and the probabilities `(N, classes)`.
    """
    rows, evaluations = [], 0
    began = time.perf_counter()
    for number, images in enumerate(tqdm(dataset.images.split(50), desc="images of 50", leave=False)):
        generator = torch.Generator().manual_seed(seed + 1 + number)
        output: Any = pipeline(
            images, num_evaluations, batch_size=batch_size, generator=generator, method=method
        )
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
    """Measures how the accuracy grows with the number of evaluations, with and without calibration.

    Args:
        pipeline ([`PetClassificationPipeline`]), dataset ([`ImageDataset`]), batch_size (`int`, defaults to
            64), seed (`int`, defaults to 0): see [`class_errors`].
        num_evaluations (`int`, defaults to 32): the largest number of evaluations for each class.

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
    """Returns, for each draw of a seed in the order of drawing, its rank among the noise levels."""
    sigmas = pipeline.draw_sigmas(num_draws, "calibrated", torch.Generator().manual_seed(seed))
    return sigmas.argsort().argsort()
