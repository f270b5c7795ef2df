"""The results on the page, as HTML with the images inside it."""

import base64
import html
import io
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

from ..pipeline_pet_classification import ClassificationEvidence
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import model_digests, save_image
from ..visualization import array_image, error_figure, evidence_map
from .tasks import Samples


NUM_NEIGHBORS = 4


def data_url(image: Image.Image, settings: dict[str, Any] | None = None) -> str:
    """Returns a PNG in a data URL; the PNG keeps `settings` if they are given."""
    buffer = io.BytesIO()
    if settings is None:
        image.save(buffer, format="PNG")
    else:
        save_image(image, buffer, settings)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_tag(image: Image.Image, text: str, css_class: str = "") -> str:
    """Returns an image element; `text` describes the image to people who do not see it."""
    return f'<img src="{data_url(image)}" alt="{html.escape(text)}" class="{css_class}">'


def figures_html(figures: dict[str, str]) -> str:
    """Returns figure elements; the keys are their captions, the values their images."""
    return "".join(
        f"<figure>{tag}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, tag in figures.items()
    )


def examples_html(examples: list[tuple[Image.Image, str]]) -> str:
    """Returns a button for each captioned image."""
    buttons = [
        f'<button type="button" data-index="{index}" title="{html.escape(caption)}">'
        f"{image_tag(image, f'Example {index + 1}, {caption}')}</button>"
        for index, (image, caption) in enumerate(examples)
    ]
    return f'Or one of these:<div class="pet-row pet-small">{"".join(buttons)}</div>'


def model_settings(pipeline: PetDiffusionPipeline) -> dict[str, str]:
    """Returns what the PNG of an image keeps about the model that drew the image."""
    return {
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        **model_digests(pipeline),
    }


def samples_html(samples: Samples, model: dict[str, str] | None = None) -> str:
    """Returns samples in one row for each class.

    If `model` is given (see [`model_settings`]), each image is a link that downloads a PNG with its settings.
    """
    parts = []
    for name, row in samples.rows.items():
        parts.append(f'<h3>{html.escape(name)}</h3><div class="pet-row">')
        for seed, image in enumerate(row, samples.seed):
            tag = image_tag(image, f"{name}, seed {seed}")
            if model is not None:
                settings = {"class": name, "seed": seed, **asdict(samples.settings), **model}
                file_name = html.escape(f"{name}-{seed}.png")
                tag = (
                    f'<a href="{data_url(image, settings)}" download="{file_name}" '
                    f'aria-label="Download {file_name}">{tag}</a>'
                )
            parts.append(tag)
        parts.append("</div>")
    return "".join(parts)


def evidence_html(image: Image.Image, evidence: ClassificationEvidence, names: list[str]) -> str:
    """Returns figures that show why an image is classified as it is; `names` are the classes in id order."""
    best, second = evidence.labels
    pictures = {
        "What the model sees": image_tag(image, "The image as the model sees it", "pet-pixels"),
        f"Red speaks for {best}, blue for {second}": image_tag(
            evidence_map(evidence), f"Where the image speaks for {best} or {second}", "pet-pixels"
        ),
        "The smaller the error of its denoiser, the better a class explains the image": image_tag(
            error_figure(evidence, names), "Errors of each class by noise level"
        ),
    }
    return f'<div class="pet-figures">{figures_html(pictures)}</div>'


def neighbors_html(samples: Samples, training_images: torch.Tensor) -> str:
    """Returns each sample beside the training images that are closest to it.

    The training images are uint8, of shape `(M, channels, height, width)`.
    """
    from ..evaluation.metrics import nearest_neighbors, pixel_distances
    from ..training.data import image_mode, image_to_tensor, to_model_range

    labels_and_images = [
        (f"{name}, seed {seed}", image)
        for name, row in samples.rows.items()
        for seed, image in enumerate(row, samples.seed)
    ]
    size, mode = training_images.shape[-1], image_mode(training_images.shape[1])
    tensors = [image_to_tensor(image, size, mode) for _, image in labels_and_images]
    pixels = to_model_range(torch.stack(tensors))
    known = to_model_range(training_images)
    copies = nearest_neighbors(pixels, known).memorization_ratio() * len(pixels)
    closest = pixel_distances(pixels, known).topk(min(NUM_NEIGHBORS, len(known)), largest=False)
    parts = [
        f"<p>Each sample was compared with {len(known):,} training images and their mirror images. Below "
        "each training image is its root-mean-square distance from the sample, with pixels from -1 to 1. "
        f"{copies:.0f} of the {len(pixels)} samples count as copies: the closest training image is three "
        "times closer than the next different one.</p>"
    ]
    for (label, image), distances, indices in zip(
        labels_and_images, closest.values.tolist(), closest.indices
    ):
        figures = {"sample": image_tag(image, label)}
        for number, (distance, index) in enumerate(zip(distances, indices), 1):
            text = f"training image {number} closest to {label}"
            figures[f"{number}: {distance:.2f}"] = image_tag(array_image(training_images[index]), text)
        parts.append(f'{html.escape(label)}<div class="pet-row pet-small">{figures_html(figures)}</div>')
    return "".join(parts)
