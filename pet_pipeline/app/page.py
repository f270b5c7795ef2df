"""The components of the web page, and which handler answers each event of theirs."""

import html
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import SampleSettings
from ..visualization import compared_steps
from .handlers import Handlers
from .html import examples_html
from .tasks import MAX_EVALUATIONS, MAX_IMAGES


if TYPE_CHECKING:
    from ..evaluation.reference import Reference

# Gradio gives the component of a status no role, so a screen reader would not announce it.
ANNOUNCE = "element.setAttribute('role', 'status')"
# Gradio knows no buttons inside the HTML of a component.
CHOOSE = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: Number(button.dataset.index) });
});
"""

# Jobs of the model run one after the other.
MODEL_EVENT: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
# The other jobs wait in queues of their own, because only jobs in a queue are limited for each visitor.
LIGHT_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
PLOT_EVENT: dict[str, Any] = {
    "concurrency_id": "plot",
    "concurrency_limit": 1,
    "trigger_mode": "always_last",
    **LIGHT_EVENT,
}


def checked_later(component: gr.components.Component) -> gr.components.Component:
    """Passes a component's value to the handler as it is.

    Gradio's own checks fail on an empty field and write every wrong value to the log; the handlers check the
    values and explain what is wrong.
    """
    component.preprocess = lambda value: value
    return component


def settings_inputs(handlers: Handlers, settings: SampleSettings) -> list[gr.components.Component]:
    """Creates an input for every option of [`SampleSettings`]; `settings` gives the values at the start."""
    components = []
    for name, option in SampleSettings.options().items():
        value = getattr(settings, name)
        is_possible = name != "autoguidance_scale" or handlers.pipeline.guide is not None
        if handlers.pipeline.is_tuned:  # it draws without guidance
            is_possible = name == "steps"
        common: dict[str, Any] = {"label": option.label, "info": option.help, "visible": is_possible}
        if option.slider is not None:
            low, high, step = option.slider
            component = gr.Slider(low, high, value, step=step, **common)
        else:
            choices = [option.none_label] if option.none_label else []
            choices += option.choices or handlers.names
            component = gr.Dropdown(choices, value=option.none_label if value is None else value, **common)
        components.append(checked_later(component))
    return components


def request_inputs(names: list[str]) -> list[gr.components.Component]:
    """Creates the inputs for the classes, the number of images, the seed, and whether the seed is drawn."""
    components = [
        gr.CheckboxGroup(names, value=names[:2], label="Classes"),
        gr.Slider(1, MAX_IMAGES // 2, 4, step=1, label="Images of each class"),
        gr.Number(0, label="Seed", precision=0),
        gr.Checkbox(True, label="Draw a new seed each time"),
    ]
    return [checked_later(component) for component in components]


def cancel_on_click(button: gr.Button, status: gr.HTML, events: list[Any]) -> None:
    """Lets a button cancel the jobs of `events`."""
    button.click(None, None, status, js="() => 'Cancelled.'", cancels=events, **LIGHT_EVENT)


def add_generate_tab(handlers: Handlers) -> None:
    """Adds the tab that draws images."""
    with gr.Tab("Generate"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            request = request_inputs(handlers.names)
            settings = settings_inputs(handlers, handlers.settings)
            curve = gr.HTML(handlers.guidance_html(handlers.settings), label="Guidance")
            with gr.Row():
                start, cancel = gr.Button("Generate", variant="primary"), gr.Button("Cancel")
        with gr.Column(scale=3, min_width=300):
            status, grid, strip = gr.HTML(js_on_load=ANNOUNCE), gr.HTML(), gr.HTML()
            with gr.Accordion("Closest training images", visible=handlers.reference is not None):
                neighbors = gr.HTML("Generate images first.")
    event = start.click(
        handlers.generate,
        [*request, *settings],
        [status, grid, request[2], strip, neighbors],
        show_progress_on=status,
        **MODEL_EVENT,
    )
    cancel_on_click(cancel, status, [event])
    for item in settings:
        item.change(handlers.draw_guidance, settings, curve, **PLOT_EVENT)


def add_compare_tab(handlers: Handlers) -> None:
    """Adds the tab that compares settings with the same seeds."""
    with gr.Tab("Compare"):
        with gr.Row():
            with gr.Column(min_width=250):
                gr.Markdown("### Both")
                request = request_inputs(handlers.names)
            with gr.Column(min_width=250):
                gr.Markdown("### A")
                first = settings_inputs(handlers, replace(handlers.settings, guidance_scale=1.0))
            with gr.Column(min_width=250):
                gr.Markdown("### B")
                second = settings_inputs(handlers, handlers.settings)
        with gr.Row():
            two = gr.Button("Compare A and B", variant="primary")
            *first_steps, last_steps = compared_steps(handlers.pipeline)
            steps = gr.Button(f"Compare {', '.join(map(str, first_steps))} and {last_steps} steps of A")
            cancel = gr.Button("Cancel")
        status, grid = gr.HTML(js_on_load=ANNOUNCE), gr.HTML()
    events = [
        button.click(
            handler,
            [*request, *first, *second],
            [status, grid, request[2]],
            show_progress_on=status,
            **MODEL_EVENT,
        )
        for button, handler in ((two, handlers.compare_two), (steps, handlers.compare_steps))
    ]
    cancel_on_click(cancel, status, events)


def add_classify_tab(handlers: Handlers) -> None:
    """Adds the tab that classifies an image."""
    with gr.Tab("Classify"), gr.Row():
        with gr.Column(scale=2, min_width=300):
            upload = gr.File(label="Image to classify", file_types=["image"], height=140)
            # The handler needs the path alone, to remove the file; Gradio's own way would leave the file.
            upload.preprocess = lambda file: file and Path(file.path)
            choices = gr.HTML(examples_html(handlers.examples), js_on_load=CHOOSE)
            effort = gr.Slider(2, MAX_EVALUATIONS, 32, step=2, label="Evaluations for each class")
            seed = gr.Number(0, label="Seed of the noise", precision=0)
            with gr.Row():
                again, cancel = gr.Button("Classify again"), gr.Button("Cancel")
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(js_on_load=ANNOUNCE)
            probabilities, evidence = gr.Label(label="Probabilities"), gr.HTML()
    image = gr.State()
    chosen = [
        upload.upload(handlers.take_upload, upload, [image, upload], api_visibility="private"),
        choices.select(handlers.take_example, None, image, **LIGHT_EVENT),
    ]
    events = [
        # An image that is chosen while another is classified comes next.
        trigger(
            handlers.explain,
            [image, checked_later(effort), checked_later(seed)],
            [status, probabilities, evidence],
            show_progress_on=status,
            trigger_mode="always_last",
            **MODEL_EVENT,
        )
        for trigger in (*(choice.success for choice in chosen), again.click)
    ]
    cancel_on_click(cancel, status, events)


def build_app(
    pipeline: PetDiffusionPipeline,
    reference: "Reference | None" = None,
    closed: threading.Event | None = None,
) -> gr.Blocks:
    """Builds the page; [`serve`] serves it.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the model.
        reference ([`Reference`], *optional*): the data set that the model was trained on. The page then shows
            the training images that are closest to each sample, and offers unseen images to classify.
        closed (`threading.Event`, *optional*): ends the work on all requests when it is set.

    Raises:
        ValueError: if the pipeline's scheduler is not one of EDM, the pipeline has a guider, or its saved
            steps or strengths of guidance are not ones that the page offers.
    """
    handlers = Handlers(pipeline, reference, closed)
    with gr.Blocks(title="pet_pipeline", analytics_enabled=False) as page:
        size = pipeline.transformer.config.sample_size
        about = f"Images of {size}×{size} pixels by diffusion: {', '.join(handlers.names)}."
        # This is HTML because in Markdown, the name of a class could load an image.
        gr.HTML(f"<h1>pet_pipeline</h1><p>{html.escape(about)}</p>", padding=False)
        add_generate_tab(handlers)
        add_compare_tab(handlers)
        add_classify_tab(handlers)
    return page
