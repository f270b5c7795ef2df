"""BalancedAdaptiveLoss: five terms of the denoising error, weighted by the noise level of each sample.

The preconditioned regression follows Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based
Generative Models". The learned weighting of noise levels follows Karras et al. (2024), "Analyzing and
Improving the Training Dynamics of Diffusion Models" (EDM2, equation 21).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import BaseOutput
from torch import nn


# The weights of the terms by preset. All terms but `mse` fade out towards high noise. A new term needs a
# weight here and its value in `output_terms`.
PRESETS: dict[str, dict[str, float]] = {
    "balanced": {"mse": 0.5, "l1": 0.15, "cosine": 0.1, "high_frequency": 0.1, "edge": 0.15},
    "mse": {"mse": 1.0},
}


@dataclass
class BalancedAdaptiveLossOutput(BaseOutput):
    """What [`BalancedAdaptiveLoss`] returns.

    Args:
        loss (`torch.Tensor`, scalar): the objective, which `backward` is called on.
        sample_losses (`torch.Tensor` of shape `(batch,)`): the loss of each sample with the learned weight
            and without the importance weight, detached. [`AdaptiveEDMScheduler.update_training_losses`] takes
            these losses.
        terms (`dict[str, torch.Tensor]`): the mean of each term for the log, detached. The means have the
            importance weights only, so that trainings with and without an adaptive draw can be compared.
    """

    # All but the first are optional, since Accelerate rebuilds an output from one dictionary.
    loss: torch.Tensor
    sample_losses: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] | None = None


class BalancedAdaptiveLoss(nn.Module):
    r"""MSE, L1, cosine, high-frequency and edge terms in the unit-variance space of the network's output.

    With $u = F - F^*$, $g(\sigma) = \sigma_d^2 / (\sigma^2 + \sigma_d^2)$ and
    $\rho(u) = \sqrt{u^2 + \delta^2} - \delta$, the loss of one sample is

    $L = [w_{mse} \overline{u^2} + g (w_{l1} \overline{\rho(u)} + w_{cos} (1 - \cos(F, F^*))
    + w_{hf} \overline{(\Delta u)^2} / 20 + w_{edge} \overline{(S_x u)^2 + (S_y u)^2} / 24)]
    / [w_{mse} + g (w_{l1} + w_{cos} + w_{hf} + w_{edge})]$,

    where Δ is the 4-neighbour Laplacian and S are Sobel filters. Their energies are 20 and 24, so that every
    quadratic term equals the first term on white noise. Quadratic terms are minimal at the posterior mean
    E[y|x], which sampling needs. The L1 and cosine terms have other minima. The gate g limits them to low
    noise, where the output is scaled by a small c_out and their bias is harmless.

    The objective is the mean of $L e^{-s(\sigma)} + s(\sigma)$. The learned s balances the noise levels
    (Karras et al. 2024, equation 21).

    Args:
        preset (`str`, defaults to `"balanced"`): `"balanced"`, or `"mse"` for the first term alone.
        sigma_data (`float`, defaults to 0.5): standard deviation of the data.
        learned_weighting (`bool`, defaults to `True`): learn s(σ); otherwise it is 0.
        delta (`float`, defaults to 0.1): the error below which the L1 term is quadratic.

    Raises:
        ValueError: if there is no such preset.
    """

    def __init__(
        self,
        preset: str = "balanced",
        sigma_data: float = 0.5,
        learned_weighting: bool = True,
        delta: float = 0.1,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise ValueError(f"There is no loss preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        self.preset = preset
        self.sigma_data = sigma_data
        self.delta = delta
        self.logvar = nn.Linear(128, 1) if learned_weighting else None
        if self.logvar is not None:
            nn.init.zeros_(self.logvar.weight)
            nn.init.zeros_(self.logvar.bias)

    def forward(
        self,
        model_output: torch.Tensor,
        target: torch.Tensor,
        sigmas: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> BalancedAdaptiveLossOutput:
        """Computes the objective of a batch.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): the network's output F.
            target (`torch.Tensor` of the same shape): F*, see [`AdaptiveEDMScheduler.training_target`].
            sigmas (`torch.Tensor` of shape `(batch,)`): noise levels σ.
            weights (`torch.Tensor` of shape `(batch,)`, *optional*): importance weights of the samples.

        Returns:
            [`BalancedAdaptiveLossOutput`]
        """
        terms = output_terms(model_output.float(), target.float(), self.delta)
        gate = self.sigma_data**2 / (sigmas**2 + self.sigma_data**2)
        term_weights = {
            name: weight * (torch.ones_like(gate) if name == "mse" else gate)
            for name, weight in PRESETS[self.preset].items()
        }
        total_weight = sum(term_weights.values())
        losses = sum(term_weights[name] * terms[name] for name in term_weights) / total_weight  # (N,)

        logvar = self._logvar(sigmas)
        weighted = losses * (-logvar).exp()
        objective = weighted + logvar
        loss = (objective if weights is None else objective * weights).mean()
        return BalancedAdaptiveLossOutput(
            loss=loss,
            sample_losses=weighted.detach(),
            terms={
                name: (term.detach() if weights is None else term.detach() * weights).mean()
                for name, term in terms.items()
            },
        )

    def _logvar(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Returns s(σ) of shape `(batch,)`, linear in Fourier features of c_noise."""
        if self.logvar is None:
            return torch.zeros_like(sigmas)
        features = get_timestep_embedding(
            sigmas.log() / 4, 128, downscale_freq_shift=0, scale=10.0, max_period=100
        )
        with torch.autocast(sigmas.device.type, enabled=False):
            return self.logvar(features).squeeze(-1)


