"""Pictures: grids of samples, denoising strips, curves of a training, and evidence of classifications."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .pipeline_pet_classification import ClassificationEvidence
from .pipeline_pet_diffusion import PetDiffusionPipeline
from .sampling import generate, image_generators, seeds_by_class


MARGIN = 4


def image_grid(
    rows: list[list[Image.Image]],
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
    scale: int = 2,
) -> Image.Image:
    """Lays images out in labelled rows, enlarged without blur.

    Args:
        rows (`list[list[Image.Image]]`): images of one size.
        row_labels (`list[str]`, *optional*): written to the left of each row.
        column_labels (`list[str]`, *optional*): written above each column.
        scale (`int`, defaults to 2): factor by which the images are enlarged.
    """
    font = ImageFont.load_default(12)
    width, height = (side * scale for side in rows[0][0].size)
    left = MARGIN + max((int(font.getlength(label)) + MARGIN for label in row_labels or []), default=0)
    top = MARGIN + (16 if column_labels else 0)
    num_columns = max(len(row) for row in rows)
    grid = Image.new(
        "RGB",
        (left + num_columns * (width + MARGIN), top + len(rows) * (height + MARGIN)),
        color=(255, 255, 255),
    )
    draw = ImageDraw.Draw(grid)
    for r, row in enumerate(rows):
        y = top + r * (height + MARGIN)
        if row_labels:
            draw.text((MARGIN, y + height / 2), row_labels[r], fill=(0, 0, 0), font=font, anchor="lm")
        for c, image in enumerate(row):
            grid.paste(
                image.convert("RGB").resize((width, height), Image.Resampling.NEAREST),
                (left + c * (width + MARGIN), y),
            )
    widest = max((font.getlength(label) for label in column_labels or []), default=0)
    if widest > width:  # neighbouring labels must not touch, and the last one must not be cut off
        font = ImageFont.load_default(12 * width / widest)
    for c, label in enumerate(column_labels or []):
        draw.text(
            (left + c * (width + MARGIN) + width / 2, MARGIN), label, fill=(0, 0, 0), font=font, anchor="mt"
        )
    return grid


def sample_grid(
    pipeline: PetDiffusionPipeline, num_images: int = 8, seed: int = 0, **kwargs: Any
) -> Image.Image:
    """Draws `num_images` of every class, one labelled row for each class.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline that draws.
        num_images (`int`, defaults to 8): number of images per class.
        seed (`int`, defaults to 0): seed of the first image of each class; the seeds of the next images count
            up, so that the images of a column start from the same noise.
        kwargs: further arguments of the pipeline.
    """
    names = pipeline.class_names
    return image_grid(_rows(pipeline, list(range(len(names))), num_images, seed, **kwargs), names)


def _rows(
    pipeline: PetDiffusionPipeline, label_ids: list[int], num_images: int, seed: int, **kwargs: Any
) -> list[list[Image.Image]]:
    """Draws a row of images for each class id."""
    drawn = generate(pipeline, seeds_by_class(label_ids, num_images, seed), **kwargs)
    images = [image for _, _, image in drawn]
    return [images[start : start + num_images] for start in range(0, len(images), num_images)]


class DenoisingRecorder:
    """A callback for `callback_on_step_end` that records every step of a sampling.

    It needs the tensors `latents` and `pred_original_sample`.

    Args:
        noise (`torch.Tensor` of shape `(N, channels, height, width)`): the noise of unit variance from which
            the sampling starts.

    Attributes:
        sigmas (`list[float]`): the noise level of each step.
        noisy (`list[torch.Tensor]`): the noisy images at the start of each step, and last the samples, all
            scaled to unit variance.
        denoised (`list[torch.Tensor]`): the denoised images of each step.
    """

    def __init__(self, noise: torch.Tensor) -> None:
        self.sigmas: list[float] = []
        self.noisy = [noise.cpu()]
        self.denoised: list[torch.Tensor] = []

    def __call__(
        self,
        pipeline: PetDiffusionPipeline,
        step: int,
        timestep: torch.Tensor,
        tensors: dict[str, torch.Tensor],
    ) -> dict:
        """Records a step without changing it."""
        sigma, next_sigma = pipeline.scheduler.sigmas[step : step + 2].tolist()
        scale = (next_sigma**2 + pipeline.scheduler.config.sigma_data**2) ** 0.5
        self.sigmas.append(sigma)
        self.noisy.append(tensors["latents"].cpu() / scale)
        self.denoised.append(tensors["pred_original_sample"].cpu())
        return {}

    def strip(
        self, pipeline: PetDiffusionPipeline, rows: Iterable[int], names: list[str], scale: int = 2
    ) -> Image.Image:
        """Draws some of the recorded images at each step; see [`denoising_strip`].

        Args:
            pipeline ([`PetDiffusionPipeline`]): the pipeline that was recorded.
            rows (`Iterable[int]`): indices of the images in their batch.
            names (`list[str]`): the class of each of these images.
            scale (`int`, defaults to 2): factor by which the images are enlarged.
        """
        sigma_data = pipeline.scheduler.config.sigma_data
        pictures = []
        for row in rows:
            for tensors in ([tensor * sigma_data for tensor in self.noisy[:-1]], self.denoised):
                frames = torch.stack([tensor[row] for tensor in tensors])
                pictures.append(pipeline.image_processor.postprocess(frames, output_type="pil"))
        labels = [label for name in names for label in (f"{name}, noisy", f"{name}, denoised")]
        return image_grid(pictures, labels, [f"{sigma:.2g}" for sigma in self.sigmas], scale)


def denoising_strip(
    pipeline: PetDiffusionPipeline, seed: int = 0, class_labels: list[int] | None = None, **kwargs: Any
) -> Image.Image:
    """Draws one sample of each class step by step: a row of noisy images over a row of denoised images.

    Noisy images are shown at the contrast of the data. Each column is labelled with its noise level σ.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline that draws.
        seed (`int`, defaults to 0): seed of the noise from which all classes start.
        class_labels (`list[int]`, *optional*): ids of the classes; the default is every class.
        kwargs: further arguments of the pipeline.
    """
    names = pipeline.class_names
    class_labels = list(range(len(names))) if class_labels is None else class_labels
    names = [names[label] for label in class_labels]
    config = pipeline.transformer.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=image_generators(1, seed)[0]).repeat(len(names), 1, 1, 1)
    recorder = DenoisingRecorder(noise)
    pipeline(
        class_labels,
        latents=noise,
        callback_on_step_end=recorder,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        **kwargs,
    )
    return recorder.strip(pipeline, range(len(names)), names)


def step_comparison(
    pipeline: PetDiffusionPipeline,
    steps: tuple[int, ...] = (5, 10, 20, 40),
    num_images: int = 4,
    seed: int = 0,
    class_labels: list[int] | None = None,
    **kwargs: Any,
) -> Image.Image:
    """Draws the same noise with different numbers of steps, one row for each number.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline that draws.
        steps (`tuple[int, ...]`, defaults to `(5, 10, 20, 40)`): numbers of steps.
        num_images (`int`, defaults to 4): number of images per class.
        seed (`int`, defaults to 0): seed of the first image of each class.
        class_labels (`list[int]`, *optional*): ids of the classes; the default is every class.
        kwargs: further arguments of the pipeline.
    """
    names = pipeline.class_names
    class_labels = list(range(len(names))) if class_labels is None else class_labels
    rows = []
    for num_steps in steps:
        of_classes = _rows(pipeline, class_labels, num_images, seed, num_inference_steps=num_steps, **kwargs)
        rows.append([image for row in of_classes for image in row])
    columns = [names[label] for label in class_labels for _ in range(num_images)]
    return image_grid(rows, [f"{num_steps} steps" for num_steps in steps], columns)


def loss_curves(metrics_path: str | Path) -> Image.Image:
    """Draws the losses of a training, by images seen and by noise level.

    Args:
        metrics_path (`str` or `Path`): the file `metrics.jsonl` of the training.
    """
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in Path(metrics_path).read_text().splitlines()]
    train = [record for record in records if "train/loss" in record]
    validation = [record for record in records if "validation/loss" in record]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    terms = [key for key in (train[-1] if train else {}) if key.startswith("train/term_")]
    for key in terms:
        values = [record[key] for record in train]
        left.plot(
            [record["images"] for record in train],
            values,
            linewidth=0.8,
            label=key.removeprefix("train/term_"),
        )
    left.plot(
        [record["images"] for record in validation],
        [record["validation/loss"] for record in validation],
        color="black",
        marker=".",
        label="validation (EMA weights)",
    )
    left.set(xlabel="images seen", ylabel="loss terms, network output space", yscale="log", title="losses")
    left.legend(fontsize=8)
    for record in validation:
        bands = {
            float(key.removeprefix("validation/sigma_")): value
            for key, value in record.items()
            if key.startswith("validation/sigma_")
        }
        last = record is validation[-1]
        right.plot(
            list(bands),
            list(bands.values()),
            color="black" if last else "0.75",
            linewidth=1.5 if last else 0.8,
            label=f"after {record['images']:,} images" if last else None,
        )
    right.set(xlabel="σ", ylabel="validation loss", xscale="log", title="validation loss by noise level")
    if validation:
        right.legend(fontsize=8)
    return _drawn(figure)


def evidence_figure(
    images: list[Image.Image], evidence: list[ClassificationEvidence], names: list[str]
) -> Image.Image:
    """Draws why images were classified as they were, one row for each image.

    A row shows the image, then the pixels that speak for the best class (red) or for the second best (blue),
    and then how much the error of every other class exceeds that of the best class, by noise level.

    Args:
        images (`list[Image.Image]`): the images, of any size.
        evidence (`list[ClassificationEvidence]`): the evidence of each image, as
            [`PetClassificationPipeline`] returns it.
        names (`list[str]`): names of the classes, in the order of their ids.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 3, squeeze=False, width_ratios=(1, 1, 2))
    for (left, middle, right), image, item in zip(axes, images, evidence):
        best, second = item.labels
        left.imshow(image.convert("RGB"))
        left.set(title=best)
        middle.imshow(evidence_map(item))
        middle.set(title=f"red: {best}, blue: {second}")
        for axis in (left, middle):
            axis.set_axis_off()
        _draw_excess(right, item, names)
    return _drawn(figure)


