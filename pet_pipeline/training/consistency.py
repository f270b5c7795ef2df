"""Consistency tuning: a trained denoiser learns to reach the image from any noise level in one step.

The objective is that of Song et al. (2023), "Consistency Models", algorithm 2: a student, which is its own
target one noise level lower, learns what a teacher does in many steps. The distance of the two levels follows
Geng et al. (2024), "Consistency Models Made Easy" (ECT). The teacher is guided, and so its guidance is built
into the student, which needs one evaluation a step.
"""

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import image_generators
from ..scheduling_adaptive_edm import AdaptiveEDMScheduler


# The parameters q, k and b of ECT (equations 15 and 16), at the end of its schedule.
LEVEL_RATIO, LEVEL_GROWTH, LEVEL_SHARPNESS = 256, 8, 1


def lower_levels(sigmas: torch.Tensor) -> torch.Tensor:
    """Returns the noise level at which the student is its own target, of shape `(batch,)`.

    It is lower than `sigmas` by 1/256 of them at high noise, and by up to 5/256 at low noise.
    """
    growth = 1 + LEVEL_GROWTH * torch.sigmoid(-LEVEL_SHARPNESS * sigmas)
    return sigmas * (1 - growth / LEVEL_RATIO)


class ConsistencyTeacher:
    """A frozen pipeline, with the guidance in its config, that a student of the same images imitates.

    Args:
        pipeline ([`PetDiffusionPipeline`]): the teacher. Its models are changed: they no longer learn.
        num_validation_images (`int`): number of images that [`distance`] compares.
    """

    def __init__(self, pipeline: PetDiffusionPipeline, num_validation_images: int = 64) -> None:
        self.pipeline = pipeline
        self.num_validation_images = num_validation_images
        self._solutions: torch.Tensor | None = None
        for model in (pipeline.transformer, pipeline.guide):
            if model is not None:
                model.eval().requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.set_guidance()
        pipeline.check_inputs()

    @torch.no_grad()
    def denoise(self, noisy_images: torch.Tensor, labels: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Returns the guided denoised images.

        Args:
            noisy_images (`torch.Tensor` of shape `(batch, channels, height, width)`): images x = y + σ·n.
            labels (`torch.Tensor` of shape `(batch,)`): their classes.
            sigmas (`torch.Tensor` of shape `(batch,)`): their noise levels σ.
        """
        scheduler = self.pipeline.scheduler
        output = self.pipeline.guided_output(
            scheduler.precondition_inputs(noisy_images, sigmas),
            scheduler.precondition_noise(sigmas),
            labels,
            torch.full_like(labels, self.pipeline.null_class_id),
            sigmas.tolist(),
        )
        return scheduler.precondition_outputs(noisy_images, output, sigmas)

    @torch.no_grad()
    def target(
        self,
        student: ModelMixin,
        scheduler: AdaptiveEDMScheduler,
        noisy_images: torch.Tensor,
        labels: torch.Tensor,
        sigmas: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the images that the student should find in noisy images; see [`denoise`].

        The teacher takes a step of Euler's method to [`lower_levels`], and the student denoises the result.
        """
        lower = lower_levels(sigmas)
        ratio = (lower / sigmas).reshape(-1, 1, 1, 1)
        denoised = self.denoise(noisy_images, labels, sigmas)
        less_noisy_images = denoised + ratio * (noisy_images - denoised)
        model_input = scheduler.precondition_inputs(less_noisy_images, lower)
        # The dropout of the target is that of the student's next evaluation, as in ECT.
        devices = [noisy_images.device] if noisy_images.is_cuda else []
        with torch.random.fork_rng(devices):
            output = student(model_input, scheduler.precondition_noise(lower), labels, return_dict=False)[0]
        return scheduler.precondition_outputs(less_noisy_images, output.float(), lower)

    def distance(self, student: PetDiffusionPipeline) -> float:
        """Returns how far the student's single step is from the teacher's image of the same noise.

        It is the root mean square over [`num_validation_images`] images in [-1, 1], of each class in turn.
        """
        labels = [index % self.pipeline.null_class_id for index in range(self.num_validation_images)]

        def draw(pipeline: PetDiffusionPipeline, num_steps: int | None) -> torch.Tensor:
            generator = image_generators(len(labels))
            return pipeline(labels, num_steps, generator=generator, output_type="latent").images

        if self._solutions is None:
            self._solutions = draw(self.pipeline, None)
        difference = draw(student, 1).clamp(-1, 1) - self._solutions.clamp(-1, 1)
        return difference.square().mean().sqrt().item()


def consistency_weights(sigmas: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Returns the weights of ECT, 1/(σ - [`lower_levels`]) for the error of an image, of shape `(batch,)`.

    The factor c_out² makes them weights for the error of the network's output.
    """
    c_out_squared = sigmas**2 * sigma_data**2 / (sigmas**2 + sigma_data**2)
    return c_out_squared / (sigmas - lower_levels(sigmas))
