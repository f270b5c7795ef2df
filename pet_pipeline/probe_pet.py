"""PetLinearProbe: tells the classes of images apart by the output of a block of the denoiser.

The features of a denoising network at a low noise level separate classes linearly (Xiang et al. 2023,
"Denoising Diffusion Autoencoders are Unified Self-supervised Learners"), so that an image is classified by a
few evaluations of a part of the network, instead of many evaluations for each class.

This file travels inside every saved checkpoint: it imports PyTorch, diffusers and the standard library only.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class PetLinearProbe(ModelMixin, ConfigMixin):
    """A linear layer from features of a denoiser to the log-odds of the classes.

    [`PetClassificationPipeline.image_features`] computes the features. `pet-pipeline calibrate` fits a probe.

    Args:
        num_classes (`int`, defaults to 2): classes.
        token_dim (`int`, defaults to 192): channels of a token.
        layer (`int`, defaults to 0): index of the block of the denoiser.
        sigmas (`list[float]`, defaults to `[0.1]`): noise levels σ, for images in [-1, 1].

    Raises:
        ValueError: if an argument is out of range; the message names it.
    """

    @register_to_config
    def __init__(
        self, num_classes: int = 2, token_dim: int = 192, layer: int = 0, sigmas: list[float] = [0.1]
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("num_classes", num_classes, 2),
            ("token_dim", token_dim, 1),
            ("layer", layer, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= 10**9:
                raise ValueError(f"`{name}` must be an integer of at least {low}, but is {value!r}.")
        if (
            not isinstance(sigmas, (list, tuple))
            or not sigmas
            or not all(type(sigma) in (int, float) and 0 < sigma < math.inf for sigma in sigmas)
        ):
            raise ValueError(f"`sigmas` must be positive numbers, but is {sigmas!r:.100}.")
        self.linear = nn.Linear(2 * token_dim * len(sigmas), num_classes)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads a saved probe from safetensors; see [`ModelMixin.from_pretrained`].

        Raises:
            ValueError: if the file lacks weights, which would otherwise be random.
        """
        kwargs.setdefault("use_safetensors", True)
        return_info = kwargs.pop("output_loading_info", False)
        probe, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        if info["missing_keys"]:
            missing = ", ".join(info["missing_keys"])
            raise ValueError(f"The weights in {str(pretrained_model_name_or_path)!r} lack {missing}.")
        return (probe, info) if return_info else probe

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps features `(batch, sigmas * 2 * token_dim)` to log-odds `(batch, num_classes)`."""
        return self.linear(features)
