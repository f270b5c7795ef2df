"""The web page of `pet-pipeline app`: make images, compare settings, tell classes apart, look for copies.

Images travel inside the page, as data URLs; on disk is only what a browser uploads, until it has been read.
"""

import asyncio
import base64
import html
import io
import ipaddress
import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import gradio as gr
import torch
from diffusers.utils.torch_utils import randn_tensor
from gradio import processing_utils
from gradio_client.utils import strip_invalid_filename_characters
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .pipeline_pet_classification import (
    MAX_IMAGE_PIXELS,
    ClassificationEvidence,
    PetClassificationOutput,
    PetClassificationPipeline,
)
from .pipeline_pet_diffusion import (
    GUIDANCE_INTERVAL,
    GUIDANCE_SCHEDULES,
    PetDiffusionPipeline,
    guidance_weight,
)
from .sampling import SCHEDULERS, image_generators, save_image, scheduler_by_name, weights_digest
from .visualization import (
    DenoisingRecorder,
    array_image,
    error_figure,
    evidence_map,
    guidance_figure,
)


if TYPE_CHECKING:
    from .evaluation.reference import Reference

# What one request may ask for, and how many requests and files may wait.
MAX_IMAGES = 16
MAX_STEPS = 100
MAX_GUIDANCE = 8
MAX_EVALUATIONS = 256
MAX_SEED = 2**32 - 1
MAX_QUEUE = 16
MAX_SESSIONS = 1000
MAX_VISITOR_JOBS = 4
LISTEN_SECONDS = 10.0
MAX_REQUEST_BYTES = 2**16
MAX_UPLOADS = 8
MAX_VISITOR_UPLOADS = 2
UPLOAD_SECONDS = 60.0
MAX_UPLOAD_BYTES = 5 * 2**20
UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# Of the classifier at once: as long as nobody can cancel it.
CLASSIFIER_BATCH = 16

COMPARED_STEPS = (5, 10, 20, 40)
NUM_EXAMPLES = 8
NUM_NEIGHBORS = 4
MAX_GUIDANCE_FIGURES = 128

# Choices that stand for `None`.
NO_CLASS = "no class"
AS_SAVED = "as saved"

# The parts of Gradio's interface that the page uses; the others stay closed.
USED_ROUTES = {"queue", "cancel", "reset", "heartbeat", "upload", "startup-events"}
# A Space is reached only through proxies in private networks, which tell the address of the visitor.
SPACE_PROXIES = "127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"