class DenoiserWithLoss(nn.Module):
    """The denoiser and the loss as one module, whose forward returns the losses of a batch.

    Accelerate prepares this module. Fully sharded training takes one module only, and distributed training
    takes no module without parameters, such as a loss without learned weighting.
    """

    def __init__(self, transformer: nn.Module, loss_function: BalancedAdaptiveLoss) -> None:
        super().__init__()
        self.transformer = transformer
        self.loss_function = loss_function

    def forward(
        self,
        model_input: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        target: torch.Tensor,
        sigmas: torch.Tensor,
        weights: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> BalancedAdaptiveLossOutput:
        """Computes the losses of a batch from `model_input` c_in·x and `timesteps` c_noise.

        `augment_labels` are for a denoiser that takes them. The other arguments are those of
        [`BalancedAdaptiveLoss.forward`].
        """
        conditions = {} if augment_labels is None else {"augment_labels": augment_labels}
        model_output = self.transformer(
            model_input, timesteps, class_labels, return_dict=False, **conditions
        )[0]
        return self.loss_function(model_output.float(), target, sigmas, weights=weights)


def output_terms(model_output: torch.Tensor, target: torch.Tensor, delta: float) -> dict[str, torch.Tensor]:
    """Returns the terms of the loss in the space of the network's output, each of shape `(batch,)`."""
    error = model_output - target
    laplacian, sobel_x, sobel_y = image_derivatives(error)
    return {
        "mse": error.square().mean((1, 2, 3)),
        "l1": ((error.square() + delta**2).sqrt() - delta).mean((1, 2, 3)),
        "cosine": 1 - cosine_similarity(model_output, target),
        "high_frequency": laplacian.square().mean((1, 2, 3)) / 20,
        "edge": (sobel_x.square() + sobel_y.square()).mean((1, 2, 3)) / 24,
    }


def cosine_similarity(a: torch.Tensor, b: torch.Tensor, floor: float = 0.1) -> torch.Tensor:
    """Returns the cosine of the angle between images, of shape `(batch,)`.

    A root mean square below `floor` counts as `floor`. The floor is applied before the root, which keeps the
    gradient finite at zero, where the output of the network starts.
    """
    norm_a, norm_b = (x.square().mean((1, 2, 3)).clamp(min=floor**2).sqrt() for x in (a, b))
    return (a * b).mean((1, 2, 3)) / (norm_a * norm_b)


def image_derivatives(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the 4-neighbour Laplacian and the two Sobel derivatives of each channel, edges reflected."""
    kernels = images.new_tensor(
        [
            [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
            [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]],
            [[-1, -2, -1], [0, 0, 0], [1, 2, 1]],
        ]
    ).unsqueeze(1)  # (3, 1, 3, 3)
    batch, channels, height, width = images.shape
    padded = F.pad(images.reshape(batch * channels, 1, height, width), (1, 1, 1, 1), mode="reflect")
    with torch.autocast(images.device.type, enabled=False):
        filtered = F.conv2d(padded, kernels).unflatten(0, (batch, channels))  # (N, C, 3, H, W)
    laplacian, sobel_x, sobel_y = filtered.unbind(2)
    return laplacian, sobel_x, sobel_y
