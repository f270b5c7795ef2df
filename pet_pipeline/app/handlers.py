"""What happens on each event of the page: inputs are checked, the work runs, and its results are shown."""

import html
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ..pipeline_pet_classification import PetClassificationPipeline
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import SampleSettings, scheduler_by_name
from ..visualization import array_image, compared_steps, guidance_figure
from .html import (
    chosen_html,
    error_html,
    evidence_html,
    figures_html,
    image_tag,
    model_settings,
    neighbors_html,
    progress_html,
    samples_html,
)
from .tasks import (
    MAX_EVALUATIONS,
    Picture,
    check_number,
    classify,
    example_images,
    guidance_weights,
    num_evaluations,
    read_upload,
    sample,
    stream,
    with_saved_values,
)
from .zero_gpu import lend_gpu


if TYPE_CHECKING:
    from ..evaluation.reference import Reference

logger = logging.getLogger(__name__)

MAX_GUIDANCE_FIGURES = 128
NO_IMAGE = "Choose an image first."


def explained(handler: Callable[..., Any], num_outputs: int) -> Callable[..., Iterator[tuple]]:
    """Makes a handler show an error as text in the first of its outputs, and leave its other outputs.

    A `ValueError` is a mistake of the visitor and leaves nothing in the log; other errors do.
    """

    @wraps(handler)
    def explained_handler(*args: Any) -> Iterator[tuple]:
        rest = [gr.skip()] * (num_outputs - 1)
        try:
            yield from handler(*args)
        except ValueError as error:
            yield error_html(str(error)), *rest
        except Exception:
            logger.exception("The page could not answer %s.", handler.__name__)
            yield error_html("The server could not do this, and its log says why. Try again."), *rest

    return explained_handler


def settings_from_inputs(values: Sequence[Any], names: list[str]) -> SampleSettings:
    """Returns the settings that the values of the page's inputs stand for, in the order of the options.

    `names` are the classes of the model. `ValueError` is raised if a value is not one that the page offers.
    """
    settings: dict[str, Any] = {}
    for (name, option), value in zip(SampleSettings.options().items(), values):
        if option.slider is not None:
            low, high, _ = option.slider
            check_number(option.label, value, low, high)
            settings[name] = int(value) if SampleSettings.number_type(name) is int else float(value)
        elif option.none_label is not None and value == option.none_label:
            settings[name] = None
        elif value in (option.choices or names):
            settings[name] = value
        else:
            raise ValueError(f"{option.label} has no choice {value!r}.")
    return SampleSettings(**settings)


