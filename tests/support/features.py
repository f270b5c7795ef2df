"""Image features that need no network and no weights."""

import torch
from torch import nn


class Pixels(nn.Module):
    """Features that are the means of 4×4 parts of the image."""

    name = "Pixels"
    num_features = 48

    def __init__(self):
        super().__init__()
        self.placeholder = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