CSS = """
.pet-row { display: flex; flex-wrap: wrap; gap: 6px; margin: 4px 0 14px; }
.pet-row img { width: 96px; height: 96px; }
.pet-row img, .pet-pixels { image-rendering: pixelated; border-radius: 3px; }
.pet-row img, .pet-row figure, .pet-wide img, .pet-figures figure, .pet-figures img { margin: 0; }
.pet-row a, .pet-row button { padding: 0; background: none; line-height: 0; }
.pet-row a:focus-visible, .pet-row button:focus-visible { outline: 3px solid var(--color-accent); }
.pet-row figure { text-align: center; font-size: var(--text-sm); }
.pet-small img { width: 64px; height: 64px; }
.pet-columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(276px, 1fr)); gap: 8px 24px; }
.pet-columns .pet-row img { width: 64px; height: 64px; }
.pet-wide { overflow-x: auto; }
.pet-wide img { max-width: none; }
.pet-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 16px; }
.pet-figures img { width: 100%; max-width: 480px; }
.pet-figures .pet-pixels { max-width: 320px; }
@media (max-width: 500px) {
  .pet-row img { width: 70px; height: 70px; }
  .pet-small img { width: 48px; height: 48px; }
}
"""
# The component itself gets no role from Gradio, and no buttons inside it.
ANNOUNCED = "element.setAttribute('role', 'status')"
CHOOSING = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: Number(button.dataset.index) });
});
"""


@dataclass(frozen=True)
class Settings:
    """What steers a sampling.

    Args:
        steps (`int`, defaults to 18): denoising steps.
        guidance_scale (`float`, defaults to 2.5), guidance_schedule (`str`, defaults to `"adaptive"`): see
            [`guidance_weight`].
        pag_scale (`float`, defaults to 0.0): strength of the perturbed-attention guidance.
        negative_class (`str`, *optional*): class to steer away from, instead of from no class.
        scheduler (`str`, *optional*): see [`scheduler_by_name`].
    """

    steps: int = 18
    guidance_scale: float = 2.5
    guidance_schedule: str = "adaptive"
    pag_scale: float = 0.0
    negative_class: str | None = None
    scheduler: str | None = None

    @classmethod
    def from_inputs(
        cls,
        steps: float,
        guidance_scale: float,
        guidance_schedule: str,
        pag_scale: float,
        negative_class: str,
        scheduler: str,
    ) -> "Settings":
        """Returns the settings that the values of [`settings_inputs`] stand for.

        Raises:
            ValueError: if they are out of range.
        """
        check_number("The number of steps", steps, 1, MAX_STEPS)
        check_number("The guidance scale", guidance_scale, 0, MAX_GUIDANCE)
        check_number("The scale of perturbed attention", pag_scale, 0, MAX_GUIDANCE)
        return cls(
            int(steps),
            guidance_scale,
            guidance_schedule,
            pag_scale,
            None if negative_class == NO_CLASS else negative_class,
            None if scheduler == AS_SAVED else scheduler,
        )

    def __str__(self) -> str:
        parts = [f"{self.steps} steps", f"guidance {self.guidance_scale:g} ({self.guidance_schedule})"]
        if self.pag_scale != 0:
            parts.append(f"perturbed attention {self.pag_scale:g}")
        if self.negative_class is not None:
            parts.append(f"away from {self.negative_class}")
        if self.scheduler is not None:
            parts.append(self.scheduler)
        return ", ".join(parts)


@dataclass(frozen=True)
class Samples:
    """Images of a sampling, or what the model makes of them at one of its steps.

    Args:
        rows (`dict[str, list[Image.Image]]`): the images of each class.
        seed (`int`): of the first image of each class; the following ones count up.
        settings ([`Settings`]): what made them.
        step (`int`), num_steps (`int`): how far the sampling is.
        seconds (`float`, defaults to 0.0): how long it took.
        evaluations (`int`, defaults to 0): evaluations of the model for each image.
        strip (`Image.Image`, *optional*): how the first image of each class came to be.
    """

    rows: dict[str, list[Image.Image]]
    seed: int
    settings: Settings
    step: int
    num_steps: int
    seconds: float = 0.0
    evaluations: int = 0
    strip: Image.Image | None = None


class Cancelled(Exception):
    """Raised in work that nobody waits for any more."""


def stream(
    work: Callable[[Callable[[Any], None]], Any], closed: threading.Event | None = None
) -> Iterator[Any]:
    """Runs work in a thread, and yields what it reports and at last what it returns.

    Once the iterator is closed, the next report raises [`Cancelled`] in the work, which ends it. Closing does
    not wait for that, as Gradio does it in its event loop. Python waits for this thread when it exits, and
    not for those of Gradio.

    Args:
        work (callable): is given the function `report`, to be called with anything.
        closed (`threading.Event`, *optional*): ends the work as well, once it is set.
    """
    reports: queue.SimpleQueue = queue.SimpleQueue()
    cancelled, end = threading.Event(), object()

    def report(item: Any) -> None:
        if cancelled.is_set() or (closed is not None and closed.is_set()):
            raise Cancelled
        reports.put(item)

    executor = ThreadPoolExecutor(1)
    try:
        future = executor.submit(work, report)
        future.add_done_callback(lambda _: reports.put(end))
        yield from iter(reports.get, end)
        yield future.result()
    finally:
        cancelled.set()
        executor.shutdown(wait=False)


# Sampling


def guidance_weights(scheduler: Any, settings: Settings) -> tuple[list[float], list[float]]:
    """Returns the noise level σ of each step of a sampling, and the strength of its guidance."""
    scheduler.set_timesteps(settings.steps)
    num_steps = len(scheduler.timesteps)
    sigmas = scheduler.sigmas[:num_steps].tolist()
    weights = [
        guidance_weight(sigma, settings.guidance_scale, settings.guidance_schedule) for sigma in sigmas
    ]
    return sigmas, weights


def num_evaluations(sigmas: list[float], weights: list[float], pag_scale: float) -> int:
    """Returns how often the model is evaluated for an image: once more for each guidance of a step."""
    low, high = GUIDANCE_INTERVAL
    perturbed = sum(pag_scale != 0 and low <= sigma <= high for sigma in sigmas)
    return len(weights) + sum(weight != 1 for weight in weights) + perturbed


def check_number(name: str, value: float | None, low: float, high: float) -> None:
    """Raises `ValueError` if a number is missing or out of range."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} has to be from {low} to {high}, but is {value}.")


