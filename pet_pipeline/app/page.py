"""The components of the web page, and which handler answers each event of theirs."""

import html
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import SampleSettings
from ..visualization import compared_steps
from .handlers import Handlers, explained
from .html import examples_html
from .tasks import MAX_EVALUATIONS, MAX_IMAGES, MIN_STRENGTH


if TYPE_CHECKING:
    from ..evaluation.reference import Reference

# Gradio gives the component of a status no role, so a screen reader would not announce it. On a phone, a
# status that changes below the screen is scrolled to.
ANNOUNCE = """
element.setAttribute("role", "status");
watch("value", () => {
  if (element.getBoundingClientRect().top > innerHeight) element.scrollIntoView({ block: "nearest" });
});
"""
# Gradio does not tell screen readers whether an accordion is open.
TELL_EXPANDED = """
new MutationObserver(() => {
  for (const button of document.querySelectorAll("button.label-wrap"))
    button.ariaExpanded = button.classList.contains("open");
}).observe(document.body, { subtree: true, childList: true, attributeFilter: ["class"] });
"""
# Gradio knows no buttons inside the HTML of a component, and only events whose names it finds in the script.
CHOOSE = """
const events = ["select", "edit", "classify"];
element.addEventListener("click", (event) => {
  const { event: name, index } = event.target.closest("button")?.dataset ?? {};
  if (events.includes(name)) trigger(name, { index: Number(index) });
});
element.addEventListener("change", (event) => {
  for (const strip of element.querySelectorAll(".pet-strip"))
    strip.hidden = strip.dataset.index !== event.target.value;
});
"""
# A picture that is dropped on a tab is handed over to it, as by its button.
DROP_ON_TAB = """
let picture;
const buttonFor = (tab) => picture?.querySelector(`[data-event="${tab?.textContent.trim().toLowerCase()}"]`);
document.addEventListener("dragstart", (event) => { picture = event.target.closest?.("figure"); });
document.addEventListener("dragend", () => { picture = null; });
document.addEventListener("dragover", (event) => {
  if (buttonFor(event.target.closest?.("[role=tab]"))) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  const button = buttonFor(event.target.closest?.("[role=tab]"));
  if (button) { event.preventDefault(); button.click(); }
});
"""
# The button that had the focus is hidden on the new tab, so that the tab itself takes the focus.
FOCUS_TAB = """() => {
  document.querySelector("[role=tab][aria-selected=true]").focus();
  const statuses = [...document.querySelectorAll("[role=status]")];
  statuses.find((status) => status.checkVisibility()).scrollIntoView({ block: "nearest" });
}"""
# The queue may refuse a request before a handler sees it.
REFUSED = """() => {
  return "<p class='pet-error'>The server did not take this request. Wait a moment, and try again.</p>";
}"""

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
            if handlers.pipeline.is_tuned and name == "steps":
                high = compared_steps(handlers.pipeline)[-1]
            components.append(gr.Slider(low, high, value, step=step, **common))
        else:
            choices = [option.none_label] if option.none_label else []
            choices += option.choices or handlers.names
            value = option.none_label if value is None else value
            components.append(gr.Dropdown(choices, value=value, **common))
    return components


