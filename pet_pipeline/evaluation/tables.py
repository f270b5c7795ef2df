"""The record of an evaluation, as a JSON file and as a Markdown table."""

import json
from pathlib import Path
from typing import Any


# Heading and format of each column of the table of an evaluation.
COLUMNS = {
    "fd_efflite0": ("FD-EffLite0", "{:.1f}"),
    "kid_efflite0": ("KID-EffLite0 ×10³", "{:.2f}"),
    "fd_inception": ("FID", "{:.2f}"),
    "kid_inception": ("KID ×10³", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "class_accuracy": ("class accuracy", "{:.3f}"),
    "memorization_ratio": ("memorised", "{:.4f}"),
    "nearest_distance": ("nearest, RMS", "{:.3f}"),
    "validation_loss": ("validation loss", "{:.4f}"),
}


def save_record(record: dict[str, Any], path: Path) -> None:
    """Writes a record as JSON in UTF-8."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown_table(record: dict[str, Any], name: str) -> str:
    """Returns a record of [`evaluate`] as a Markdown table.

    Args:
        record (`dict`): the record.
        name (`str`): the heading of the row of the pipeline. Each of the record's floors has a row as well.
    """
    rows = {name: record["measures"], **record.get("floors", {})}
    keys = [key for key in COLUMNS if key in record["measures"]]
    headings = ["images of", *(COLUMNS[key][0] for key in keys), "evaluations", "images/s"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row_name, measures in rows.items():
        cells = [row_name]
        for key in keys:
            value = measures.get(key)
            scaled = None if value is None else value * (1000 if key.startswith("kid") else 1)
            cells.append("" if scaled is None else COLUMNS[key][1].format(scaled))
        if row_name == name:
            cells += [f"{record['evaluations_per_image']:.1f}", f"{record['images_per_second']:.2f}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