def sample(
    pipeline: PetDiffusionPipeline,
    names: list[str],
    number: int,
    seed: int,
    settings: Settings,
    report: Callable[[Samples], None] = lambda samples: None,
) -> Samples:
    """Makes images, the same as `pet-pipeline generate` makes of these settings.

    Args:
        pipeline ([`PetDiffusionPipeline`]): gives the weights; it is not changed.
        names (`list[str]`): the classes.
        number (`int`): images of each class, which start from the same noise.
        seed (`int`): of the first image of each class; the following ones count up.
        settings ([`Settings`]): what steers.
        report (callable, *optional*): called after each step.

    Raises:
        ValueError: if more is asked for than one request may, or something that is not there.
    """
    if not names:
        raise ValueError("Choose at least one class.")
    check_number("The number of images of each class", number, 1, MAX_IMAGES)
    number = int(number)
    if number * len(names) > MAX_IMAGES:
        raise ValueError(
            f"{number} images of {len(names)} classes are {number * len(names)}; this page makes up to "
            f"{MAX_IMAGES} at once."
        )
    check_number("The seed", seed, 0, MAX_SEED)
    began = time.perf_counter()
    # Requests share the weights, but a scheduler keeps the state of a sampling.
    scheduler = scheduler_by_name(settings.scheduler, pipeline.scheduler)
    sigmas, weights = guidance_weights(scheduler, settings)
    # With names also for the classes that have none.
    id2label = dict(enumerate(pipeline.class_names))
    pipe = PetDiffusionPipeline(pipeline.transformer, scheduler, id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    generators = [generator for _ in names for generator in image_generators(number, seed)]
    shape = (len(generators), config.in_channels, config.sample_size, config.sample_size)
    noise = randn_tensor(shape, generator=generators)
    recorder = DenoisingRecorder(noise)

    def samples(images: list[Image.Image], **kwargs: Any) -> Samples:
        rows = {name: images[row * number : (row + 1) * number] for row, name in enumerate(names)}
        return Samples(rows, seed, settings, len(recorder.sigmas), len(weights), **kwargs)

    def keep(pipe: PetDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        recorder(pipe, step, timestep, tensors)
        report(samples(pipe.image_processor.postprocess(recorder.denoised[-1], output_type="pil")))
        return {}

    images = pipe(
        names,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_schedule=settings.guidance_schedule,
        pag_scale=settings.pag_scale,
        negative_class_labels=settings.negative_class,
        num_images_per_prompt=number,
        generator=generators,
        latents=noise,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    ).images
    return samples(
        images,
        seconds=time.perf_counter() - began,
        evaluations=num_evaluations(sigmas, weights, settings.pag_scale),
        strip=recorder.strip(pipe, range(0, len(images), number), names, scale=1),
    )


# Classification


def read_upload(path: Path) -> Image.Image:
    """Reads an uploaded image of a common format and a reasonable size, and removes the file.

    Raises:
        ValueError: if it is something else; the message does not tell where the file was.
    """
    try:
        with Image.open(path, formats=UPLOAD_FORMATS) as image:
            is_small = image.width * image.height <= MAX_IMAGE_PIXELS
            if is_small:
                image.load()
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError(f"{path.name!r} is not an image in {', '.join(UPLOAD_FORMATS)} format.") from None
    except (OSError, SyntaxError, ValueError) as error:  # at its header already, where a file is cut off
        reason = getattr(error, "strerror", None) or error  # of the system's errors, without the path
        raise ValueError(f"{path.name!r} cannot be read as an image: {reason}") from None
    finally:
        path.unlink(missing_ok=True)
    if not is_small:
        raise ValueError(
            f"{path.name!r} has {image.width}×{image.height} pixels; this page takes images of up to "
            f"{MAX_IMAGE_PIXELS // 10**6} million pixels."
        )
    return image


def classify(
    classifier: PetClassificationPipeline,
    image: Image.Image,
    num_evaluations: int,
    seed: int,
    report: Callable[[int], None] = lambda evaluations: None,
) -> PetClassificationOutput:
    """Classifies an image, with evidence.

    Args:
        classifier ([`PetClassificationPipeline`]): what does it; it is not changed.
        image (`Image.Image`): the image.
        num_evaluations (`int`): evaluations for each class, an even number.
        seed (`int`): of the noise.
        report (callable, *optional*): called before each batch, with the number of evaluations so far.

    Raises:
        ValueError: if an argument is out of range.
    """
    check_number("The number of evaluations for each class", num_evaluations, 2, MAX_EVALUATIONS)
    check_number("The seed", seed, 0, MAX_SEED)
    num_evaluations, evaluations = int(num_evaluations), 0

    def pixel_errors(*args: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        report(evaluations)
        evaluations += 2 * len(args[-1])  # with +ε and with -ε
        return classifier.pixel_errors(*args)

    reporting = copy(classifier)
    reporting.pixel_errors = pixel_errors
    return reporting(
        image,
        num_evaluations=num_evaluations,
        batch_size=CLASSIFIER_BATCH,
        generator=torch.Generator().manual_seed(seed),
        return_evidence=True,
    )


def example_images(
    pipeline: PetDiffusionPipeline, reference: "Reference | None" = None
) -> list[tuple[Image.Image, str]]:
    """Returns images to try the classifier on, with captions: unseen ones, or else ones of the model."""
    names = pipeline.class_names
    if reference is None:
        number = max(1, NUM_EXAMPLES // len(names))
        # In few steps, as the page waits for them.
        drawn = sample(pipeline, names[:NUM_EXAMPLES], number, 0, Settings(steps=8)).rows
        return [(image, f"drawn as {name}") for name, row in drawn.items() for image in row]
    from .evaluation.reference import balanced_subset

    unseen = balanced_subset(reference.validation, NUM_EXAMPLES)
    return [
        (array_image(image), f"unseen {names[label]}") for image, label in zip(unseen.images, unseen.labels)
    ]


# HTML


def data_url(image: Image.Image, settings: dict[str, Any] | None = None) -> str:
    """Returns an image as a PNG in a data URL, which keeps `settings` if there are any."""
    buffer = io.BytesIO()
    if settings is None:
        image.save(buffer, format="PNG")
    else:
        save_image(image, buffer, settings)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_tag(image: Image.Image, text: str, css_class: str = "") -> str:
    """Returns an image for the page; `text` describes it to those who do not see it."""
    return f'<img src="{data_url(image)}" alt="{html.escape(text)}" class="{css_class}">'


def figures_html(figures: dict[str, str]) -> str:
    """Returns figures by their captions."""
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
    """Returns what an image keeps of the model that made it."""
    return {
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "weights": weights_digest(pipeline.transformer),
    }


def samples_html(samples: Samples, model: dict[str, str] | None = None) -> str:
    """Lays samples out, a row for each class.

    Args:
        samples ([`Samples`]): the images.
        model (`dict[str, str]`, *optional*): see [`model_settings`]. With it, each image can be downloaded,
            and keeps its settings.
    """
    parts = []
    for name, row in samples.rows.items():
        parts.append(f'<h3>{html.escape(name)}</h3><div class="pet-row">')
        for seed, image in enumerate(row, samples.seed):
            tag = image_tag(image, f"{name}, seed {seed}")
            if model is not None:
                kept = {"class": name, "seed": seed, **asdict(samples.settings), **model}
                file_name = html.escape(f"{name}-{seed}.png")
                tag = (
                    f'<a href="{data_url(image, kept)}" download="{file_name}" '
                    f'aria-label="Download {file_name}">{tag}</a>'
                )
            parts.append(tag)
        parts.append("</div>")
    return "".join(parts)


def evidence_html(image: Image.Image, evidence: ClassificationEvidence, names: list[str]) -> str:
    """Shows why an image is classified as it is; `names` are those of the classes, by id."""
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
    """Shows the training images closest to each sample.

    Args:
        samples ([`Samples`]): the images.
        training_images (`torch.Tensor` of shape `(M, 3, height, width)`, uint8): the images it is trained on.
    """
    from .evaluation.metrics import nearest_neighbors, pixel_distances
    from .training.data import image_to_tensor, to_model_range

    images = [image for row in samples.rows.values() for image in row]
    labels = [
        f"{name}, seed {samples.seed + index}"
        for name, row in samples.rows.items()
        for index in range(len(row))
    ]
    pixels = to_model_range(
        torch.stack([image_to_tensor(image, training_images.shape[-1]) for image in images])
    )
    known = to_model_range(training_images)
    copies = nearest_neighbors(pixels, known).memorization_ratio() * len(images)
    closest = pixel_distances(pixels, known).topk(min(NUM_NEIGHBORS, len(known)), largest=False)
    parts = [
        f"<p>{len(known):,} training images were searched, and their mirror images. Below each is its "
        "root-mean-square distance, with pixels from -1 to 1. "
        f"{copies:.0f} of the {len(images)} samples count as copies: three times closer to the first than to "
        "the next that is another image.</p>"
    ]
    for label, image, distances, rows in zip(labels, images, closest.values.tolist(), closest.indices):
        figures = {"sample": image_tag(image, label)}
        for number, (distance, row) in enumerate(zip(distances, rows), 1):
            text = f"training image {number} closest to {label}"
            figures[f"{number}: {distance:.2f}"] = image_tag(array_image(training_images[row]), text)
        parts.append(f'{html.escape(label)}<div class="pet-row pet-small">{figures_html(figures)}</div>')
    return "".join(parts)


# The page


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows what was wrong with a request in the page, and nothing of it in the log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def slider(*args: Any, **kwargs: Any) -> gr.Slider:
    """Creates a slider whose value comes as it is: Gradio's own check fails on an emptied field."""
    component = gr.Slider(*args, **kwargs)
    component.preprocess = lambda value: value
    return component


def settings_inputs(names: list[str], settings: Settings) -> list[gr.components.Component]:
    """Creates the inputs of [`Settings.from_inputs`]."""
    return [
        slider(1, MAX_STEPS, settings.steps, step=1, label="Steps"),
        slider(
            0,
            MAX_GUIDANCE,
            settings.guidance_scale,
            step=0.1,
            label="Guidance scale",
            info="1 is none of this kind",
        ),
        gr.Dropdown(list(GUIDANCE_SCHEDULES), value=settings.guidance_schedule, label="Guidance schedule"),
        slider(
            0,
            MAX_GUIDANCE,
            settings.pag_scale,
            step=0.1,
            label="Perturbed attention",
            info="0 is none; more makes clearer shapes",
        ),
        gr.Dropdown([NO_CLASS, *names], value=NO_CLASS, label="Negative class", info="to steer away from"),
        gr.Dropdown([AS_SAVED, *SCHEDULERS], value=AS_SAVED, label="Scheduler"),
    ]


def request_inputs(names: list[str]) -> list[gr.components.Component]:
    """Creates the inputs for classes, number of images, seed, and whether the seed is drawn."""
    return [
        gr.CheckboxGroup(names, value=names[:2], label="Classes"),
        slider(1, MAX_IMAGES // 2, 4, step=1, label="Images of each class"),
        gr.Number(0, label="Seed", precision=0),  # its range is checked with the request
        gr.Checkbox(True, label="Draw a new seed each time"),
    ]


def build_app(
    pipeline: PetDiffusionPipeline,
    reference: "Reference | None" = None,
    closed: threading.Event | None = None,
) -> gr.Blocks:
    """Builds the page; [`serve`] serves it.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the model.
        reference ([`Reference`], *optional*): its training images, in which the closest to a sample are
            looked for, and unseen ones, to classify.
        closed (`threading.Event`, *optional*): ends the work on all requests, once it is set.

    Raises:
        ValueError: if the pipeline's scheduler is not one of EDM, it has a guider, or the `pag_scale` saved
            with it is more than the page offers.
    """
    if not hasattr(pipeline.scheduler, "precondition_outputs"):
        raise ValueError(
            "The scheduler has to be one of EDM, as `AdaptiveEDMScheduler` is, but is of the class "
            f"{type(pipeline.scheduler).__name__}."
        )
    if pipeline.guider is not None:
        raise ValueError(
            f"The model has a guider, {type(pipeline.guider).__name__}, which the settings of the page would "
            "replace; save it without."
        )
    check_number("The saved `pag_scale`", pipeline.config.pag_scale, 0, MAX_GUIDANCE)
    names = pipeline.class_names
    suited = Settings(pag_scale=pipeline.config.pag_scale)
    model = model_settings(pipeline)
    classifier = PetClassificationPipeline.from_pipe(pipeline)
    classifier.set_progress_bar_config(disable=True)
    examples = example_images(pipeline, reference)

    @lru_cache(MAX_GUIDANCE_FIGURES)
    def guidance_html(settings: Settings) -> str:
        scheduler = scheduler_by_name(settings.scheduler, pipeline.scheduler)
        sigmas, weights = guidance_weights(scheduler, settings)
        text = f"Strength of the guidance at each step, from {min(weights):.3g} to {max(weights):.3g}"
        evaluations = num_evaluations(sigmas, weights, settings.pag_scale)
        caption = f"{evaluations} evaluations of the model for each image"
        figures = figures_html({caption: image_tag(guidance_figure(sigmas, weights), text)})
        return f'<div class="pet-figures">{figures}</div>'

    def draw_guidance(*values: Any) -> str:
        try:
            return guidance_html(Settings.from_inputs(*values))
        except ValueError as error:  # as long as a field is empty
            return f"<p>{html.escape(str(error))}</p>"

    def generate(chosen: list[str], number: int, seed: int, draw_seed: bool, *values: Any) -> Iterator[tuple]:
        seed = random.randrange(2**31) if draw_seed else seed
        with shown_errors():
            settings = Settings.from_inputs(*values)
            for samples in stream(partial(sample, pipeline, chosen, number, seed, settings), closed):
                if samples.strip is None:
                    heading = f"<p>Step {samples.step} of {samples.num_steps}</p>"
                    # Said once, as later it would stand in place of "Cancelled"; what belongs to the images
                    # before goes.
                    status, rest = ("Drawing …", "") if samples.step == 1 else (gr.skip(), gr.skip())
                    yield status, heading + samples_html(samples), seed, rest, rest
        count = sum(len(row) for row in samples.rows.values())
        status = (
            f"{count} images in {samples.seconds:.1f} s, {samples.evaluations} evaluations of the model for "
            "each. Click an image to download it; the PNG keeps its settings."
        )
        text = "The first image of each class at every step, noisy and denoised; above them the noise level"
        strip = f'<div class="pet-wide" tabindex="0">{image_tag(samples.strip, text)}</div>'
        yield status, samples_html(samples, model), seed, strip, gr.skip()
        if reference is not None:
            (found,) = stream(lambda report: neighbors_html(samples, reference.train.images), closed)
            yield *[gr.skip()] * 4, found

    def compare(
        chosen: list[str], number: int, seed: int, draw_seed: bool, compared: dict[str, Settings]
    ) -> Iterator[tuple]:
        seed = random.randrange(2**31) if draw_seed else seed
        finished, seconds = [], 0.0

        def shown(section: str) -> str:
            return f'<div class="pet-columns">{"".join(finished)}{section}</div>'

        for title, settings in compared.items():
            for samples in stream(partial(sample, pipeline, chosen, number, seed, settings), closed):
                final = samples.strip is not None
                about = f"{samples.evaluations} evaluations" if final else f"step {samples.step}"
                section = (
                    f"<section><h3>{html.escape(title)}</h3><p>{html.escape(str(settings))}; {about}</p>"
                    f"{samples_html(samples, model if final else None)}</section>"
                )
                first = samples.step == 1 and not finished
                yield "Drawing …" if first else gr.skip(), shown(section), seed
            finished.append(section)
            seconds += samples.seconds
        yield f"The same seeds, from {seed} on, in {seconds:.1f} s.", shown(""), seed

    def compare_two(
        chosen: list[str], number: int, seed: int, draw_seed: bool, *values: Any
    ) -> Iterator[tuple]:
        half = len(values) // 2
        with shown_errors():
            pair = {"A": Settings.from_inputs(*values[:half]), "B": Settings.from_inputs(*values[half:])}
            yield from compare(chosen, number, seed, draw_seed, pair)

    def compare_steps(
        chosen: list[str], number: int, seed: int, draw_seed: bool, *values: Any
    ) -> Iterator[tuple]:
        with shown_errors():
            settings = Settings.from_inputs(*values[: len(values) // 2])
            numbers = {f"{steps} steps": replace(settings, steps=steps) for steps in COMPARED_STEPS}
            yield from compare(chosen, number, seed, draw_seed, numbers)

    def take_upload(path: Path) -> tuple:
        with shown_errors():
            # The model's own size is all that is kept of it.
            pixels = classifier.prepare_image(read_upload(path), path.name)
        return classifier_image(pixels), None

    def classifier_image(pixels: torch.Tensor) -> Image.Image:
        return array_image((pixels * 127.5 + 127.5).round().byte())

    def take_example(event: gr.EventData) -> Image.Image:
        match event._data:
            case {"index": int(index)} if 0 <= index < len(examples):
                return examples[index][0]
        raise gr.Error("There is no such example.", print_exception=False)

    def explain(image: Image.Image | None, num_evaluations: float, seed: int) -> Iterator[tuple]:
        with shown_errors():
            if image is None:
                raise ValueError("Drop an image first, or choose one of the examples.")
            began = time.perf_counter()
            for found in stream(partial(classify, classifier, image, num_evaluations, seed), closed):
                if isinstance(found, int):
                    total = int(num_evaluations) * len(names)
                    status = "Comparing the classes …" if found == 0 else gr.skip()
                    yield status, None, f"<p>{found} of {total} evaluations</p>"
        (label,), (evidence,) = found.labels, found.evidence
        status = (
            f"{html.escape(label)}: {found.probabilities[0][label]:.1%}, after {found.num_evaluations[0]} "
            f"evaluations of the model in {time.perf_counter() - began:.1f} s."
        )
        yield status, found.probabilities[0], evidence_html(image, evidence, names)

    model_events: dict[str, Any] = {
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "api_visibility": "private",
    }
    # These wait in the queue as well, where their number is limited, but not for the model.
    light_events: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def cancel_on_click(button: gr.Button, status: gr.HTML, events: list[Any]) -> None:
        button.click(None, None, status, js="() => 'Cancelled.'", cancels=events, **light_events)

    with gr.Blocks(title="pet_pipeline", analytics_enabled=False) as page:
        size = pipeline.transformer.config.sample_size
        about = f"Images of {size}×{size} pixels by diffusion: {', '.join(names)}."
        # In Markdown a name could load an image.
        gr.HTML(f"<h1>pet_pipeline</h1><p>{html.escape(about)}</p>", padding=False)
        with gr.Tab("Generate"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                request = request_inputs(names)
                settings = settings_inputs(names, suited)
                curve = gr.HTML(draw_guidance(*(item.value for item in settings)), label="Guidance")
                with gr.Row():
                    start, cancel = gr.Button("Generate", variant="primary"), gr.Button("Cancel")
            with gr.Column(scale=3, min_width=300):
                status = gr.HTML(js_on_load=ANNOUNCED)
                grid = gr.HTML()
                strip = gr.HTML()
                with gr.Accordion("Closest training images", visible=reference is not None):
                    neighbors = gr.HTML("Generate images first.")
        outputs = [status, grid, request[2], strip, neighbors]
        event = start.click(generate, [*request, *settings], outputs, show_progress_on=status, **model_events)
        cancel_on_click(cancel, status, [event])
        for item in settings:
            item.change(draw_guidance, settings, curve, trigger_mode="always_last", **light_events)

        with gr.Tab("Compare"):
            with gr.Row():
                with gr.Column(min_width=250):
                    gr.Markdown("### Both")
                    request = request_inputs(names)
                with gr.Column(min_width=250):
                    gr.Markdown("### A")
                    first = settings_inputs(names, replace(suited, guidance_scale=1.0))
                with gr.Column(min_width=250):
                    gr.Markdown("### B")
                    second = settings_inputs(names, replace(suited, guidance_scale=3.0))
            with gr.Row():
                two = gr.Button("Compare A and B", variant="primary")
                steps = gr.Button("Compare 5, 10, 20 and 40 steps of A")
                cancel = gr.Button("Cancel")
            status, grid = gr.HTML(js_on_load=ANNOUNCED), gr.HTML()
        events = [
            button.click(
                function,
                [*request, *first, *second],
                [status, grid, request[2]],
                show_progress_on=status,
                **model_events,
            )
            for button, function in ((two, compare_two), (steps, compare_steps))
        ]
        cancel_on_click(cancel, status, events)

        with gr.Tab("Classify"), gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = gr.File(label="Image to classify", file_types=["image"], height=140)
                # Only its path goes to the function, which has to remove it; Gradio's own way leaves a file.
                upload.preprocess = lambda file: Path(file.path)
                choices = gr.HTML(examples_html(examples), js_on_load=CHOOSING)
                effort = slider(2, MAX_EVALUATIONS, 32, step=2, label="Evaluations for each class")
                seed = gr.Number(0, label="Seed of the noise", precision=0)
                with gr.Row():
                    again, cancel = gr.Button("Classify again"), gr.Button("Cancel")
            with gr.Column(scale=3, min_width=300):
                status = gr.HTML(js_on_load=ANNOUNCED)
                shares = gr.Label(label="Probabilities")
                why = gr.HTML()
        image = gr.State()
        inputs, outputs = [image, effort, seed], [status, shares, why]
        taken = [
            upload.upload(take_upload, upload, [image, upload], api_visibility="private"),
            choices.select(take_example, None, image, **light_events),
        ]
        events = [
            # An image that is chosen while another is classified is the next.
            trigger(
                explain, inputs, outputs, show_progress_on=status, trigger_mode="always_last", **model_events
            )
            for trigger in (*(choice.success for choice in taken), again.click)
        ]
        cancel_on_click(cancel, status, events)
    return page.queue(max_size=MAX_QUEUE, api_open=False)


def visitor_address(scope: Scope) -> str:
    """Returns the address of the visitor who sent a request, or the /64 network of an IPv6 address."""
    host = scope["client"][0]
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        if address.version == 6 and not address.ipv4_mapped:
            return str(ipaddress.ip_network((address.packed, 64), strict=False))
    return host


def limit_body(receive: Receive, max_bytes: int, seconds: float) -> Receive:
    """Returns a `receive` that raises `HTTPException` when a request's body is too long or takes too long."""
    num_bytes = 0
    ends_at = time.monotonic() + seconds

    async def limited_receive() -> Message:
        nonlocal num_bytes
        try:
            async with asyncio.timeout(ends_at - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"The request took longer than {seconds:.0f} s.") from None
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise HTTPException(413, f"The request is larger than {max_bytes} bytes.")
        return message

    return limited_receive


class Gate:
    """ASGI middleware in front of Gradio: it limits what each visitor may ask for.

    A visitor is known by the address of the request, as anybody can invent the hash of a session. Behind a
    proxy, this is the address that the proxy tells, provided that the environment variable
    `FORWARDED_ALLOW_IPS` names the proxy.

    Args:
        app (`ASGIApp`): Gradio.
        page (`gr.Blocks`): the page.
        folder (`Path`): where uploaded files wait until they are read.
    """

    def __init__(self, app: ASGIApp, page: gr.Blocks, folder: Path) -> None:
        self.app = app
        self.page = page
        self.folder = folder
        self.listening: list[str] = []  # sessions with an open stream of messages
        self.uploading: list[str] = []  # addresses with an upload in progress
        self.stored: dict[Path, None] = {}  # uploaded files, from the oldest to the newest
        self.tasks: set[asyncio.Task] = set()
        self.push_job, page._queue.push = page._queue.push, self.push

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _, is_api, route = scope.get("path", "").partition("/gradio_api/")
        if scope["type"] != "http" or not is_api:
            await self.app(scope, receive, send)
        elif route.split("/")[0] not in USED_ROUTES:
            await PlainTextResponse("This page does not have that.", 404)(scope, receive, send)
        elif route == "upload":
            await self.respond_to_upload(scope, receive, send)
        elif route == "queue/data":
            await self.listen(scope, receive, send)
        elif scope["method"] == "POST":
            await self.app(scope, limit_body(receive, MAX_REQUEST_BYTES, UPLOAD_SECONDS), send)
        else:
            await self.app(scope, receive, send)

    async def push(self, body: Any, request: Request, username: str | None) -> tuple[bool, Any, str]:
        """Puts a job in the queue, and drops it later if its visitor does not listen to it.

        Raises:
            HTTPException: if there is no such job, or the visitor has too many of them.
        """
        job = self.page.fns.get(body.fn_index)
        if job is None or job.fn is None or len(body.data) != len(job.inputs):
            raise HTTPException(400, "This page has no such job.")
        visitor = visitor_address(request.scope)
        events = self.page._queue.event_ids_to_events.values()
        if sum(visitor_address(event.request.scope) == visitor for event in events) >= MAX_VISITOR_JOBS:
            raise HTTPException(
                429, f"{MAX_VISITOR_JOBS} of your requests are waiting already. Wait until one is finished."
            )
        success, event_id, state = await self.push_job(body, request, username)
        if success:
            task = asyncio.create_task(self.drop_unheard(body.session_hash, event_id))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        return success, event_id, state

    async def drop_unheard(self, session: str, event_id: str) -> None:
        """Drops the jobs of a session that has not listened to one of them in time."""
        await asyncio.sleep(LISTEN_SECONDS)
        queue = self.page._queue
        undelivered = queue.pending_event_ids_session.get(session, ())
        if event_id in undelivered and session not in self.listening:
            await queue.clean_events(session_hash=session)
            queue.pending_event_ids_session.pop(session, None)
            queue.pending_messages_per_session.pop(session, None)

    async def listen(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a session listen to the messages about its jobs."""
        session = Request(scope).query_params.get("session_hash", "")
        self.listening.append(session)
        try:
            await self.app(scope, receive, send)
        finally:
            self.listening.remove(session)

    async def respond_to_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers an upload in place of Gradio, which would take any number of files at once."""
        visitor = visitor_address(scope)
        visitor_uploads = self.uploading.count(visitor)
        if visitor_uploads >= MAX_VISITOR_UPLOADS or len(self.uploading) >= MAX_UPLOADS:
            response = PlainTextResponse("Too many files are being uploaded. Try again.", 429)
            return await response(scope, receive, send)
        self.uploading.append(visitor)
        try:
            # The form around the file takes some bytes, too.
            limited = limit_body(receive, MAX_UPLOAD_BYTES + 2**12, UPLOAD_SECONDS)
            response = JSONResponse([await self.store_upload(Request(scope, limited))])
        except HTTPException as error:
            response = PlainTextResponse(error.detail, error.status_code)
        except ClientDisconnect:
            return
        finally:
            self.uploading.remove(visitor)
        await response(scope, receive, send)

    async def store_upload(self, request: Request) -> str:
        """Stores the file of an upload where Gradio looks for it, and returns its path.

        The file is removed when it has not been read for a while, or when many newer ones wait.
        """
        async with request.form(max_files=1, max_fields=0) as form:
            file = form.get("files")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "The upload has no file.")
            content = await file.read()
        if len(content) > MAX_UPLOAD_BYTES:
            raise HTTPException(413, f"The file is larger than {MAX_UPLOAD_BYTES} bytes.")
        name = strip_invalid_filename_characters(Path(file.filename or "").name).lstrip(".") or "image"
        path = Path(processing_utils.save_bytes_to_cache(content, name, str(self.folder)))
        self.stored.pop(path, None)
        self.stored[path] = None
        if len(self.stored) > MAX_UPLOADS:
            self.remove_upload(next(iter(self.stored)))
        asyncio.get_running_loop().call_later(UPLOAD_SECONDS, self.remove_upload, path)
        return str(path)

    def remove_upload(self, path: Path) -> None:
        """Removes an uploaded file, if it has not been read, and its folder."""
        self.stored.pop(path, None)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # another file in the folder
            path.parent.rmdir()


async def refuse_download(url: str, **kwargs: Any) -> str:
    """Stands in for Gradio's function that fetches `url` for a request."""
    raise gr.Error("This page fetches nothing from elsewhere.", print_exception=False)


def restore_variable(name: str, value: str | None) -> None:
    """Gives a variable of the environment its value of before."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def serve(
    pipeline: PetDiffusionPipeline,
    reference: "Reference | None" = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
) -> Iterator[str]:
    """Serves the page while the context is open, and gives its address; then nothing of it is left on disk.

    Args:
        pipeline ([`PetDiffusionPipeline`]), reference ([`Reference`], *optional*): see [`build_app`].
        host (`str`, defaults to `"127.0.0.1"`): address to listen on; `"0.0.0.0"` is reached from elsewhere.
        port (`int`, *optional*): the first free one from 7860 on if not given.
        share (`bool`, defaults to `False`): ask Gradio for a public address, through its servers.

    Raises:
        OSError: if the port is taken.
        ValueError: see [`build_app`].
    """
    with TemporaryDirectory(prefix="pet-pipeline-") as folder, ExitStack() as restored:
        variables = {"GRADIO_TEMP_DIR": folder}
        if "SPACE_ID" in os.environ:
            variables["FORWARDED_ALLOW_IPS"] = os.environ.get("FORWARDED_ALLOW_IPS", SPACE_PROXIES)
        for name in variables:
            restored.callback(restore_variable, name, os.environ.get(name))
        os.environ.update(variables)
        # Gradio would fetch any address that a visitor sends in place of a file.
        download = processing_utils.async_ssrf_protected_download
        restored.callback(setattr, processing_utils, "async_ssrf_protected_download", download)
        processing_utils.async_ssrf_protected_download = refuse_download
        closed = threading.Event()
        page = build_app(pipeline, reference, closed)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                app_kwargs={"middleware": [Middleware(Gate, page=page, folder=Path(folder))]},
                state_session_capacity=MAX_SESSIONS,
                max_file_size=MAX_UPLOAD_BYTES,
                theme=gr.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css=CSS,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
            )
            yield url
        finally:
            closed.set()
            page.close(verbose=False)


def launch(*args: Any, **kwargs: Any) -> None:
    """Serves the page until the process is interrupted or terminated; see [`serve`]."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the folder of uploads would stay
    with serve(*args, **kwargs) as url:
        print(f"The page is at {url} (Ctrl-C ends it).", flush=True)
        threading.Event().wait()
