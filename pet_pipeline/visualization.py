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
from .pipeline_pet_loading import eight_bit_image
from .sampling import generate, image_generators, seeds_by_class


MARGIN = 4


def image_grid(
    rows: list[list[Image.Image]],
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
    scale: int = 2,
) -> Image.Image:
    """Lays images of one size out in labelled rows, enlarged without blur."""
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
                eight_bit_image(image).resize((width, height), Image.Resampling.NEAREST),
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

    `seed` is that of the first image of each class. The seeds of the next images count up, so that the images
    of a column start from the same noise. The pipeline takes further arguments from `kwargs`.
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

    The callback needs the tensors `latents` and `pred_original_sample`. `noise` is the noise of unit variance
    from which the sampling starts, of shape `(N, channels, height, width)`.
    """

    def __init__(self, noise: torch.Tensor) -> None:
        self.sigmas: list[float] = []  # at the start of each step
        self.noisy = [noise.cpu()]  # at the start of each step, and last the samples, all of unit variance
        self.denoised: list[torch.Tensor] = []  # in each step

    def __call__(
        self,
        pipeline: PetDiffusionPipeline,
        step: int,
        timestep: torch.Tensor,
        tensors: dict[str, torch.Tensor],
    ) -> dict:
        """Records a step without changing it."""
        index = pipeline.scheduler.step_index - 1  # an edit does not begin at the first level
        sigma, next_sigma = pipeline.scheduler.sigmas[index : index + 2].tolist()
        scale = (next_sigma**2 + pipeline.scheduler.config.sigma_data**2) ** 0.5
        self.sigmas.append(sigma)
        self.noisy.append(tensors["latents"].cpu() / scale)
        self.denoised.append(tensors["pred_original_sample"].cpu())
        return {}

    def strip(
        self, pipeline: PetDiffusionPipeline, rows: Iterable[int], names: list[str], scale: int = 2
    ) -> Image.Image:
        """Draws the recorded images of some `rows` of the batch at each step; see [`denoising_strip`].

        `names` has the class of each of these images.
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

    Noisy images are shown at the contrast of the data. Each column is labelled with its noise level σ. All
    classes start from the same noise. `class_labels` are ids of classes; the default is every class.
    """
    names = pipeline.class_names
    class_labels = list(range(len(names))) if class_labels is None else class_labels
    names = [names[label] for label in class_labels]
    config = pipeline.transformer.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    generators = [image_generators(1, seed)[0] for _ in names]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    recorder = DenoisingRecorder(noise)
    pipeline(
        class_labels,
        latents=noise,
        generator=generators,  # of the noise that a solver adds
        callback_on_step_end=recorder,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        **kwargs,
    )
    return recorder.strip(pipeline, range(len(names)), names)


def compared_steps(pipeline: PetDiffusionPipeline) -> tuple[int, ...]:
    """Returns the numbers of steps that are worth a comparison, from few to more than enough."""
    if pipeline.is_tuned:
        return tuple(range(1, len(pipeline.scheduler.config.consistency_sigmas) + 2))
    return (5, 10, 20, 40)


def step_comparison(
    pipeline: PetDiffusionPipeline,
    steps: tuple[int, ...] | None = None,
    num_images: int = 4,
    seed: int = 0,
    class_labels: list[int] | None = None,
    **kwargs: Any,
) -> Image.Image:
    """Draws the same noise with different numbers of steps, one row for each number.

    `steps` are the numbers, by default those of [`compared_steps`]. A row has `num_images` of each class.
    `class_labels` are ids of classes; the default is every class.
    """
    names = pipeline.class_names
    class_labels = list(range(len(names))) if class_labels is None else class_labels
    rows = []
    steps = compared_steps(pipeline) if steps is None else steps
    for num_steps in steps:
        of_classes = _rows(pipeline, class_labels, num_images, seed, num_inference_steps=num_steps, **kwargs)
        rows.append([image for row in of_classes for image in row])
    columns = [names[label] for label in class_labels for _ in range(num_images)]
    labels = [f"{num_steps} step{'s' if num_steps > 1 else ''}" for num_steps in steps]
    return image_grid(rows, labels, columns)


def interpolation(
    pipeline: PetDiffusionPipeline,
    points: list[tuple[int, int]],
    num_frames: int = 16,
    batch_size: int = 64,
    **kwargs: Any,
) -> list[Image.Image]:
    """Draws a way from image to image, and back to the first.

    Between two points, the starting noise turns from one to the other (spherical interpolation, Shoemake
    1985), which keeps its variance, and the embedding of the class changes linearly. Solvers that add fresh
    noise add that of the first seed to all frames.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline; its model must take weights as `class_labels`, as
            [`PetTransformer2DModel`] does.
        points (`list[tuple[int, int]]`): class id and seed of each image.
        num_frames (`int`, defaults to 16): frames from one image to the next.
        batch_size (`int`, defaults to 64): number of frames that are drawn at once.
        kwargs: further arguments of the pipeline, see [`SampleSettings.call_arguments`].

    Returns:
        `list[Image.Image]`: `len(points) * num_frames` frames; the first of each `num_frames` is the image of
        a point.
    """
    config = pipeline.transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    labels, noises = [], []
    for (label, seed), (next_label, next_seed) in zip(points, points[1:] + points[:1]):
        start, end = (
            torch.randn(shape, generator=torch.Generator().manual_seed(number))
            for number in (seed, next_seed)
        )
        angle = torch.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1).acos()
        for frame in range(num_frames):
            share = frame / num_frames
            weights = torch.zeros(config.num_classes)
            weights[label] += 1 - share
            weights[next_label] += share
            labels.append(weights)
            if seed == next_seed:
                noises.append(start)
            else:
                turned = ((1 - share) * angle).sin() * start + (share * angle).sin() * end
                noises.append(turned / angle.sin())
    frames: list[Image.Image] = []
    for first in range(0, len(labels), batch_size):
        batch = slice(first, first + batch_size)
        generators = [torch.Generator().manual_seed(points[0][1]) for _ in labels[batch]]
        for generator in generators:
            torch.randn(shape, generator=generator)  # the noise of the steps follows the starting noise
        frames += pipeline(
            torch.stack(labels[batch]), latents=torch.stack(noises[batch]), generator=generators, **kwargs
        ).images
    return frames


def save_animation(frames: list[Image.Image], path: str | Path, duration: int = 80, scale: int = 6) -> None:
    """Saves frames as an endless animation, enlarged without blur.

    `path` ends in `.webp`, `.png` or `.gif`; a GIF reduces each frame to 256 colours. A frame is shown for
    `duration` milliseconds, and has a white border of 4 pixels.
    """
    large = [image_grid([[frame]], scale=scale) for frame in frames]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    large[0].save(path, save_all=True, append_images=large[1:], duration=duration, loop=0, lossless=True)


def loss_curves(metrics_path: str | Path) -> Image.Image:
    """Draws the losses of a training from its `metrics.jsonl`, by images seen and by noise level."""
    records = [json.loads(line) for line in Path(metrics_path).read_text().splitlines()]
    train = [record for record in records if "train/loss" in record]
    measure, label = "validation/loss", "validation (EMA weights)"
    if any("validation/teacher_distance" in record for record in records):
        measure, label = "validation/teacher_distance", "distance to the teacher (EMA weights)"
    validation = [record for record in records if measure in record]
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)

    train_images = [record["images"] for record in train]
    for key in train[-1] if train else []:
        if key.startswith("train/term_"):
            losses = [record[key] for record in train]
            left.plot(train_images, losses, linewidth=0.8, label=key.removeprefix("train/term_"))
    validation_images = [record["images"] for record in validation]
    losses = [record[measure] for record in validation]
    left.plot(validation_images, losses, color="black", marker=".", label=label)
    left.set(xlabel="images seen", ylabel="loss terms, network output space", yscale="log", title="losses")
    left.legend(fontsize=8)

    prefix = "validation/sigma_"
    for record in validation:
        losses_by_sigma = {
            float(key.removeprefix(prefix)): loss for key, loss in record.items() if key.startswith(prefix)
        }
        style = {"color": "0.75", "linewidth": 0.8}
        if record is validation[-1]:
            style = {"color": "black", "linewidth": 1.5, "label": f"after {record['images']:,} images"}
        right.plot(list(losses_by_sigma), list(losses_by_sigma.values()), **style)
    right.set(xlabel="σ", ylabel="validation loss", xscale="log", title="validation loss by noise level")
    if validation:
        right.legend(fontsize=8)
    return _drawn(figure)


def evidence_figure(
    images: list[Image.Image], evidence: list[ClassificationEvidence], names: list[str]
) -> Image.Image:
    """Draws why images were classified as they were, one row for each image.

    A row shows the image, then the pixels that speak for the best class (red) or for the second best (blue),
    and then how much the error of every other class exceeds that of the best class, by noise level. `names`
    are the names of the classes in the order of their ids.
    """
    figure = _figure(10, 2.6 * len(images))
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
    """Converts a uint8 tensor `(channels, height, width)` of 1, 3 or 4 channels to an image."""
    return Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def evidence_map(evidence: ClassificationEvidence) -> Image.Image:
    """Draws which pixels speak for the best class (red) and which for the second best (blue)."""
    from matplotlib import colormaps

    limit = evidence.difference.abs().max().item() or 1.0
    colors = colormaps["RdBu_r"]((evidence.difference.numpy() / limit + 1) / 2, bytes=True)
    return Image.fromarray(colors).convert("RGB")


def error_figure(evidence: ClassificationEvidence, names: list[str]) -> Image.Image:
    """Draws the error of each class by noise level, and by how much it exceeds that of the best class."""
    figure = _figure(4.2, 4.6, dpi=150)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, errors in zip(names, evidence.errors):
        top.plot(evidence.sigmas.numpy(), errors.numpy(), marker=".", label=name)
    top.set(title="error of each class")
    top.legend(fontsize=8)
    _draw_excess(bottom, evidence, names)
    return _drawn(figure)


def guidance_figure(sigmas: list[float], weights: list[float]) -> Image.Image:
    """Draws the guidance weight w(σ) of each step of a sampling, with the first step to the left."""
    figure = _figure(4.5, 2.2, dpi=150)
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

    `probabilities` has the shape `(N, classes)`, and `labels`, the true classes, has the shape `(N,)`. The
    bins hold equally many images.
    """
    confidences, found = probabilities.max(1)
    hits = (found == labels).float()
    bins = [rows for rows in confidences.argsort().tensor_split(num_bins) if len(rows)]
    means = [confidences[rows].mean().item() for rows in bins]
    shares = [hits[rows].mean().item() for rows in bins]
    errors = [(share * (1 - share) / len(rows)) ** 0.5 for share, rows in zip(shares, bins)]
    figure = _figure(4.5, 4)
    axis = figure.subplots()
    start = 1 / probabilities.shape[1]
    axis.plot([start, 1], [start, 1], color="0.7", linewidth=0.8)
    axis.errorbar(means, shares, yerr=errors, marker="o", capsize=2)
    axis.set(xlabel="confidence", ylabel="share that is right", title=f"{len(labels):,} images")
    return _drawn(figure)


def _figure(width: float, height: float, dpi: int = 100) -> Any:
    """Creates a matplotlib figure. Matplotlib is imported here only, since most pictures do not need it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _drawn(figure: Any) -> Image.Image:
    """Converts a matplotlib figure to an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
