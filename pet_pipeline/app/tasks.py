"""What the model does for the page: it draws and classifies images in a thread that can be cancelled."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..guidance_pet import GUIDANCE_INTERVAL, guidance_weight
from ..pipeline_pet_classification import PetClassificationOutput, PetClassificationPipeline
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..pipeline_pet_loading import MAX_IMAGE_PIXELS
from ..sampling import SampleSettings, image_generators, scheduler_by_name
from ..visualization import DenoisingRecorder, array_image


if TYPE_CHECKING:
    from ..evaluation.reference import Reference

# What one request may ask for.
MAX_IMAGES = 16
MAX_EVALUATIONS = 256
MAX_SEED = 2**32 - 1
MIN_STRENGTH = 0.05
UPLOAD_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

# A classification can be cancelled between two batches.
CLASSIFIER_BATCH = 16
NUM_EXAMPLES = 8
MAX_STRIP_STEPS = 12


class Picture(NamedTuple):
    """An image that the model has drawn."""

    name: str  # of its class
    seed: int
    image: Image.Image

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Samples:
    """Images of a sampling, or the model's predictions of them at one of its steps."""

    rows: dict[str, list[Image.Image]]  # of each class
    seed: int  # of the first image of each class; the seeds of the next images count up
    settings: SampleSettings
    step: int  # number of steps that are done
    num_steps: int
    original: Image.Image | None = None  # the image that was edited
    # Only finished images have the following.
    seconds: float = 0.0
    evaluations: int = 0  # of the model, for each image
    strips: list[Image.Image] = field(default_factory=list)  # of each image, see [`denoising_strips`]

    @property
    def is_finished(self) -> bool:
        """Whether these are the images, and not predictions of them."""
        return bool(self.strips)

    @property
    def pictures(self) -> list[Picture]:
        """The images of all classes."""
        return [
            Picture(name, seed, image)
            for name, row in self.rows.items()
            for seed, image in enumerate(row, self.seed)
        ]


class Cancelled(Exception):
    """Raised in work whose result nobody waits for."""


def stream(
    work: Callable[[Callable[[Any], None]], Any], closed: threading.Event | None = None
) -> Iterator[Any]:
    """Runs `work` in a thread, and yields first what it reports and then what it returns.

    Closing the iterator ends the work: its next report raises [`Cancelled`]. Closing does not wait for the
    work, because Gradio closes iterators in its event loop. The thread belongs to an executor because Python
    waits for such threads when it exits, but does not wait for Gradio's own threads.

    The argument of `work` is the function `report`, which takes anything. Setting `closed` ends the work in
    the same way.
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


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises `ValueError` if `value` is not a number in [`low`, `high`]."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, but is {value!r}.")


# Drawing


def guidance_weights(sigmas: list[float], settings: SampleSettings) -> list[float]:
    """Returns the guidance weight of steps at noise levels σ; see [`with_saved_values`]."""
    scale = settings.guidance_scale
    assert scale is not None
    return [guidance_weight(sigma, scale, settings.guidance_schedule) for sigma in sigmas]


def with_saved_values(pipeline: PetDiffusionPipeline, settings: SampleSettings) -> SampleSettings:
    """Replaces the steps and the strengths that are `None` by those that are saved with the model."""
    config = pipeline.config
    saved = {
        "steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "pag_scale": config.pag_scale,
        "autoguidance_scale": 1.0 if pipeline.guide is None else config.autoguidance_scale,
    }
    return replace(settings, **{name: saved[name] for name in saved if getattr(settings, name) is None})


def num_evaluations(sigmas: list[float], weights: list[float], settings: SampleSettings) -> int:
    """Returns how often the denoiser is evaluated for one image.

    Each guidance of a step adds one evaluation, but with autoguidance, the guide replaces the denoiser.
    """
    low, high = GUIDANCE_INTERVAL
    perturbed = sum(bool(settings.pag_scale) and low <= sigma <= high for sigma in sigmas)
    is_autoguided = settings.autoguidance_scale not in (None, 1)
    guided = 0 if is_autoguided else sum(weight != 1 for weight in weights)
    return len(weights) + guided + perturbed


def check_request(pipeline: PetDiffusionPipeline, names: Any, number: Any, seed: Any) -> None:
    """Raises `ValueError` if the page cannot draw `number` images of the classes `names` from `seed` on."""
    if not names or not isinstance(names, list):
        raise ValueError("Choose at least one class.")
    known = pipeline.class_names
    for name in names:
        if name not in known:
            raise ValueError(f"There is no class {name!r}; the classes are {', '.join(known)}.")
    check_number("The number of images of each class", number, 1, MAX_IMAGES)
    if int(number) * len(names) > MAX_IMAGES:
        raise ValueError(
            f"{int(number)} images of {len(names)} classes are {int(number) * len(names)} images, but this "
            f"page draws at most {MAX_IMAGES} at once."
        )
    check_number("The seed", seed, 0, MAX_SEED)


def sample(
    pipeline: PetDiffusionPipeline,
    names: list[str],
    number: int,
    seed: int,
    settings: SampleSettings,
    report: Callable[[Samples], None] = lambda samples: None,
    image: Image.Image | None = None,
    strength: float | None = None,
) -> Samples:
    """Draws `number` images of each class, the same as `pet-pipeline generate` draws with these settings.

    With `image` and `strength`, edits the image as `pet-pipeline edit` does. `seed` is that of the first
    image of each class; the seeds of the next images count up. After each step, `report` is called with the
    predictions of the images. The pipeline is not changed. `ValueError` is raised if a class does not exist,
    or if the request is larger than the page allows.
    """
    check_request(pipeline, names, number, seed)
    if image is not None:
        check_number("The strength", strength, MIN_STRENGTH, 1)
    number, seed = int(number), int(seed)
    settings = with_saved_values(pipeline, settings)
    began = time.perf_counter()
    # Requests share the weights, but each needs its own scheduler, which keeps the state of a sampling.
    scheduler = scheduler_by_name(settings.scheduler, pipeline.scheduler)
    # A class without a name is called by its id on the page.
    id2label = dict(enumerate(pipeline.class_names))
    pipe = PetDiffusionPipeline(pipeline.transformer, scheduler, guide=pipeline.guide, id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    assert settings.steps is not None
    timesteps, first = pipe.prepare_timesteps(settings.steps, image=image, strength=strength)
    sigmas = scheduler.sigmas[first : first + len(timesteps)].tolist()
    weights = guidance_weights(sigmas, settings)
    config = pipe.transformer.config
    generators = [generator for _ in names for generator in image_generators(number, seed)]
    shape = (len(generators), config.in_channels, config.sample_size, config.sample_size)
    noise = randn_tensor(shape, generator=generators)
    sigma_data = scheduler.config.sigma_data
    start = noise
    if image is not None:
        start = (pipe.prepare_images(image) + sigmas[0] * noise) / (sigmas[0] ** 2 + sigma_data**2) ** 0.5
    recorder = DenoisingRecorder(start)

    def samples(images: list[Image.Image], **kwargs: Any) -> Samples:
        rows = {name: images[row * number : (row + 1) * number] for row, name in enumerate(names)}
        return Samples(rows, seed, settings, len(recorder.sigmas), len(weights), image, **kwargs)

    def record(pipe: PetDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        recorder(pipe, step, timestep, tensors)
        report(samples(pipe.image_processor.postprocess(recorder.denoised[-1], output_type="pil")))
        return {}

    images = pipe(
        names,
        **settings.call_arguments(pipe),
        num_images_per_prompt=number,
        generator=generators,
        latents=noise,
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
        image=image,
        strength=strength,
    ).images
    return samples(
        images,
        seconds=time.perf_counter() - began,
        evaluations=num_evaluations(sigmas, weights, settings),
        strips=denoising_strips(pipe, recorder),
    )


def denoising_strips(pipeline: PetDiffusionPipeline, recorder: DenoisingRecorder) -> list[Image.Image]:
    """Returns how each image came to be: some of its steps, noisy above and the model's prediction below."""
    last = len(recorder.denoised) - 1
    steps = torch.linspace(0, last, min(last + 1, MAX_STRIP_STEPS)).round().int().tolist()
    noisy = torch.stack([recorder.noisy[step] for step in steps]) * pipeline.scheduler.config.sigma_data
    denoised = torch.stack([recorder.denoised[step] for step in steps])
    both = torch.stack([noisy, denoised]).permute(2, 3, 0, 4, 1, 5)  # (N, channels, 2, height, steps, width)
    return pipeline.image_processor.postprocess(both.flatten(4).flatten(2, 3), output_type="pil")


