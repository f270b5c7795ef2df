"""Writes the model card of a trained pipeline."""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .. import __version__
from ..training.data import UNLABELLED
from ..transformer_pet import PetTransformer2DModel
from .card_evaluation import TASK, add_evaluation, eval_result, read_evaluation
from .client import hub_id
from .papers import papers_of


if TYPE_CHECKING:
    from ..pipeline_pet_diffusion import PetDiffusionPipeline

# The options of `train_pet.py` that a card may show. None of them is a path or a secret.
CARD_OPTIONS = (
    "train_split",
    "objective",
    "random_flip",
    "augmentation_probability",
    "noise_schedule",
    "p_mean",
    "p_std",
    "loss",
    "learned_weighting",
    "label_dropout",
    "train_batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "muon_learning_rate",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "use_ema",
    "ema_inv_gamma",
    "ema_power",
    "ema_max_decay",
    "seed",
)
CIFAR10_IDS = ("uoft-cs/cifar10", "cifar10")
TEMPLATE = Path(__file__).with_name("model_card.md")


@dataclass
class TrainingReport:
    """The facts about a training that its model card shows.

    The card shows the names of the data set and of the base model only if they are ids of the Hub.
    """

    dataset_name: str
    options: dict[str, Any]  # of `train_pet.py`; the card shows `CARD_OPTIONS`
    num_train_images: int | None  # `None` for a stream
    num_held_out_images: int
    num_validation_images: int  # the held-out images that measured the validation loss
    num_steps: int  # optimizer steps
    num_images_seen: int  # by all processes, repetitions included
    seconds: float
    device: str  # kind and number of the devices
    precision: str  # of the matrix products: "no" (float32), "bf16" or "fp16"
    base_model: str | None = None  # the pipeline that the training started from
    validation_loss: float | None = None  # of exactly the saved weights; see `TrainingResults.validate`


def project_url() -> str | None:
    """Returns the home page of this project, or `None` if setup.cfg names none or nothing is installed."""
    try:
        pages = metadata("pet-pipeline").get_all("Home-page")
    except PackageNotFoundError:  # a clone that runs without being installed
        return None
    return pages[0] if pages else None


def card_title(pipeline: "PetDiffusionPipeline") -> str:
    """Returns what a pipeline draws, as a heading: `"Images of cat and dog, 32×32"`."""
    names, size = pipeline.class_names, pipeline.transformer.config.sample_size
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    subject = f" of {listed}" if len(names) <= 4 else f" of {len(names)} classes"
    subject = "" if names == [UNLABELLED] else subject
    return f"Images{subject}, {size}×{size}"


def render_model_card(folder: str | Path, pipeline: "PetDiffusionPipeline", report: TrainingReport) -> str:
    """Returns the model card of a trained pipeline. The card has no sections for what was not measured.

    The card shows `samples.png` and `evaluation.json` if the folder of the saved pipeline has them. The
    template is one of Jinja.
    """
    folder = Path(folder)
    config, kind = pipeline.transformer.config, type(pipeline.transformer)
    is_transformer = issubclass(kind, PetTransformer2DModel)
    names, title = pipeline.class_names, card_title(pipeline)
    dataset_id = hub_id(report.dataset_name)
    base_model = None if report.base_model == "fast" else hub_id(report.base_model)  # a bundled model
    is_unconditional = len(names) == 1
    is_tuned = report.options["objective"] == "consistency"
    results = []
    if report.validation_loss is not None:
        metric = "teacher_distance" if is_tuned else "validation_loss"
        loss, split = report.validation_loss, report.options["train_split"]
        results = [eval_result(dataset_id, split, metric, metric.replace("_", " "), loss)]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license="apache-2.0",
        datasets=[dataset_id] if dataset_id else None,
        base_model=base_model,
        tags=[
            "diffusers",
            *([] if is_unconditional else ["class-conditional"]),
            "edm",
            *(["linear-attention"] if is_transformer else []),
        ],
        model_name=title if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=title,
        model_id=folder.resolve().name,
        class_names=names,
        resolution=config.sample_size,
        config=config,
        class_name=None if is_transformer else kind.__name__,
        num_parameters=pipeline.transformer.num_parameters(),
        has_samples=(folder / "samples.png").is_file(),
        dataset_id=dataset_id,
        is_cifar10=dataset_id in CIFAR10_IDS,
        fine_tuned=report.base_model is not None,
        is_tuned=is_tuned,
        is_unconditional=is_unconditional,
        num_steps=pipeline.config.num_inference_steps,
        report=report,
        project_url=project_url(),
        papers=papers_of(pipeline, report.options),
        options={name: report.options[name] for name in CARD_OPTIONS},
        versions={
            "pet_pipeline": __version__,
            **{name: version(name) for name in ("torch", "diffusers", "accelerate")},
        },
    )
    if (folder / "evaluation.json").is_file():
        add_evaluation(card, read_evaluation(folder / "evaluation.json"), title)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"  # absent sections leave blank lines
    return card.content