def chosen_item(items: Sequence[Any], event: gr.EventData) -> Any:
    """Returns the item whose button was clicked; raises `ValueError` if there is none."""
    match event._data:
        case {"index": int(index)} if 0 <= index < len(items):
            return items[index]
    raise ValueError("This image is not on the page any more. Choose another one.")


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun."""
    return f"{number} {noun}{'s'[: number != 1]}"


def chosen_outputs(image: Image.Image, caption: str) -> tuple[str, str, Image.Image]:
    """Returns the status, a preview and the image after a visitor has chosen an image."""
    # To Gradio, a copy is another image, so that an image that is chosen twice is classified twice.
    return html.escape(f"The image is {caption}."), chosen_html(image, caption), image.copy()


def draw_seed(seed: Any, is_drawn: Any) -> Any:
    """Returns the seed of a request, or a random one if the visitor wants a new seed each time."""
    return random.randrange(10**6) if is_drawn else seed


def refusal_to_classify(classifier: PetClassificationPipeline) -> str | None:
    """Returns why a model cannot classify, or `None` if it can."""
    try:
        classifier.check_inputs(MAX_EVALUATIONS, "calibrated", None, "denoising", True)
    except ValueError as error:
        return str(error)
    return None


class Handlers:
    """Answers the events of the page; every method that is a handler takes the values of its inputs.

    See [`build_app`] for the arguments and errors.
    """

    def __init__(
        self,
        pipeline: PetDiffusionPipeline,
        reference: "Reference | None" = None,
        closed: threading.Event | None = None,
    ) -> None:
        pipeline.check_scheduler()
        if pipeline.guider is not None:
            raise ValueError(
                f"The model has a guider, {type(pipeline.guider).__name__}, but the page has settings "
                "of its own for the guidance. Save the model without the guider."
            )
        saved = with_saved_values(pipeline, SampleSettings())
        for name in ("steps", "guidance_scale", "pag_scale", "autoguidance_scale"):
            slider = SampleSettings.options()[name].slider
            assert slider is not None
            check_number(f"The saved `{name}`", getattr(saved, name), *slider[:2])
        self.pipeline = pipeline
        self.reference = reference
        self.closed = closed
        self.names = pipeline.class_names
        self.settings = saved
        self.model = model_settings(pipeline)
        self.classifier = PetClassificationPipeline.from_pipe(pipeline)
        self.classifier.set_progress_bar_config(disable=True)
        self.refusal = refusal_to_classify(self.classifier)
        self.actions = ("edit",) if self.refusal else ("edit", "classify")
        self.examples = lend_gpu(partial(example_images, pipeline, reference))()
        for handler in (self.generate, self.edit, self.compare_two, self.compare_steps, self.explain):
            setattr(self, handler.__name__, lend_gpu(handler))
        # The figure depends on the settings alone, and drawing it takes almost half a second.
        self.guidance_html = lru_cache(MAX_GUIDANCE_FIGURES)(self.plot_guidance)

    # Drawing

    def plot_guidance(self, settings: SampleSettings) -> str:
        """Returns the plot of the guidance weight at each step."""
        settings = with_saved_values(self.pipeline, settings)
        scheduler = scheduler_by_name(settings.scheduler, self.pipeline.scheduler)
        scheduler.set_timesteps(settings.steps)
        sigmas = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
        weights = guidance_weights(sigmas, settings)
        evaluations = num_evaluations(sigmas, weights, settings)
        caption = f"{counted(evaluations, 'evaluation')} of the model for each image"
        if self.pipeline.is_tuned:
            return (
                f"<p>{caption}. This model was tuned to draw in a few steps: it has learned the guidance of "
                "the model that it was tuned from, and takes no other.</p>"
            )
        text = f"Strength of the guidance at each step, from {min(weights):.3g} to {max(weights):.3g}"
        figure = image_tag(guidance_figure(sigmas, weights), text, "pet-plot")
        figures = figures_html({caption: figure})
        return f'<div class="pet-figures">{figures}</div>'

    def draw_guidance(self, *values: Any) -> str:
        """Plots the guidance; a value that is not valid yet, such as an empty field, is explained instead."""
        try:
            return self.guidance_html(settings_from_inputs(values, self.names))
        except ValueError as error:
            return error_html(str(error))

    def draw(
        self, names: Any, number: Any, seed: Any, is_drawn: Any, values: Sequence[Any], **kwargs: Any
    ) -> Iterator[tuple]:
        """Draws images, and yields the status, the images as HTML, the finished pictures and the seed.

        `kwargs` are further arguments of [`sample`].
        """
        seed = draw_seed(seed, is_drawn)
        settings = settings_from_inputs(values, self.names)
        work = partial(sample, self.pipeline, names, number, seed, settings, **kwargs)
        status: Any = "Drawing …"
        finished: Any = []  # while images are drawn
        shown: Any = seed
        for samples in stream(work, self.closed):
            if not samples.is_finished:
                step = f"Step {samples.step} of {samples.num_steps}"
                progress = progress_html(step, samples.step, samples.num_steps)
                yield status, progress + samples_html(samples), finished, shown
                # Set only once: a later status would replace "Cancelled", and a later seed what is typed.
                status = finished = shown = gr.skip()
        pictures = samples.pictures
        status = (
            f"{counted(len(pictures), 'image')} in {samples.seconds:.1f} s, with "
            f"{counted(samples.evaluations, 'evaluation')} of the model for each image."
        )
        yield status, samples_html(samples, self.actions, self.model), pictures, shown

    def generate(self, names: Any, number: Any, seed: Any, is_drawn: Any, *values: Any) -> Iterator[tuple]:
        """Draws images of some classes; see [`draw`]."""
        yield from self.draw(names, number, seed, is_drawn, values)

    def edit(
        self,
        image: Image.Image | None,
        name: Any,
        strength: Any,
        number: Any,
        seed: Any,
        is_drawn: Any,
        *values: Any,
    ) -> Iterator[tuple]:
        """Draws the chosen image anew as another class; see [`draw`]."""
        if image is None:
            raise ValueError(NO_IMAGE)
        yield from self.draw([name], number, seed, is_drawn, values, image=image, strength=strength)

    def find_neighbors(self, pictures: list[Picture]) -> Iterator[tuple]:
        """Yields the training images that are closest to the pictures, and whether the page shows them."""
        assert self.reference is not None
        train, found = self.reference.train, ""
        if pictures:
            (found,) = stream(lambda report: neighbors_html(pictures, train), self.closed)
        yield found, gr.Accordion(visible=bool(found))

    def compare(self, request: Sequence[Any], compared: dict[str, SampleSettings]) -> Iterator[tuple]:
        """Draws the same seeds with several settings; yields what [`draw`] yields."""
        names, number, seed, is_drawn = request
        seed = draw_seed(seed, is_drawn)
        sections: list[str] = []
        pictures: list[Picture] = []
        seconds = 0.0

        def columns(*sections: str) -> str:
            return f'<div class="pet-columns">{"".join(sections)}</div>'

        for title, settings in compared.items():
            for samples in stream(partial(sample, self.pipeline, names, number, seed, settings), self.closed):
                is_first = samples.step == 1 and not sections
                done, drawn = f"step {samples.step}", [] if is_first else gr.skip()
                if samples.is_finished:
                    done = counted(samples.evaluations, "evaluation")
                    drawn = pictures + samples.pictures
                grid = samples_html(samples, self.actions, self.model, len(pictures), has_strips=False)
                section = (
                    f"<section><h3>{html.escape(title)}</h3>"
                    f'<p class="pet-about">{html.escape(str(settings))}; {done}</p>{grid}</section>'
                )
                status, shown = ("Drawing …", seed) if is_first else (gr.skip(), gr.skip())
                yield status, columns(*sections, section), drawn, shown
            sections.append(section)
            pictures += samples.pictures
            seconds += samples.seconds
        status = f"All use the same seeds, from {seed} on. They took {seconds:.1f} s."
        yield status, columns(*sections), pictures, gr.skip()

    def compare_two(self, *values: Any) -> Iterator[tuple]:
        """Compares the settings A and B."""
        request, values = values[:4], values[4:]
        half = len(values) // 2
        pair = {
            "A": settings_from_inputs(values[:half], self.names),
            "B": settings_from_inputs(values[half:], self.names),
        }
        yield from self.compare(request, pair)

    def compare_steps(self, *values: Any) -> Iterator[tuple]:
        """Compares several numbers of steps, with the other settings of B."""
        request, values = values[:4], values[4:]
        settings = settings_from_inputs(values[len(values) // 2 :], self.names)
        compared = compared_steps(self.pipeline)
        numbers = {counted(steps, "step"): replace(settings, steps=steps) for steps in compared}
        yield from self.compare(request, numbers)

    # Choosing an image to edit or to classify

    def take_upload(self, file: dict[str, Any] | None) -> Iterator[tuple]:
        """Yields the outputs of [`chosen_outputs`] for an uploaded image, and removes the file."""
        if file is None:
            raise ValueError(NO_IMAGE)
        path = Path(file["path"])
        pixels = self.classifier.prepare_image(read_upload(path), path.name)
        image = array_image((pixels * 127.5 + 127.5).round().byte())
        yield chosen_outputs(image, path.name)

    def take_example(self, event: gr.EventData) -> Iterator[tuple]:
        """Yields the outputs of [`chosen_outputs`] for the example whose button was clicked."""
        yield chosen_outputs(*chosen_item(self.examples, event))

    def pass_to_edit(self, pictures: list[Picture], event: gr.EventData) -> Iterator[tuple]:
        """Yields the outputs of [`chosen_outputs`] for a picture, another class, and the tab that edits."""
        picture = chosen_item(pictures, event)
        other = self.names[(self.names.index(picture.name) + 1) % len(self.names)]
        yield *chosen_outputs(picture.image, str(picture)), other, gr.Tabs(selected="edit")

    def pass_to_classify(self, pictures: list[Picture], event: gr.EventData) -> Iterator[tuple]:
        """Yields the outputs of [`chosen_outputs`] for a picture, and the tab that classifies."""
        picture = chosen_item(pictures, event)
        yield *chosen_outputs(picture.image, str(picture)), gr.Tabs(selected="classify")

    # Classifying

    def explain(self, image: Image.Image | None, num_evaluations: Any, seed: Any) -> Iterator[tuple]:
        """Classifies the chosen image, and yields the status, the probabilities and the evidence."""
        if image is None:
            raise ValueError(NO_IMAGE)
        began = time.perf_counter()
        work = partial(classify, self.classifier, image, num_evaluations, seed)
        for found in stream(work, self.closed):
            if isinstance(found, int):
                total = int(num_evaluations) * len(self.names)
                status = "Comparing the classes …" if found == 0 else gr.skip()
                progress = progress_html(f"{found} of {total} evaluations", found, total)
                yield status, gr.Label(visible=False), progress + chosen_html(image, "")
        (label,), (evidence,) = found.labels, found.evidence
        status = (
            f"{html.escape(label)}: {found.probabilities[0][label]:.1%}, after {found.num_evaluations[0]} "
            f"evaluations of the model in {time.perf_counter() - began:.1f} s."
        )
        probabilities = gr.Label(found.probabilities[0], visible=True)
        yield status, probabilities, evidence_html(image, evidence, self.names)
