"""What happens on each event of the page: inputs are checked, the work runs, and its results are shown."""

import html
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ..pipeline_pet_classification import PetClassificationPipeline
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import SampleSettings, scheduler_by_name
from ..visualization import array_image, compared_steps, guidance_figure
from .html import evidence_html, figures_html, image_tag, model_settings, neighbors_html, samples_html
from .tasks import (
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


if TYPE_CHECKING:
    from ..evaluation.reference import Reference

MAX_GUIDANCE_FIGURES = 128


@contextmanager
def shown_errors() -> Iterator[None]:
    """Shows a `ValueError` as a message on the page, and writes nothing to the log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


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


def draw_seed(seed: Any, is_drawn: Any) -> Any:
    """Returns the seed of a request, or a random one if the visitor wants a new seed each time."""
    return random.randrange(2**31) if is_drawn else seed


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
        if not hasattr(pipeline.scheduler, "precondition_outputs"):
            raise ValueError(
                "The scheduler must be one of EDM, as `AdaptiveEDMScheduler` is, but is of the class "
                f"{type(pipeline.scheduler).__name__}."
            )
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
        self.examples = example_images(pipeline, reference)
        # The figure depends on the settings alone, and drawing it takes almost half a second.
        self.guidance_html = lru_cache(MAX_GUIDANCE_FIGURES)(self.plot_guidance)

    # Drawing

    def plot_guidance(self, settings: SampleSettings) -> str:
        """Returns the plot of the guidance weight at each step."""
        settings = with_saved_values(self.pipeline, settings)
        scheduler = scheduler_by_name(settings.scheduler, self.pipeline.scheduler)
        sigmas, weights = guidance_weights(scheduler, settings)
        text = f"Strength of the guidance at each step, from {min(weights):.3g} to {max(weights):.3g}"
        evaluations = num_evaluations(sigmas, weights, settings)
        caption = f"{evaluations} evaluations of the model for each image"
        figures = figures_html({caption: image_tag(guidance_figure(sigmas, weights), text)})
        return f'<div class="pet-figures">{figures}</div>'

    def draw_guidance(self, *values: Any) -> str:
        """Plots the guidance; a value that is not valid yet, such as an empty field, is explained instead."""
        try:
            return self.guidance_html(settings_from_inputs(values, self.names))
        except ValueError as error:
            return f"<p>{html.escape(str(error))}</p>"

    def generate(self, names: Any, number: Any, seed: Any, is_drawn: Any, *values: Any) -> Iterator[tuple]:
        """Draws images, and yields the status, the images, the seed, the strip and the closest images."""
        seed = draw_seed(seed, is_drawn)
        with shown_errors():
            settings = settings_from_inputs(values, self.names)
            for samples in stream(partial(sample, self.pipeline, names, number, seed, settings), self.closed):
                if samples.strip is None:
                    heading = f"<p>Step {samples.step} of {samples.num_steps}</p>"
                    # The status is set only once, because a later one would replace "Cancelled". The strip
                    # and the closest images of the last request are removed at the same time.
                    status, rest = ("Drawing …", "") if samples.step == 1 else (gr.skip(), gr.skip())
                    yield status, heading + samples_html(samples), seed, rest, rest
        count = sum(len(row) for row in samples.rows.values())
        status = (
            f"{count} images in {samples.seconds:.1f} s, with {samples.evaluations} evaluations of the model "
            "for each image. Click an image to download it; the PNG keeps its settings."
        )
        text = "The first image of each class at every step, noisy and denoised; above them the noise level"
        strip = f'<div class="pet-wide" tabindex="0">{image_tag(samples.strip, text)}</div>'
        yield status, samples_html(samples, self.model), seed, strip, gr.skip()
        if self.reference is not None:
            images = self.reference.train.images
            (found,) = stream(lambda report: neighbors_html(samples, images), self.closed)
            yield *[gr.skip()] * 4, found

    def compare(self, request: Sequence[Any], compared: dict[str, SampleSettings]) -> Iterator[tuple]:
        """Draws the same seeds with several settings, and yields the status, the images and the seed."""
        names, number, seed, is_drawn = request
        seed = draw_seed(seed, is_drawn)
        finished: list[str] = []
        seconds = 0.0

        def columns(*sections: str) -> str:
            return f'<div class="pet-columns">{"".join(sections)}</div>'

        for title, settings in compared.items():
            for samples in stream(partial(sample, self.pipeline, names, number, seed, settings), self.closed):
                is_final = samples.strip is not None
                about = f"{samples.evaluations} evaluations" if is_final else f"step {samples.step}"
                section = (
                    f"<section><h3>{html.escape(title)}</h3><p>{html.escape(str(settings))}; {about}</p>"
                    f"{samples_html(samples, self.model if is_final else None)}</section>"
                )
                is_first = samples.step == 1 and not finished
                yield "Drawing …" if is_first else gr.skip(), columns(*finished, section), seed
            finished.append(section)
            seconds += samples.seconds
        yield f"All use the same seeds, from {seed} on. They took {seconds:.1f} s.", columns(*finished), seed

    def compare_two(self, *values: Any) -> Iterator[tuple]:
        """Compares the settings A and B."""
        request, values = values[:4], values[4:]
        half = len(values) // 2
        with shown_errors():
            pair = {
                "A": settings_from_inputs(values[:half], self.names),
                "B": settings_from_inputs(values[half:], self.names),
            }
            yield from self.compare(request, pair)

    def compare_steps(self, *values: Any) -> Iterator[tuple]:
        """Compares several numbers of steps, with the other settings of A."""
        request, values = values[:4], values[4:]
        with shown_errors():
            settings = settings_from_inputs(values[: len(values) // 2], self.names)
            compared = compared_steps(self.pipeline)
            numbers = {f"{steps} steps": replace(settings, steps=steps) for steps in compared}
            yield from self.compare(request, numbers)

    # Classifying

    def take_upload(self, path: Path | None) -> tuple[Image.Image, None]:
        """Returns an uploaded image at the size of the model, and empties the upload field."""
        with shown_errors():
            if path is None:
                raise ValueError("Choose an image first.")
            pixels = self.classifier.prepare_image(read_upload(path), path.name)
        return array_image((pixels * 127.5 + 127.5).round().byte()), None

    def take_example(self, event: gr.EventData) -> Image.Image:
        """Returns the example whose button was clicked."""
        match event._data:
            case {"index": int(index)} if 0 <= index < len(self.examples):
                return self.examples[index][0]
        raise gr.Error("There is no such example.", print_exception=False)

    def explain(self, image: Image.Image | None, num_evaluations: Any, seed: Any) -> Iterator[tuple]:
        """Classifies the chosen image, and yields the status, the probabilities and the evidence."""
        with shown_errors():
            if image is None:
                raise ValueError("Upload an image first, or choose one of the examples.")
            began = time.perf_counter()
            work = partial(classify, self.classifier, image, num_evaluations, seed)
            for found in stream(work, self.closed):
                if isinstance(found, int):
                    total = int(num_evaluations) * len(self.names)
                    status = "Comparing the classes …" if found == 0 else gr.skip()
                    yield status, None, f"<p>{found} of {total} evaluations</p>"
        (label,), (evidence,) = found.labels, found.evidence
        status = (
            f"{html.escape(label)}: {found.probabilities[0][label]:.1%}, after {found.num_evaluations[0]} "
            f"evaluations of the model in {time.perf_counter() - began:.1f} s."
        )
        yield status, found.probabilities[0], evidence_html(image, evidence, self.names)
