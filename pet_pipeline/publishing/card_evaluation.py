"""Puts the measurements of `pet-pipeline evaluate` into a model card."""

import reprlib
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..evaluation.tables import COLUMNS, markdown_table
from .client import hub_id
from .folder import read_json


TASK = "unconditional-image-generation"  # the Hub has no name for class-conditional generation
# A card shows its evaluation between these marks, which the Hub does not display.
EVALUATION_START, EVALUATION_END = "<!-- evaluation -->\n", "<!-- end of evaluation -->"
# How a card describes the settings of an evaluation.
SETTING_PHRASES = {
    "seed": "seeds from {} on",
    "num_inference_steps": "{} steps",
    "guidance_scale": "guidance {}",
    "guidance_schedule": "schedule `{}`",
    "pag_scale": "perturbed attention {}",
    "autoguidance_scale": "autoguidance {}",
    "scheduler": "scheduler `{}`",
}


def read_evaluation(path: Path) -> dict[str, Any]:
    """Reads the record of an evaluation that [`evaluate`] made, or raises `ValueError` if the file is none.

    The `settings` and the `floors` of the record may be empty.
    """
    record = {"settings": {}, "floors": {}, **read_json(path)}

    def check(name: str, value: Any, valid: bool) -> None:
        if not valid:
            raise ValueError(
                f"{str(path)!r} is not a record of `pet-pipeline evaluate`: {reprlib.repr(name)} is "
                f"{reprlib.repr(value)}."
            )

    for name in ("settings", "measures", "floors"):
        check(name, record.get(name), isinstance(record.get(name), dict))
    for name, measures in record["floors"].items():
        check("floors", record["floors"], is_plain_text(name) and isinstance(measures, dict))
    numbers = {name: record.get(name) for name in ("evaluations_per_image", "images_per_second")}
    numbers |= {name: record["measures"].get(name) for name in ("num_images", "num_reference_images")}
    if "memorization_ratio" in record["measures"]:
        numbers["nearest_distance"] = record["measures"].get("nearest_distance")
    for table in (numbers, record["measures"], *record["floors"].values()):
        for name, value in table.items():
            check(name, value, is_number(value))
    check("date", record.get("date"), is_plain_text(record.get("date")))
    for name in (*SETTING_PHRASES, "reference", "split"):
        value = record["settings"].get(name, 0)
        check(name, value, value is None or is_number(value) or is_plain_text(value))
    return record


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that can be formatted as a float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def is_plain_text(value: Any) -> bool:
    """Whether a value of JSON is a short string without control characters, as a card can show it."""
    return isinstance(value, str) and len(value) < 1000 and value.isprintable()


def eval_result(
    dataset_id: str | None, split: str | None, metric: str, name: str, value: float
) -> EvalResult:
    """Returns an entry of a card's metadata; `dataset_id` is `None` for a local data set."""
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset_id or "local",
        dataset_name=dataset_id or "local data set",
        dataset_split=split,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 6),
    )


def add_evaluation(card: ModelCard, record: dict[str, Any], model_name: str) -> None:
    """Puts an evaluation into the metadata of a card, and into the text between the card's marks.

    `model_name` becomes the name of the model in the metadata if they have none yet.
    """
    settings, measures = record["settings"], record["measures"]
    dataset_id = hub_id(settings.get("reference"))
    data: Any = card.data  # `ModelCard` declares less than the `ModelCardData` that it holds
    kept = [result for result in data.eval_results or [] if result.metric_type not in measures]
    data.model_name = data.model_name or model_name
    data.eval_results = kept + [
        # The value is not scaled here.
        eval_result(dataset_id, settings.get("split"), name, heading.removesuffix(" ×10³"), measures[name])
        for name, (heading, _) in COLUMNS.items()
        if name in measures
    ]
    section = evaluation_section(record)
    before, _, rest = card.text.partition(EVALUATION_START)
    after = rest.partition(EVALUATION_END)[2]
    card.text = f"{before}{EVALUATION_START}{section}\n{EVALUATION_END}{after}"


def evaluation_section(record: dict[str, Any]) -> str:
    """Returns the sections of a card about an evaluation and about memorisation, as Markdown."""
    settings, measures = record["settings"], record["measures"]
    reference = hub_id(settings.get("reference"))
    drawn = [phrase.format(settings[name]) for name, phrase in SETTING_PHRASES.items() if name in settings]
    lines = [
        "## Evaluation",
        "",
        f"{measures['num_images']:,} generated images ({', '.join(drawn)}) against "
        f"{measures['num_reference_images']:,} of "
        + (f"[{reference}](https://huggingface.co/datasets/{reference})" if reference else "a local data set")
        + (f" (`{settings['split']}`)" if "split" in settings else "")
        + f"; measured on {record['date']} by `pet-pipeline evaluate`.",
        "",
        markdown_table(record, "this model"),
    ]
    if "fd_efflite0" in measures:
        lines += [
            "",
            "FD-EffLite0 and KID-EffLite0 are the Fréchet distance and the kernel distance between features "
            "of EfficientNet-Lite0. They are not FID and KID, and can only be compared with values for the "
            "same features and the same number of images.",
        ]
    if "memorization_ratio" in measures:
        unseen = record["floors"].get("unseen images", {}).get("nearest_distance")
        lines += [
            "",
            "## Memorisation",
            "",
            f"{measures['memorization_ratio']:.2%} of these images copy a training image of that data set, "
            "which means that they are three times nearer to this image than to the second nearest. The "
            f"median distance to the nearest training image is {measures['nearest_distance']:.3f} (RMS, "
            "pixels in [-1, 1])" + (f", and {unseen:.3f} for unseen images." if unseen is not None else "."),
        ]
    return "\n".join(lines)
