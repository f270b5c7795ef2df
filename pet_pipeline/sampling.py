"""How images are sampled: the settings of a sampling, and one way to draw images from their seeds.

The command line and the web page create their inputs from the fields of [`SampleSettings`], and a PNG file
keeps their values. A new setting is therefore added to `PetDiffusionPipeline.__call__` and here, and reaches
everything else by itself. Importing this module does not load PyTorch.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .guidance_pet import GUIDANCE_SCHEDULES


if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin
    from PIL import Image
    from torch import nn

    from .pipeline_pet_diffusion import PetDiffusionPipeline

SOLVERS = ("multistep", "euler", "heun")
SCHEDULERS = (*SOLVERS, "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")

MAX_SEED = 2**63 - 1  # PyTorch takes twice as many, so that seeds can count up from here
PNG_KEY = "pet_pipeline"


# Settings


@dataclass(frozen=True)
class Option:
    """Describes one field of [`SampleSettings`] to the command line and to the web page.

    Args:
        label (`str`): the name that the web page shows.
        help (`str`): a phrase that explains the option and stands alone.
        argument (`str`, *optional*): the argument of [`PetDiffusionPipeline.__call__`] that takes the value.
        low (`float`), high (`float`): the range of a number.
        slider (`tuple[float, float, float]`, *optional*): lowest value, highest value and step on the page.
        choices (`tuple[str, ...]`): the allowed values of a text; if there are none, the model's classes are
            the choices.
        none_label (`str`, *optional*): what the page shows as the choice that stands for `None`.
    """

    label: str
    help: str
    argument: str | None = None
    low: float = -math.inf
    high: float = math.inf
    slider: tuple[float, float, float] | None = None
    choices: tuple[str, ...] = ()
    none_label: str | None = None


def _setting(default: Any, **kwargs: Any) -> Any:
    return field(default=default, metadata={"option": Option(**kwargs)})


@dataclass(frozen=True)
class SampleSettings:
    """The settings of a sampling, apart from its classes and seeds.

    Args:
        steps (`int`, *optional*): denoising steps, from 1 to 1000; `None` means the number that is saved with
            the model.
        guidance_scale (`float`, *optional*): strength of classifier-free guidance; `None` means the strength
            that is saved with the model.
        guidance_schedule (`str`, defaults to `"adaptive"`): one of [`GUIDANCE_SCHEDULES`].
        pag_scale (`float`, *optional*): strength of perturbed-attention guidance, in [-100, 100]; `None`
            means the strength that is saved with the model.
        autoguidance_scale (`float`, *optional*): strength of autoguidance, in [-100, 100]; `None` means the
            strength that is saved with the model.
        negative_class (`str`, *optional*): name of the class that guidance steers away from; `None` means the
            null class.
        scheduler (`str`, *optional*): one of [`SCHEDULERS`]; `None` means the scheduler that is saved with
            the model.

    Raises:
        ValueError: if a number is out of its range or a choice does not exist.
    """

    steps: int | None = _setting(
        None,
        label="Steps",
        help="number of denoising steps; the number that is saved with the model is the default",
        argument="num_inference_steps",
        low=1,
        high=1000,
        slider=(1, 100, 1),
    )
    guidance_scale: float | None = _setting(
        None,
        label="Guidance scale",
        help="strength of classifier-free guidance, which makes the class clearer; 1 turns it off, and the "
        "strength that is saved with the model is the default",
        argument="guidance_scale",
        slider=(0, 8, 0.1),
    )
    guidance_schedule: str = _setting(
        "adaptive",
        label="Guidance schedule",
        help="how the strength of the guidance varies with the noise level",
        argument="guidance_schedule",
        choices=GUIDANCE_SCHEDULES,
    )
    pag_scale: float | None = _setting(
        None,
        label="Perturbed attention",
        help="strength of perturbed-attention guidance, which makes shapes clearer; 0 turns it off, and the "
        "strength that is saved with the model is the default",
        argument="pag_scale",
        low=-100,
        high=100,
        slider=(0, 8, 0.1),
    )
    autoguidance_scale: float | None = _setting(
        None,
        label="Autoguidance",
        help="strength of the guidance by the model's guide, which makes images clearer; 1 turns it off, and "
        "the strength that is saved with the model is the default",
        argument="autoguidance_scale",
        low=-100,
        high=100,
        slider=(0, 4, 0.05),
    )
    negative_class: str | None = _setting(
        None,
        label="Negative class",
        help="class to steer away from; the default is to steer away from the average of all classes",
        argument="negative_class_labels",
        none_label="no class",
    )
    scheduler: str | None = _setting(
        None,
        label="Scheduler",
        help="solver of the model's own scheduler, or scheduler of diffusers; the default is the scheduler "
        "that is saved with the model",
        choices=SCHEDULERS,
        none_label="as saved",
    )

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            if self.number_type(name) is not None:
                if not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")
                if not option.low <= value <= option.high:
                    raise ValueError(f"`{name}` must be in [{option.low}, {option.high}], but is {value}.")
            elif option.choices and value not in option.choices:
                raise ValueError(f"`{name}` must be one of {', '.join(option.choices)}, but is {value!r}.")

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Returns the description of every setting, by the name of its field."""
        return {item.name: item.metadata["option"] for item in fields(cls)}

    @classmethod
    def number_type(cls, name: str) -> type | None:
        """Returns `int` or `float` for a setting that is a number, and `None` for a text."""
        annotation = cls.__dataclass_fields__[name].type
        return next((kind for kind in (int, float) if annotation in (kind, kind | None)), None)

    def call_arguments(self, pipeline: "PetDiffusionPipeline") -> dict[str, Any]:
        """Returns the keyword arguments of a call of `pipeline` with these settings.

        Raises:
            ValueError: if the pipeline does not know the negative class.
        """
        arguments = {
            option.argument: getattr(self, name) for name, option in self.options().items() if option.argument
        }
        if self.negative_class is not None:
            arguments["negative_class_labels"] = label_ids(pipeline, [self.negative_class])
        return arguments

    def __str__(self) -> str:
        values = {option.label.lower(): getattr(self, name) for name, option in self.options().items()}
        return ", ".join(f"{label} {value}" for label, value in values.items() if value is not None)


