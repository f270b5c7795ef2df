"""Consistency tuning: a trained denoiser learns to reach the image from any noise level in one step.

What is learned is a consistency function (Song et al. 2023, "Consistency Models"), which maps every point of
a trajectory of the probability-flow ODE to the trajectory's end. A frozen teacher draws an image, and the
student learns to find this image in each noisy image on the way. Luhman and Luhman (2021), "Knowledge
Distillation in Iterative Generative Models for Improved Sampling Speed", do so from the start of a trajectory
alone. The teacher is guided, and so its guidance is built into the student, which needs one evaluation for
each step.
"""

import hashlib

import torch

from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import generate, model_digests
from ..scheduling_adaptive_edm import AdaptiveEDMScheduler


NUM_STEPS = 13  # of the teacher
NUM_HIGH = 10  # the first levels of a trajectory, to about σ = 0.17; the student is called at few lower ones
NUM_LEVELS = 8  # so many of these are learned at once: the first, and others at random
JITTER = 0.3  # levels move towards a neighbour by up to this fraction of the way, in ln σ
NUM_DISTANCE_IMAGES = 64


class ConsistencyTeacher:
    """A frozen pipeline, with the guidance in its config, that a student of the same images imitates.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the teacher. Its models are changed: they no longer learn.

    Raises:
        ValueError: if the pipeline has a guider or was itself tuned.
    """

    def __init__(self, pipeline: PetDiffusionPipeline) -> None:
        if pipeline.guider is not None or pipeline.is_tuned:
            raise ValueError("A teacher must be a pipeline without a guider that was not tuned to few steps.")
        self.pipeline = pipeline
        self._solutions: torch.Tensor | None = None
        for model in (pipeline.transformer, pipeline.guide):
            if model is not None:
                model.eval().requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.set_guidance()
        pipeline.check_inputs()

    @property
    def digest(self) -> str:
        """A short hash of what the student learns: the teacher's weights and guidance."""
        config = self.pipeline.config
        guidance = [config.guidance_scale, config.pag_scale, config.autoguidance_scale]
        return hashlib.sha256(f"{model_digests(self.pipeline)} {guidance}".encode()).hexdigest()[:16]

    @torch.no_grad()
    def trajectories(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws images, and returns the noisy images on the way.

        Args:
            images (`torch.Tensor` of shape `(batch, channels, height, width)`): images in [-1, 1], of which
                the first `batch` / 8 are starting points, under noise of the highest level.
            labels (`torch.Tensor` of shape `(batch,)`): their classes.

        Returns:
            `tuple`: 8 noisy images of each trajectory, their classes and noise levels σ, and the images that
            were drawn, once for each noisy image; each of the length of `batch`, if 8 divides it. The first
            noisy image is the starting point, and the others are a random choice of the next 9.
        """
        number = max(1, len(images) // NUM_LEVELS)
        images, labels = images[:number], labels[:number]
        config = self.pipeline.scheduler.config
        scheduler = AdaptiveEDMScheduler.from_config(config, solver="multistep", s_churn=0.0)
        scheduler.set_timesteps(NUM_STEPS)
        logs = scheduler.sigmas[:-1].log()
        steps, moves = logs.diff(), JITTER * (2 * torch.rand(NUM_STEPS - 2) - 1)
        logs[1:-1] += moves * torch.where(moves > 0, steps[1:], steps[:-1])
        levels = logs.exp()
        scheduler.set_timesteps(sigmas=levels, device=images.device)
        scheduler.set_begin_index(0)
        null_labels = torch.full_like(labels, self.pipeline.null_class_id)
        sample = images + levels[0] * torch.randn_like(images)
        noisy_images = []
        for timestep, sigma in zip(scheduler.timesteps, levels.tolist()):
            noisy_images.append(sample)
            model_input = scheduler.scale_model_input(sample, timestep)
            output = self.pipeline.guided_output(model_input, timestep, labels, null_labels, sigma)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        others = torch.randperm(NUM_HIGH - 1)[: NUM_LEVELS - 1].sort().values
        learned = [0, *(1 + others).tolist()]
        return (
            torch.cat([noisy_images[index] for index in learned]),
            labels.repeat(NUM_LEVELS),
            levels[learned].to(images.device).repeat_interleave(number),
            sample.clamp(-1, 1).repeat(NUM_LEVELS, 1, 1, 1),
        )

    def distance(self, student: PetDiffusionPipeline, batch_size: int = 64) -> float:
        """Returns how far the student's single step is from the teacher's image of the same noise.

        It is the root mean square over 64 images in [-1, 1], of each class in turn.
        """
        labels_and_seeds = [(index % student.null_class_id, index) for index in range(NUM_DISTANCE_IMAGES)]

        def draw(pipeline: PetDiffusionPipeline, num_steps: int | None) -> torch.Tensor:
            options = {"num_inference_steps": num_steps, "output_type": "latent"}
            drawn = generate(pipeline, labels_and_seeds, batch_size, **options)
            return torch.stack([image for _, _, image in drawn]).clamp(-1, 1)

        if self._solutions is None:
            self._solutions = draw(self.pipeline, None)
        return (draw(student, 1) - self._solutions).square().mean().sqrt().item()
