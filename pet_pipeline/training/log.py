"""The log of a training: `metrics.jsonl`, pictures and the tracker."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from .checkpointing import TrainingState, trim_log
from .losses import BalancedAdaptiveLossOutput


class TrainingLog:
    """Writes the numbers and pictures of a training to its folder and to the tracker.

    At the beginning, what a resumed training will write again is removed from `metrics.jsonl`.
    """

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace, state: TrainingState) -> None:
        self.accelerator = accelerator
        self.state = state
        self.metrics_path = Path(args.output_dir) / "metrics.jsonl"
        self.samples_dir = Path(args.output_dir) / "samples"
        if accelerator.is_main_process:
            self.samples_dir.mkdir(exist_ok=True)
            trim_log(self.metrics_path, state.step)
        if args.report_to is not None:
            config = {
                name: value
                for name, value in vars(args).items()
                if isinstance(value, (int, float, str, bool)) and name != "hub_token"
            }
            accelerator.init_trackers(args.tracker_project_name, config=config)
        self.restart_means()

    def write(self, values: dict[str, float]) -> None:
        """Writes numbers to `metrics.jsonl` and to the tracker."""
        if self.accelerator.is_main_process:
            state = self.state
            progress = {"step": state.step, "images": state.images, "seconds": round(state.seconds, 1)}
            with self.metrics_path.open("a") as file:
                file.write(json.dumps({**progress, **values}) + "\n")
        self.accelerator.log(values, step=self.state.step)

    def write_picture(self, name: str, image: Image.Image, file_name: str) -> None:
        """Writes a picture to the folder `samples` and to the tracker; on the main process."""
        image.save(self.samples_dir / file_name)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=self.state.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image]}, step=self.state.step)
            elif tracker.name == "trackio":  # its tracker of Accelerate takes values only
                import trackio

                tracker.log({name: trackio.Image(image)}, step=self.state.step)

    def add(self, losses: BalancedAdaptiveLossOutput) -> None:
        """Adds the losses of a micro-step to the running means."""
        terms = {f"train/term_{name}": term for name, term in (losses.terms or {}).items()}
        for name, value in {"train/loss": losses.loss.detach(), **terms}.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._num_summed += 1

    def restart_means(self) -> None:
        """Begins the running means anew."""
        self._sums: dict[str, torch.Tensor] = {}
        self._num_summed = 0
        self._began, self._images_at_begin = time.monotonic(), self.state.images

    def write_means(self, learning_rate: float) -> dict[str, float]:
        """Writes and returns the means since the last call, and begins them anew.

        Every process must call this method. `learning_rate` is that of the next step.
        """
        means = {
            name: self.accelerator.reduce(value / self._num_summed, "mean").item()
            for name, value in self._sums.items()
        }
        means["train/learning_rate"] = learning_rate
        means["train/images_per_second"] = (self.state.images - self._images_at_begin) / (
            time.monotonic() - self._began
        )
        self.write(means)
        self.restart_means()
        return means

    def write_skipped_step(self, sigmas: torch.Tensor, sample_losses: torch.Tensor) -> None:
        """Reports a step without finite gradients, with the noise levels at which its losses are not finite.

        Both tensors have one entry for each image. The running means begin anew, so that they are of finite
        losses.
        """
        is_bad = ~sample_losses.isfinite()
        if is_bad.any():
            sigmas, cause = sigmas[is_bad], f"{int(is_bad.sum())} of {len(sigmas)} losses are"
        else:
            cause = "a gradient is"
        low, high = sigmas.min().item(), sigmas.max().item()
        self.write({"train/skipped_sigma_min": low, "train/skipped_sigma_max": high})
        self.accelerator.print(
            f"step {self.state.step + 1:,} is skipped: {cause} not finite, at σ from {low:.3g} to {high:.3g}"
        )
        self._sums, self._num_summed = {}, 0
