"""Geometric changes of training images: they are what their labels say, and the model is told of them."""

import json
from pathlib import Path

import pytest
import torch
from conftest import random_model
from support.training_process import train

from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.training.augmentation import random_affine


def test_without_augmentation_images_stay_as_they_are():
    images = torch.rand(20, 3, 8, 8) * 2 - 1
    changed, labels = random_affine(images, 0.0)
    assert torch.equal(changed, images) and torch.equal(labels, torch.zeros(20, 6))


def test_labels_are_the_map_from_the_new_image_to_the_old_one():
    """A plane of brightness shows where each pixel came from, as long as that is inside the old image."""
    torch.manual_seed(0)
    centres = (torch.arange(32) + 0.5) / 16 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    images = torch.stack([x, y, 0 * x]).expand(50, -1, -1, -1)
    changed, labels = random_affine(images, 1.0)
    maps = labels.unflatten(1, (2, 3)) + torch.eye(2, 3)
    sources = torch.einsum("nij,jhw->nihw", maps, torch.stack([x, y, torch.ones_like(x)]))
    inside = (sources.abs() < 0.9).all(1, keepdim=True).expand(-1, 2, -1, -1)
    assert inside.float().mean() > 0.5
    # A pixel is 0.0625 wide. The cubic kernel of PyTorch bends a plane a little.
    torch.testing.assert_close(changed[:, :2][inside], sources[inside], rtol=0, atol=0.005)
    assert changed.isfinite().all() and changed.abs().max() <= 1


def test_each_change_has_its_probability():
    torch.manual_seed(0)
    _, labels = random_affine(torch.zeros(20_000, 1, 2, 2), 0.12)
    unchanged = (labels == 0).all(1).float().mean().item()
    # Four changes of this probability, and mirroring, which has half of it.
    assert unchanged == pytest.approx(0.88**4 * 0.94, abs=0.015)
    shifted = (labels[:, [2, 5]] != 0).any(1).float().mean().item()
    assert shifted == pytest.approx(0.12, abs=0.01)
    determinants = torch.linalg.det(labels.unflatten(1, (2, 3))[..., :2] + torch.eye(2))
    assert (determinants < 0).float().mean().item() == pytest.approx(0.06, abs=0.01)


def test_the_model_takes_zeros_for_unchanged_images_and_starts_without_a_difference():
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    model = random_model(augment_dim=6)
    expected = model(images, 0.1, labels).sample
    assert torch.equal(model(images, 0.1, labels, augment_labels=torch.zeros(2, 6)).sample, expected)
    assert not torch.allclose(model(images, 0.1, labels, augment_labels=torch.ones(2, 6)).sample, expected)
    model.initialize_weights()
    assert not model.augment_embedding.weight.any()
    with pytest.raises(ValueError, match="`augment_labels` are for models with an `augment_dim`"):
        random_model()(images, 0.1, labels, augment_labels=torch.zeros(2, 6))


def test_training_with_augmentation_and_fine_tuning_with_and_without(image_folder, tmp_path):
    train(image_folder, tmp_path / "out", augmentation_probability=0.5)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["augment_dim"] == 6
    learned = augment_weights(tmp_path / "out")
    assert learned.any()
    for name, probability in (("more", 0.5), ("plain", 0.0)):
        train(
            image_folder,
            tmp_path / name,
            pretrained_model_name_or_path=tmp_path / "out",
            augmentation_probability=probability,
            model_config=None,
        )
    assert not torch.equal(augment_weights(tmp_path / "more"), learned)
    assert torch.equal(augment_weights(tmp_path / "plain"), learned)


def augment_weights(folder: Path) -> torch.Tensor:
    """The weights of a saved pipeline for the labels of the changes."""
    return PetDiffusionPipeline.from_pretrained(folder).transformer.augment_embedding.weight


def test_a_model_that_knows_no_augmentation_is_refused(image_folder, saved, tmp_path):
    with pytest.raises(ValueError, match="--augmentation_probability needs a new model, or one that was"):
        train(
            image_folder,
            tmp_path / "out",
            pretrained_model_name_or_path=saved,
            augmentation_probability=0.5,
            model_config=None,
        )
    assert not (tmp_path / "out").exists()