def class_inputs(names: list[str], number: int) -> list[gr.components.Component]:
    """Creates the inputs for the classes and for the number of images, which is `number` at the start."""
    return [
        gr.CheckboxGroup(names, value=names[:2], label="Classes"),
        gr.Slider(1, MAX_IMAGES // 2, number, step=1, label="Images of each class"),
    ]


def seed_inputs() -> list[gr.components.Component]:
    """Creates the inputs for the seed, and for whether the seed is drawn."""
    return [
        gr.Number(0, label="Seed", precision=0),
        gr.Checkbox(True, label="Draw a new seed each time"),
    ]


def buttons(label: str) -> tuple[gr.Button, gr.Button]:
    """Creates a button that starts a job, and beside it one that cancels the job."""
    with gr.Row():
        start = gr.Button(label, variant="primary", min_width=185)
        return start, gr.Button("Cancel", scale=0, min_width=95)


def on(
    trigger: Callable[..., Any],
    handler: Callable[..., Any],
    inputs: list[gr.components.Component],
    outputs: list[gr.components.Component],
    **kwargs: Any,
) -> Any:
    """Lets a handler answer an event; the first of the outputs shows what is wrong, if anything is.

    The handler gets the values as they are: Gradio's own checks fail on an empty field, write every wrong
    value to the log, and would leave a copy of an uploaded file.
    """
    event = trigger(explained(handler, len(outputs)), inputs, outputs, preprocess=False, **kwargs)
    event.failure(None, None, outputs[0], js=REFUSED)  # the handler itself never fails
    return event


def cancel_on_click(button: gr.Button, status: gr.HTML, events: list[Any]) -> None:
    """Lets a button cancel the jobs of `events`."""
    button.click(None, None, status, js="() => 'Cancelled.'", cancels=events, **LIGHT_EVENT)


class Results(NamedTuple):
    """Where a tab shows pictures."""

    status: gr.HTML
    grid: gr.HTML
    pictures: gr.State  # those of the grid that are finished


class Chosen(NamedTuple):
    """Where a tab shows and keeps the image that it works on."""

    status: gr.HTML
    preview: gr.HTML
    image: gr.State


def add_results(hint: str) -> Results:
    """Adds the place of the pictures of a tab; `hint` says how they get there."""
    return Results(gr.HTML(hint, js_on_load=ANNOUNCE), gr.HTML(js_on_load=CHOOSE), gr.State([]))


def add_choice(handlers: Handlers, label: str) -> tuple[gr.File, gr.HTML]:
    """Adds the two ways to choose an image: a file, or one of the examples."""
    upload = gr.File(label=label, file_types=["image"], height=130)
    return upload, gr.HTML(examples_html(handlers.examples), js_on_load=CHOOSE)


def take_choice(handlers: Handlers, choice: tuple[gr.File, gr.HTML], chosen: Chosen) -> None:
    """Lets both ways of [`add_choice`] choose the image of a tab."""
    upload, examples = choice
    event = on(upload.upload, handlers.take_upload, [upload], [*chosen], **LIGHT_EVENT)
    event.then(None, None, upload, js="() => null")
    on(examples.select, handlers.take_example, [], [*chosen], **LIGHT_EVENT)


def add_generate_tab(handlers: Handlers) -> Results:
    """Adds the tab that draws images."""
    with gr.Tab("Generate", id="generate"), gr.Row():
        with gr.Column(min_width=300):
            request = class_inputs(handlers.names, 4)
            start, cancel = buttons("Generate")
            with gr.Accordion("Advanced", open=False):
                seed = seed_inputs()
                settings = settings_inputs(handlers, handlers.settings)
                curve = gr.HTML(handlers.guidance_html(handlers.settings), label="Guidance")
        with gr.Column(scale=3, min_width=300):
            results = add_results("Choose classes, and click Generate.")
            with gr.Accordion("Closest training images", visible=False) as around_neighbors:
                neighbors = gr.HTML()
    event = on(
        start.click,
        handlers.generate,
        [*request, *seed, *settings],
        [*results, seed[0]],
        show_progress_on=results.status,
        **MODEL_EVENT,
    )
    cancel_on_click(cancel, results.status, [event])
    if handlers.reference is not None:
        on(
            results.pictures.change,
            handlers.find_neighbors,
            [results.pictures],
            [neighbors, around_neighbors],
            trigger_mode="always_last",
            **LIGHT_EVENT,
        )
    for item in settings:
        item.change(handlers.draw_guidance, settings, curve, preprocess=False, **PLOT_EVENT)
    return results


def add_edit_tab(handlers: Handlers) -> tuple[Results, Chosen, gr.Radio]:
    """Adds the tab that edits an image; also returns the input for the class that it becomes."""
    with gr.Tab("Edit", id="edit"), gr.Row():
        with gr.Column(min_width=300):
            choice = add_choice(handlers, "Image to edit")
            name = gr.Radio(handlers.names, value=handlers.names[0], label="Turn into")
            strength = gr.Slider(MIN_STRENGTH, 1, 0.5, step=0.05, label="Strength")
            number = gr.Slider(1, MAX_IMAGES // 2, 4, step=1, label="Variants")
            start, cancel = buttons("Edit")
            with gr.Accordion("Advanced", open=False):
                seed = seed_inputs()
                settings = settings_inputs(handlers, handlers.settings)
        with gr.Column(scale=3, min_width=300):
            results = add_results("Choose an image and what it becomes, and click Edit.")
            chosen = Chosen(results.status, results.grid, gr.State())
    take_choice(handlers, choice, chosen)
    event = on(
        start.click,
        handlers.edit,
        [chosen.image, name, strength, number, *seed, *settings],
        [*results, seed[0]],
        show_progress_on=results.status,
        **MODEL_EVENT,
    )
    cancel_on_click(cancel, results.status, [event])
    # A running edit would cover the image that is chosen.
    chosen.image.change(None, None, None, cancels=[event], **LIGHT_EVENT)
    return results, chosen, name


def add_compare_tab(handlers: Handlers) -> Results:
    """Adds the tab that compares settings with the same seeds."""
    saved = handlers.settings
    if handlers.pipeline.is_tuned:
        about, other = "A takes 1 step, and B as many as are saved with the model.", replace(saved, steps=1)
    else:
        about = "A draws without guidance, and B with the guidance that is saved with the model."
        other = replace(saved, guidance_scale=1.0, pag_scale=0.0, autoguidance_scale=1.0)
    *first_steps, last_steps = compared_steps(handlers.pipeline)
    with gr.Tab("Compare", id="compare"), gr.Row():
        with gr.Column(min_width=300):
            request = class_inputs(handlers.names, 2)
            gr.HTML(about)
            two, cancel = buttons("Compare A and B")
            steps = gr.Button(f"Compare {', '.join(map(str, first_steps))} and {last_steps} steps", size="md")
            with gr.Accordion("Advanced", open=False):
                seed = seed_inputs()
                gr.Markdown("### A")
                first = settings_inputs(handlers, other)
                gr.Markdown("### B")
                second = settings_inputs(handlers, saved)
        with gr.Column(scale=3, min_width=300):
            results = add_results("Choose classes, and what to compare.")
    events = [
        on(
            button.click,
            handler,
            [*request, *seed, *first, *second],
            [*results, seed[0]],
            show_progress_on=results.status,
            **MODEL_EVENT,
        )
        for button, handler in ((two, handlers.compare_two), (steps, handlers.compare_steps))
    ]
    cancel_on_click(cancel, results.status, events)
    return results


def add_classify_tab(handlers: Handlers) -> Chosen | None:
    """Adds the tab that classifies an image, or says why the model cannot."""
    with gr.Tab("Classify", id="classify"):
        if handlers.refusal:
            gr.HTML(f"<p>{html.escape(handlers.refusal)}</p>")
            return None
        with gr.Row():
            with gr.Column(min_width=300):
                choice = add_choice(handlers, "Image to classify")
                again, cancel = buttons("Classify")
                with gr.Accordion("Advanced", open=False):
                    effort = gr.Slider(2, MAX_EVALUATIONS, 32, step=2, label="Evaluations for each class")
                    seed = gr.Number(0, label="Seed of the noise", precision=0)
            with gr.Column(scale=3, min_width=300):
                status = gr.HTML("Choose an image.", js_on_load=ANNOUNCE)
                probabilities = gr.Label(label="Probabilities", visible=False)
                chosen = Chosen(status, gr.HTML(), gr.State())
    take_choice(handlers, choice, chosen)
    events = [
        # An image that is chosen while another is classified comes next.
        on(
            trigger,
            handlers.explain,
            [chosen.image, effort, seed],
            [status, probabilities, chosen.preview],
            show_progress_on=status,
            trigger_mode="always_last",
            **MODEL_EVENT,
        )
        for trigger in (chosen.image.change, again.click)
    ]
    cancel_on_click(cancel, status, events)
    return chosen


def build_app(
    pipeline: PetDiffusionPipeline,
    reference: "Reference | None" = None,
    closed: threading.Event | None = None,
) -> gr.Blocks:
    """Builds the page; [`serve`] serves it.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the model. The page offers what it can do.
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
        head = f'<div class="pet-head"><h1>pet_pipeline</h1><p>{html.escape(about)}</p></div>'
        gr.HTML(head, js_on_load=TELL_EXPANDED + DROP_ON_TAB)
        with gr.Tabs() as tabs:
            generated = add_generate_tab(handlers)
            edited, to_edit, name = add_edit_tab(handlers)
            compared = add_compare_tab(handlers)
            to_classify = add_classify_tab(handlers)
        for results in (generated, edited, compared):
            inputs = [results.pictures]
            outputs = [*to_edit, name, tabs]
            events = [on(results.grid.edit, handlers.pass_to_edit, inputs, outputs, **LIGHT_EVENT)]
            if to_classify is not None:
                outputs = [*to_classify, tabs]
                events += [
                    on(results.grid.classify, handlers.pass_to_classify, inputs, outputs, **LIGHT_EVENT)
                ]
            for event in events:
                event.then(None, js=FOCUS_TAB)
    return page
