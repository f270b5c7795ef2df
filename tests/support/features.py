"""Image features that need no network and no weights."""

import torch
from torch import nn


class Pixels(nn.Module):
    """Features that are the means of 2×2 blocks."""

    name = "Pixels"
    num_features = 48

    def __init__(self):
        super().__init__()
        self.placeholder = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return nn.functional.avg_pool2d(images.float() / 255, 2).flatten(1)