def label_ids(pipeline: "PetDiffusionPipeline", names: list[str]) -> list[int]:
    """Returns the ids of classes that a person named; digits are an id unless a class has that name.

    Raises:
        ValueError: if there is no such class.
    """
    known = pipeline.id2label.values()
    return pipeline.get_label_ids(
        [int(name) if name.isdecimal() and name not in known else name for name in names]
    )


def scheduler_by_name(name: str | None, scheduler: "SchedulerMixin") -> "SchedulerMixin":
    """Returns a new scheduler that has the configuration of another one, but shares no state with it.

    Args:
        name (`str`, *optional*): one of [`SCHEDULERS`], which are solvers of [`AdaptiveEDMScheduler`] and
            schedulers of diffusers; `None` for the class and solver of `scheduler`.
        scheduler (`SchedulerMixin`): the scheduler that gives the configuration.

    Raises:
        ValueError: if there is no scheduler of that name.
    """
    import diffusers

    from .scheduling_adaptive_edm import AdaptiveEDMScheduler

    if name is None:
        return type(scheduler).from_config(scheduler.config)
    if name in SOLVERS:
        churn = {"s_churn": 0.0} if name == "multistep" else {}  # this solver cannot use churn
        return AdaptiveEDMScheduler.from_config(scheduler.config, solver=name, **churn)
    if name not in SCHEDULERS:
        raise ValueError(f"The scheduler must be one of {', '.join(SCHEDULERS)}, but is {name!r}.")
    return getattr(diffusers, name).from_config(scheduler.config)


# Drawing


def image_generators(num_images: int, seed: int = 0) -> list["torch.Generator"]:
    """Returns one random generator for each image, with the seeds `seed`, `seed` + 1, and so on."""
    import torch

    return [torch.Generator().manual_seed(seed + index) for index in range(num_images)]


def seeds_by_class(labels: Iterable[int], num_images: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Yields `(class id, seed)` for `num_images` images of each class; every class has the same seeds."""
    return ((label, seed + index) for label in labels for index in range(num_images))


def generate(
    pipeline: "PetDiffusionPipeline",
    labels_and_seeds: Iterable[tuple[int, int]],
    batch_size: int = 64,
    **kwargs: Any,
) -> Iterator[tuple[int, int, Any]]:
    """Draws images in batches; each image depends on its own class and seed, and on nothing else.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline that draws.
        labels_and_seeds (`Iterable[tuple[int, int]]`): class id and seed of each image, see
            [`seeds_by_class`]. They are consumed a batch at a time.
        batch_size (`int`, defaults to 64): number of images that are drawn at once.
        kwargs: further arguments of the pipeline, see [`SampleSettings.call_arguments`].

    Yields:
        `tuple`: class id, seed and image, in the order of `labels_and_seeds`.
    """
    import torch

    remaining = iter(labels_and_seeds)
    while batch := list(islice(remaining, batch_size)):
        images = pipeline(
            [label for label, _ in batch],
            generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
            **kwargs,
        ).images
        for (label, seed), image in zip(batch, images):
            yield label, seed, image


# PNG files that keep the settings of their images


def save_image(image: "Image.Image", file: str | Path | BinaryIO, settings: dict[str, Any]) -> None:
    """Saves an image as a PNG that keeps `settings`, a dictionary of values that JSON can hold."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(settings, ensure_ascii=False))
    image.save(file, format="PNG", pnginfo=info)


def image_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that a PNG of [`save_image`] keeps. They come from a file and are not checked.

    Raises:
        ValueError: if the file is not a PNG image or keeps no settings.
        OSError: if the file cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # the settings may follow the pixels
            text = image.info.get(PNG_KEY)
    except (OSError, MemoryError) as error:
        if isinstance(error, Image.UnidentifiedImageError):
            raise ValueError(f"{str(path)!r} is not a PNG image.") from None
        raise
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        raise ValueError(f"{str(path)!r} cannot be read as a PNG image: {error}") from None
    try:
        settings = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{str(path)!r} keeps no settings; images of `pet-pipeline generate` do.")
    return settings


def model_digests(pipeline: "PetDiffusionPipeline") -> dict[str, str]:
    """Returns what an image keeps about the weights that drew it: a [`weights_digest`] of each model."""
    models = {"weights": pipeline.transformer, "guide_weights": pipeline.guide}
    return {name: weights_digest(model) for name, model in models.items() if model is not None}


def weights_digest(model: "nn.Module") -> str:
    """Returns a short hash of a model's parameters, by which two models can be compared."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