# Classifying


def read_upload(path: Path) -> Image.Image:
    """Reads an uploaded image of a common format and a reasonable size, and removes the file.

    For other files, `ValueError` is raised, with a message that does not tell where the file was.
    """
    try:
        with Image.open(path, formats=UPLOAD_FORMATS) as image:
            is_small = image.width * image.height <= MAX_IMAGE_PIXELS
            if is_small:
                image.load()
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        raise ValueError(f"{path.name!r} is not an image in {', '.join(UPLOAD_FORMATS)} format.") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of them for damaged files
        reason = getattr(error, "strerror", None) or error  # the text of an `OSError` would tell the path
        raise ValueError(f"{path.name!r} cannot be read as an image: {reason}") from None
    finally:
        path.unlink(missing_ok=True)
    if not is_small:
        raise ValueError(
            f"{path.name!r} has {image.width}×{image.height} pixels, but this page takes images of at most "
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
    """Classifies an image, with evidence, by an even number of evaluations for each class.

    Before each batch, `report` is called with the number of evaluations that are done. The classifier is not
    changed. `ValueError` is raised if a number is out of its range.
    """
    check_number("The number of evaluations for each class", num_evaluations, 2, MAX_EVALUATIONS)
    check_number("The seed", seed, 0, MAX_SEED)
    evaluations = 0

    def pixel_errors(*args: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        report(evaluations)
        evaluations += 2 * len(args[-1])  # with +ε and with -ε
        return classifier.pixel_errors(*args)

    reporting = copy(classifier)
    reporting.pixel_errors = pixel_errors  # type: ignore[method-assign, assignment]
    return reporting(
        image,
        num_evaluations=int(num_evaluations),
        batch_size=CLASSIFIER_BATCH,
        generator=torch.Generator().manual_seed(int(seed)),
        return_evidence=True,
    )


def example_images(
    pipeline: PetDiffusionPipeline, reference: "Reference | None" = None
) -> list[tuple[Image.Image, str]]:
    """Returns captioned images to classify: unseen images of the data set, or else images of the model."""
    names = pipeline.class_names
    if reference is None:
        number = max(1, NUM_EXAMPLES // len(names))
        # A few steps are enough here, and the page waits for them.
        settings = SampleSettings(steps=None if pipeline.is_tuned else 8)
        drawn = sample(pipeline, names[:NUM_EXAMPLES], number, 0, settings).rows
        return [(image, f"drawn as {name}") for name, row in drawn.items() for image in row]
    from ..evaluation.reference import balanced_subset

    unseen = balanced_subset(reference.validation, NUM_EXAMPLES)
    return [
        (array_image(image), f"unseen {names[label]}") for image, label in zip(unseen.images, unseen.labels)
    ]
