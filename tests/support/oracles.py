"""Denoisers known in closed form, as models: what a perfect training would give."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline


class OracleModel(ModelMixin, ConfigMixin):
    """Turns a posterior mean D(x; σ, c) into the EDM network output F; counts calls and images."""

    sigma_data = 0.5

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        self.calls = getattr(self, "calls", 0) + 1
        self.images = getattr(self, "images", 0) + len(hidden_states)
        sigma = (4 * timestep.double()).exp().reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        x = hidden_states.double() * total
        denoised = self.denoise(x, sigma, class_labels)
        output = (denoised - self.sigma_data**2 / total**2 * x) * total / (sigma * self.sigma_data)
        output = output.to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class EmpiricalDenoiser(OracleModel):
    """The exact posterior mean over a finite set of images; the null class is all of them."""

    @register_to_config
    def __init__(self, num_images: int = 6, num_classes: int = 2, in_channels: int = 3, sample_size: int = 8):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(num_images, in_channels, sample_size, sample_size, generator=generator) * 2 - 1
        self.register_buffer("data", images.double())
        self.register_buffer("labels", torch.arange(num_images) % num_classes)
        self.placeholder = torch.nn.Parameter(torch.zeros(1))

    def denoise(self, x, sigma, class_labels):
        distances = (x.unsqueeze(1) - self.data).square().sum((2, 3, 4))  # (N, M)
        logits = -distances / (2 * sigma.reshape(-1, 1) ** 2)
        other = (class_labels.unsqueeze(1) != self.labels) & (
            class_labels.unsqueeze(1) != self.config.num_classes
        )
        weights = logits.masked_fill(other, -torch.inf).softmax(1)
        return torch.einsum("nm,mchw->nchw", weights, self.data)


class GaussianDenoiser(OracleModel):
    """Class c is the Gaussian N(mean_c, std² I), with means at ±0.5; the null class is N(0, std² I)."""

    @register_to_config
    def __init__(self, std: float = 0.3, num_classes: int = 2, in_channels: int = 3, sample_size: int = 8):
        super().__init__()
        self.placeholder = torch.nn.Parameter(torch.zeros(1))

    def mean(self, class_labels):
        means = torch.tensor([-0.5, 0.5, 0.0], dtype=torch.float64)
        return means[class_labels].reshape(-1, 1, 1, 1)

    def denoise(self, x, sigma, class_labels):
        mean = self.mean(class_labels)
        return mean + self.config.std**2 / (self.config.std**2 + sigma**2) * (x - mean)

    def solve(self, x, sigma_from, sigma_to, class_labels):
        """The exact solution of the probability-flow ODE from one noise level to another."""
        mean, std = self.mean(class_labels), self.config.std
        return mean + ((std**2 + sigma_to**2) / (std**2 + sigma_from**2)) ** 0.5 * (x - mean)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def oracle_pipeline(model, **kwargs):
    pipe = PetDiffusionPipeline(model, AdaptiveEDMScheduler(**kwargs), id2label={0: "cat", 1: "dog"})
    pipe.set_progress_bar_config(disable=True)
    return pipe