def array_image(image: torch.Tensor) -> Image.Image:
    """Converts a uint8 tensor `(channels, height, width)` of one or three channels to an image."""
    return Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def evidence_map(evidence: ClassificationEvidence) -> Image.Image:
    """Draws which pixels speak for the best class (red) and which for the second best (blue)."""
    from matplotlib import colormaps

    limit = evidence.difference.abs().max().item() or 1.0
    colors = colormaps["RdBu_r"]((evidence.difference.numpy() / limit + 1) / 2, bytes=True)
    return Image.fromarray(colors).convert("RGB")


def error_figure(evidence: ClassificationEvidence, names: list[str]) -> Image.Image:
    """Draws the error of each class by noise level, and by how much it exceeds that of the best class.

    Args:
        evidence (`ClassificationEvidence`): the evidence of one image.
        names (`list[str]`): names of the classes, in the order of their ids.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, errors in zip(names, evidence.errors):
        top.plot(evidence.sigmas.numpy(), errors.numpy(), marker=".", label=name)
    top.set(title="error of each class")
    top.legend(fontsize=8)
    _draw_excess(bottom, evidence, names)
    return _drawn(figure)


def guidance_figure(sigmas: list[float], weights: list[float]) -> Image.Image:
    """Draws the guidance weight w(σ) of each step of a sampling, with the first step to the left.

    Args:
        sigmas (`list[float]`): noise level of each step.
        weights (`list[float]`): w(σ) of each step; 1 means no guidance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 2.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.axhline(1, color="0.7", linewidth=0.8)
    axis.plot(sigmas, weights, marker=".")
    axis.set(xscale="log", xlabel="noise level σ", ylabel="guidance w(σ)")
    axis.invert_xaxis()
    return _drawn(figure)


