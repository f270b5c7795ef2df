"""Writes the notebook of a trained pipeline, which the Hub offers to open in Colab and Kaggle."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import card_title


if TYPE_CHECKING:
    from ..pipeline_pet_diffusion import PetDiffusionPipeline

TEMPLATE = Path(__file__).with_name("notebook.md")


def render_notebook(name: str, pipeline: "PetDiffusionPipeline") -> str:
    """Returns the notebook of a trained pipeline, which it loads by a name, as JSON in Jupyter's format 4.5.

    The template is one of Jinja for Markdown, whose blocks of Python become the cells of code.
    """
    from jinja2 import Template  # training alone needs it

    text = Template(TEMPLATE.read_text(encoding="utf-8")).render(
        title=card_title(pipeline),
        name=name,
        is_unconditional=len(pipeline.class_names) == 1,
        is_tuned=pipeline.is_tuned,
    )
    cells: list[dict[str, Any]] = []
    for index, part in enumerate(re.split(r"^```(?:python)?$", text, flags=re.MULTILINE)):
        if not part.strip():
            continue
        cell: dict[str, Any] = {"cell_type": "markdown"}
        if index % 2 == 1:
            cell = {"cell_type": "code", "execution_count": None, "outputs": []}
        source = part.strip().splitlines(keepends=True)
        cells.append({**cell, "id": f"cell-{index}", "metadata": {}, "source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
