"""Random geometric changes of training images, of which the model is told (Karras et al. 2022, F.2)."""

import math

import torch
import torch.nn.functional as F


NUM_AUGMENT_LABELS = 6  # entries of an affine map of the plane

# Standard deviations of the base-2 logarithm of the sizes and of shifts as fractions of the image, as EDM has
# them.
SCALE_STD, SHIFT_STD = 0.2, 0.125


def random_affine(images: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirrors, scales, turns, stretches and shifts images, each of these with a probability of its own.

    A model that is given the labels learns the changes as a condition. It draws without them when the labels
    are zero, those of an unchanged image.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): floating images. What lies
            outside an image is filled by reflection.
        probability (`float`): probability of each of the five changes, in [0, 1]. Vertical mirroring, the
            first, has half of it.

    Returns:
        `tuple`: the changed images, and labels of shape `(batch, 6)`: what the affine map from coordinates of
        the new image to those of the old one adds to the identity, row by row, where an image spans [-1, 1].
    """

    def chosen(values: torch.Tensor) -> torch.Tensor:
        is_chosen = torch.rand(len(images), device=images.device) < probability
        return torch.where(is_chosen, values, 0.0)

    def normal(std: float) -> torch.Tensor:
        return std * torch.randn(len(images), device=images.device)

    def angle() -> torch.Tensor:
        return math.pi * (2 * torch.rand(len(images), device=images.device) - 1)

    mirror = 1 - 2 * chosen(torch.randint(2, (len(images),), device=images.device).float())
    ones = torch.ones_like(mirror)
    maps = diagonal(ones, mirror)
    scale = torch.exp2(chosen(normal(SCALE_STD)))
    maps = maps @ diagonal(scale, scale)
    maps = maps @ rotation(chosen(angle()))
    stretch, direction = torch.exp2(chosen(normal(SCALE_STD))), angle()
    maps = maps @ rotation(direction) @ diagonal(stretch, 1 / stretch) @ rotation(-direction)
    is_shifted = chosen(ones)
    shifts = torch.stack([2 * is_shifted * normal(SHIFT_STD) for _ in range(2)], 1)
    labels = torch.cat([maps - torch.eye(2, device=images.device), shifts.unsqueeze(-1)], 2)  # (N, 2, 3)

    labels = labels.round(decimals=5)  # zero where only rounding differs from the identity
    grid = F.affine_grid(
        labels + torch.eye(2, 3, device=images.device), list(images.shape), align_corners=False
    )
    changed = F.grid_sample(images, grid, "bicubic", "reflection", align_corners=False).clamp(-1, 1)
    is_changed = labels.flatten(1).any(1).reshape(-1, 1, 1, 1)
    return torch.where(is_changed, changed, images), labels.flatten(1)


def rotation(angles: torch.Tensor) -> torch.Tensor:
    """Returns rotation matrices `(batch, 2, 2)` for angles in radians."""
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack([cosines, -sines, sines, cosines], 1).unflatten(1, (2, 2))


def diagonal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns diagonal matrices `(batch, 2, 2)`."""
    return torch.diag_embed(torch.stack([x, y], 1))
