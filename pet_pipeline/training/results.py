"""What a training measures and leaves behind: validation losses, pictures, and the pipeline with its card."""

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..evaluation.images import generate_images
from ..evaluation.metrics import (
    FEATURE_EXTRACTORS,
    FeatureExtractor,
    image_features,
    kernel_distance,
    validation_loss,
)
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..publishing.card import TrainingReport, render_model_card
from ..publishing.notebook import render_notebook
from ..publishing.push import EVALUATION_FILES
from ..visualization import denoising_strip, loss_curves, sample_grid, step_comparison
from .checkpointing import TrainingState, save_pipeline
from .consistency import ConsistencyTeacher
from .data import ImageSet
from .denoiser import merge_low_rank_updates
from .hardware import device_name
from .log import TrainingLog
from .options import NUM_EVALUATED
from .streaming import StreamedImages


@dataclass
class TrainingResults:
    """Measures and saves the averaged weights of a training; each method does nothing on other processes."""

    args: argparse.Namespace
    accelerator: Accelerator
    state: TrainingState
    log: TrainingLog
    ema: EMAModel
    pipeline: PetDiffusionPipeline  # the averaged weights are copied into it
    train_set: ImageSet | StreamedImages
    held_out_set: ImageSet
    teacher: ConsistencyTeacher | None = None
    extractor: FeatureExtractor | None = None  # the features of `--evaluation_steps`
    validation_losses: dict[int, float] = field(default_factory=dict)  # by step

    def __post_init__(self) -> None:
        self.output_dir = Path(self.args.output_dir)
        self.validation_set = self.held_out_set.first(self.args.validation_images)
        self.pipeline.set_progress_bar_config(disable=True)
        self.averaged = self.pipeline.transformer

    def update_pipeline(self) -> PetDiffusionPipeline:
        """Copies the averaged weights into the pipeline, and returns the pipeline."""
        self.ema.copy_to(self.averaged.parameters())
        if self.args.lora_rank is not None:
            self.pipeline.transformer = merge_low_rank_updates(self.averaged)
        return self.pipeline

    def measure(self) -> None:
        """Validates and draws pictures if they are due after this step.

        A resumed training repeats both, and what was measured at its end if it is made longer.
        """
        if self.state.has_ended or self.state.step % self.args.validation_steps == 0:
            self.validate()
        if self.state.step % self.args.preview_steps == 0:
            self.preview()
        is_due = self.args.evaluation_steps and self.state.step % self.args.evaluation_steps == 0
        if self.extractor is not None and (self.state.has_ended or is_due):
            self.evaluate(self.extractor)

    def validate(self) -> None:
        """Measures the averaged weights, and saves them as `best` if they are the best.

        The measure is the error on held-out images or, in consistency tuning, the distance to the teacher.
        """
        if not self.accelerator.is_main_process:
            return
        pipeline = self.update_pipeline()
        by_level = {}
        with self.accelerator.autocast():
            if self.teacher is not None:
                key, loss = "teacher_distance", self.teacher.distance(pipeline, self.args.train_batch_size)
            else:
                errors = validation_loss(
                    pipeline.transformer, pipeline.scheduler, self.validation_set, self.args.train_batch_size
                )
                key, loss = "loss", sum(errors.values()) / len(errors)
                by_level = {f"validation/sigma_{sigma:.3g}": error for sigma, error in errors.items()}
        self.validation_losses[self.state.step] = loss
        self.log.write({f"validation/{key}": loss, **by_level})
        measure = "validation loss" if self.teacher is None else "distance to the teacher"
        self.accelerator.print(
            f"step {self.state.step:,}, {self.state.images:,} images, {measure} {loss:.4f}"
        )
        best = self.output_dir / "best"
        if not best.exists():  # the training may have been resumed into another folder
            self.state.best_loss = math.inf
        if loss < self.state.best_loss:  # which a loss that is not finite never is
            self.state.best_loss = loss
            save_pipeline(pipeline, best)

    def evaluate(self, extractor: FeatureExtractor) -> None:
        """Measures the kernel distance (KID) between samples of the averaged weights and held-out images.

        The samples always have the same seeds, and take no random numbers from the training.
        """
        if not self.accelerator.is_main_process:
            return
        pipeline, batch_size = self.update_pipeline(), self.args.train_batch_size
        with self.accelerator.autocast():
            generated = generate_images(pipeline, NUM_EVALUATED, batch_size, self.args.seed)
        real = image_features(self.validation_set.images, extractor, cache=True)
        kid, _ = kernel_distance(real, image_features(generated.images, extractor))
        self.log.write({"validation/kid": kid})
        self.accelerator.print(f"step {self.state.step:,}, KID of {NUM_EVALUATED} samples {kid:.4f}")

    def preview(self) -> None:
        """Draws samples and a denoising strip from the averaged weights, if pictures are wanted."""
        if not self.accelerator.is_main_process or self.args.preview_images == 0:
            return
        pipeline, step = self.update_pipeline(), self.state.step
        with self.accelerator.autocast():
            grid = sample_grid(pipeline, self.args.preview_images, self.args.seed)
            strip = denoising_strip(pipeline, self.args.seed)
        self.log.write_picture("samples", grid, f"samples-{step:06}.png")
        self.log.write_picture("denoising", strip, f"denoising-{step:06}.png")

    def save(self) -> None:
        """Saves the pipeline of the averaged weights with samples, its model card and its notebook."""
        if not self.accelerator.is_main_process:
            return
        pipeline = self.update_pipeline()
        save_pipeline(pipeline, self.output_dir)
        if self.args.lora_rank is not None:
            self.averaged.save_lora_adapter(self.output_dir / "lora")
        for name in EVALUATION_FILES:  # of earlier weights
            (self.output_dir / name).unlink(missing_ok=True)
        sample_grid(pipeline, num_images=8, seed=0).save(self.output_dir / "samples.png")
        report = TrainingReport(
            dataset_name=self.args.dataset_name,
            options=vars(self.args),
            num_train_images=None if isinstance(self.train_set, StreamedImages) else len(self.train_set),
            num_held_out_images=len(self.held_out_set),
            num_validation_images=len(self.validation_set),
            num_steps=self.state.step,
            num_images_seen=self.state.images,
            seconds=self.state.seconds,
            device=device_name(self.accelerator),
            precision=self.accelerator.mixed_precision,
            base_model=self.args.pretrained_model_name_or_path,
            validation_loss=self.validation_losses.get(self.state.step),
        )
        card = render_model_card(self.output_dir, pipeline, report)
        (self.output_dir / "README.md").write_text(card, encoding="utf-8")
        notebook = render_notebook(self.output_dir.resolve().name, pipeline)
        (self.output_dir / "notebook.ipynb").write_text(notebook, encoding="utf-8")

    def finish(self) -> None:
        """Measures the last weights, draws the last pictures, and saves the pipeline."""
        self.validate()
        self.preview()
        if self.extractor is not None:
            self.evaluate(self.extractor)
        if not self.accelerator.is_main_process:
            return
        message = f"Saved the pipeline in {self.output_dir}"
        if self.args.preview_images > 0:
            pipeline = self.update_pipeline()
            with self.accelerator.autocast():
                comparison = step_comparison(pipeline, seed=self.args.seed)
            self.log.write_picture("step_comparison", comparison, "step-comparison.png")
            self.log.write_picture("curves", loss_curves(self.log.metrics_path), "curves.png")
            message += f"; its pictures are in {self.log.samples_dir}"
        self.save()
        self.accelerator.print(message + ".")


def load_features(device: torch.device) -> FeatureExtractor:
    """Loads the features of `--evaluation_steps`, or raises `ValueError` if a package is missing."""
    try:
        import torch_fidelity  # noqa: F401, which the distance needs

        return FEATURE_EXTRACTORS["efficientnet"]().to(device)
    except ImportError as error:
        raise ValueError(f"--evaluation_steps requires the extra `eval`: {error}") from None
