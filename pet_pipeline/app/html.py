"""The results on the page, as HTML with the images inside it."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..pipeline_pet_classification import ClassificationEvidence
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import model_digests, save_image
from ..visualization import array_image, error_figure, evidence_map
from .tasks import Picture, Samples


if TYPE_CHECKING:
    from ..training.data import ImageSet


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
        f'<button type="button" data-event="select" data-index="{index}" title="{html.escape(caption)}">'
        f"{image_tag(image, f'Example {index + 1}, {caption}')}</button>"
        for index, (image, caption) in enumerate(examples)
    ]
    return f'Or one of these:<div class="pet-row">{"".join(buttons)}</div>'


def model_settings(pipeline: PetDiffusionPipeline) -> dict[str, str]:
    """Returns what the PNG of an image keeps about the model that drew the image."""
    return {
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        **model_digests(pipeline),
    }


def progress_html(text: str, done: int, total: int) -> str:
    """Returns how far a job is, in words and as a bar."""
    return (
        f'<p class="pet-progress">{html.escape(text)} <progress max="{total}" value="{done}"></progress></p>'
    )


def error_html(message: str) -> str:
    """Returns a message that says what is wrong."""
    return f'<p class="pet-error">{html.escape(message)}</p>'


def chosen_html(image: Image.Image, caption: str) -> str:
    """Returns the image that a visitor has chosen to edit or to classify."""
    return f'<div class="pet-grid">{figures_html({caption: image_tag(image, "The chosen image")})}</div>'


def samples_html(
    samples: Samples,
    actions: Sequence[str] = (),
    model: dict[str, str] | None = None,
    first: int = 0,
    has_strips: bool = True,
) -> str:
    """Returns the pictures of samples, after the original of an edit.

    Finished pictures have buttons that hand them over, and a link that downloads a PNG. A visitor chooses one
    of them to see how it came to be.

    Args:
        samples ([`Samples`]): the samples.
        actions (`Sequence[str]`): the events of the buttons, out of `"edit"` and `"classify"`.
        model (`dict[str, str]`, *optional*): see [`model_settings`]. The PNG of a picture keeps its settings
            and these. A picture that was edited cannot be drawn again from its settings, and keeps none.
        first (`int`): index of the first picture among those that the page shows.
        has_strips (`bool`): whether the page shows how the chosen picture came to be.
    """
    figures, strips = [], []
    edited = ""
    if samples.original is not None:
        figures.append(figures_html({"original": image_tag(samples.original, "The original")}))
        edited = "-edited"
    has_rows = len(samples.pictures) > len(samples.rows) > 1  # each class begins a row
    for number, picture in enumerate(samples.pictures):
        tag = image_tag(picture.image, str(picture))
        caption = html.escape(str(picture))
        if samples.is_finished:
            settings = None
            if model is not None and not edited:
                settings = {"class": picture.name, "seed": picture.seed, **asdict(samples.settings), **model}
            file_name = html.escape(f"{picture.name}-{picture.seed}{edited}.png")
            buttons = [
                f'<button type="button" data-event="{action}" data-index="{first + number}" '
                f'aria-label="{action.title()} {caption}">{action.title()}</button>'
                for action in actions
            ]
            buttons.append(
                f'<a href="{data_url(picture.image, settings)}" download="{file_name}" '
                f'aria-label="Download {file_name}">Download</a>'
            )
            caption += f'<div class="pet-actions">{"".join(buttons)}</div>'
            if has_strips:
                is_chosen = number == 0
                tag = (
                    f'<label><input type="radio" name="pet-chosen{edited}" value="{number}" '
                    f"{'checked' if is_chosen else ''}>{tag}</label>"
                )
                strips.append(strip_html(samples, number, is_chosen))
        if has_rows and number and picture.seed == samples.seed:
            figures.append('</div><div class="pet-grid">')
        figures.append(f"<figure>{tag}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="pet-grid">{"".join(figures)}</div>{"".join(strips)}'


def strip_html(samples: Samples, number: int, is_chosen: bool) -> str:
    """Returns how a picture came to be; `number` is its index among the pictures of `samples`."""
    text = (
        f"How {samples.pictures[number]} came to be, from the first step to the last: the noisy image above, "
        "and below it what the model makes of it"
    )
    tag = image_tag(samples.strips[number], text)
    return (
        f'<figure class="pet-strip" data-index="{number}" {"" if is_chosen else "hidden"}>'
        f"<figcaption>{html.escape(text)}.</figcaption>"
        f'<div class="pet-wide" tabindex="0">{tag}</div></figure>'
    )


def evidence_html(image: Image.Image, evidence: ClassificationEvidence, names: list[str]) -> str:
    """Returns figures that show why an image is classified as it is; `names` are the classes in id order."""
    best, second = evidence.labels
    pictures = {
        "What the model sees": image_tag(image, "The image as the model sees it", "pet-pixels"),
        f"Red speaks for {best}, blue for {second}": image_tag(
            evidence_map(evidence), f"Where the image speaks for {best} or {second}", "pet-pixels"
        ),
        "The smaller the error of its denoiser, the better a class explains the image": image_tag(
            error_figure(evidence, names), "Errors of each class by noise level", "pet-plot"
        ),
    }
    return f'<div class="pet-figures">{figures_html(pictures)}</div>'


def neighbors_html(pictures: list[Picture], train: "ImageSet") -> str:
    """Returns each picture beside the training images that are closest to it."""
    from ..evaluation.metrics import nearest_neighbors, pixel_distances
    from ..training.data import image_mode, image_to_tensor, to_model_range

    num_channels, size, _ = train.image_shape
    mode = image_mode(num_channels)
    tensors = [image_to_tensor(picture.image, size, mode) for picture in pictures]
    pixels = to_model_range(torch.stack(tensors))
    copies = nearest_neighbors(pixels, train).memorization_ratio() * len(pixels)
    parts = [pixel_distances(pixels, to_model_range(images)) for images, _ in train.batches()]
    closest = torch.cat(parts, 1).topk(min(NUM_NEIGHBORS, len(train)), largest=False)
    sections = [
        f"<p>Each sample was compared with {len(train):,} training images and their mirror images. Below "
        "each training image is its root-mean-square distance from the sample, with pixels from -1 to 1. "
        f"{copies:.0f} of the {len(pixels)} samples count as copies: the closest training image is three "
        "times closer than the next different one.</p>"
    ]
    for picture, distances, indices in zip(pictures, closest.values.tolist(), closest.indices):
        figures = {"sample": image_tag(picture.image, str(picture))}
        images = train.subset(indices).load().images
        for number, (distance, image) in enumerate(zip(distances, images), 1):
            text = f"training image {number} closest to {picture}"
            figures[f"{number}: {distance:.2f}"] = image_tag(array_image(image), text)
        sections.append(f'{html.escape(str(picture))}<div class="pet-row">{figures_html(figures)}</div>')
    return "".join(sections)