def _draw_excess(axis: Any, evidence: ClassificationEvidence, names: list[str]) -> None:
    """Draws by how much the error of every other class exceeds that of the best class."""
    best = evidence.labels[0]
    for name, errors in zip(names, evidence.errors):
        if name != best:
            excess = (errors - evidence.errors[names.index(best)]).numpy()
            axis.plot(evidence.sigmas.numpy(), excess, marker=".", label=f"{name} less {best}")
    axis.axhline(0, color="0.7", linewidth=0.8)
    axis.set(xscale="log", xlabel="σ", title="error of the other class less that of the best")
    axis.legend(fontsize=8)


def reliability_diagram(probabilities: torch.Tensor, labels: torch.Tensor, num_bins: int = 10) -> Image.Image:
    """Draws the accuracy of answers by their confidence. On the diagonal, the two are equal.

    Args:
        probabilities (`torch.Tensor` of shape `(N, classes)`): probability of each class.
        labels (`torch.Tensor` of shape `(N,)`): the true classes.
        num_bins (`int`, defaults to 10): number of bins, which hold equally many images.
    """
    from matplotlib.figure import Figure

    confidences, found = probabilities.max(1)
    hits = (found == labels).float()
    bins = [rows for rows in confidences.argsort().tensor_split(num_bins) if len(rows)]
    means = [confidences[rows].mean().item() for rows in bins]
    shares = [hits[rows].mean().item() for rows in bins]
    errors = [(share * (1 - share) / len(rows)) ** 0.5 for share, rows in zip(shares, bins)]
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots()
    start = 1 / probabilities.shape[1]
    axis.plot([start, 1], [start, 1], color="0.7", linewidth=0.8)
    axis.errorbar(means, shares, yerr=errors, marker="o", capsize=2)
    axis.set(xlabel="confidence", ylabel="share that is right", title=f"{len(labels):,} images")
    return _drawn(figure)


def _drawn(figure: Any) -> Image.Image:
    """Converts a matplotlib figure to an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
