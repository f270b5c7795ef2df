"""A small residual network that classifies images, as an independent judge of generated images."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


BUNDLED_CLASSIFIER = Path(__file__).parent.parent / "pretrained_classifier"


class PetClassifier(ModelMixin, ConfigMixin):
    """Residual network of eight 3×3 convolutions with batch normalisation (after He et al. 2016).

    The network shares nothing with the diffusion model, so that it can judge the images of that model.
    `PetClassifier.from_pretrained(BUNDLED_CLASSIFIER)` loads the network that
    `tests/benchmarks/train_classifier.py` trained on cats and dogs.

    Args:
        class_names (`list[str]`, defaults to `["cat", "dog"]`): names of the classes, in the order of the
            logits.
        in_channels (`int`, defaults to 3): number of channels of the images.
        width (`int`, defaults to 32): channels of the first convolution. The last convolutions have four
            times as many.
        sample_size (`int`, defaults to 32): height and width of the training images in pixels.
    """

    @register_to_config
    def __init__(
        self,
        class_names: Sequence[str] = ("cat", "dog"),
        in_channels: int = 3,
        width: int = 32,
        sample_size: int = 32,
    ) -> None:
        super().__init__()
        self.conv_in = convolution(in_channels, width)
        self.down1 = convolution(width, 2 * width)
        self.residual1 = nn.Sequential(convolution(2 * width, 2 * width), convolution(2 * width, 2 * width))
        self.down2 = convolution(2 * width, 4 * width)
        self.down3 = convolution(4 * width, 4 * width)
        self.residual2 = nn.Sequential(convolution(4 * width, 4 * width), convolution(4 * width, 4 * width))
        self.proj_out = nn.Linear(4 * width, len(class_names))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits `(batch, classes)` of images `(batch, channels, height, width)` in [-1, 1]."""
        hidden_states = self.conv_in(images)
        hidden_states = F.max_pool2d(self.down1(hidden_states), 2)
        hidden_states = hidden_states + self.residual1(hidden_states)
        hidden_states = F.max_pool2d(self.down2(hidden_states), 2)
        hidden_states = F.max_pool2d(self.down3(hidden_states), 2)
        hidden_states = hidden_states + self.residual2(hidden_states)
        return self.proj_out(hidden_states.amax((2, 3)))


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """Returns a 3×3 convolution, followed by batch normalisation and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
