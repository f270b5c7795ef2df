"""What the tests of publishing share: a record of an evaluation, and functions that write model cards."""

import json
import re
from pathlib import Path

import train_pet
from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.publishing.card import TrainingReport, render_model_card


RECORD = {
    "date": "2026-11-23",
    "settings": {"num_images": 1000, "seed": 0, "num_inference_steps": 18, "reference": "uoft-cs/cifar10"},
    "evaluations_per_image": 27.0,
    "images_per_second": 9.5,
    "measures": {
        "num_images": 1000,
        "num_reference_images": 1000,
        "fd_efflite0": 12.5,
        "kid_efflite0": 0.00625,
        "memorization_ratio": 0.001,
        "nearest_distance": 0.375,
        "validation_loss": 0.25,
    },
}
PIPELINE_FILES = {
    "model_index.json",
    "pipeline_pet_classification.py",
    "pipeline_pet_diffusion.py",
    "pipeline_pet_loading.py",
    "guidance_pet.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_adaptive_edm.py",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/transformer_pet.py",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rendered(
    folder: Path, pipeline: PetDiffusionPipeline, dataset_name: str, options: dict | None = None, **report
) -> str:
    options = vars(train_pet.parse_args(["--max_train_steps", "1"])) | (options or {})
    values = {"num_train_images": 9000, "num_held_out_images": 1000, "num_validation_images": 512}
    values |= {"num_steps": 3616, "num_images_seen": 231424, "seconds": 4200.0}
    values |= {"device": "1 × cpu (2 threads)", "precision": "bf16"}
    values |= {"dataset_name": dataset_name, "options": options, **report}
    text = render_model_card(folder, pipeline, TrainingReport(**values))
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\n\n\n|None|Undefined|N/A|TODO", text)
    assert text.endswith("\n") and not text.endswith("\n\n")
    return text
