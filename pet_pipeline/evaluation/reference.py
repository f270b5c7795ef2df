"""The real images that an evaluation compares generated images with."""

from dataclasses import dataclass
from typing import Any

import torch

from ..training.data import ImageDataset, ImageSet, load_if_small, open_image_dataset, stratified_split


@dataclass
class Reference:
    """The real images of an evaluation.

    Args:
        train ([`ImageSet`]): the images that `train_pet.py` trains on, among which copies are looked for.
        validation ([`ImageSet`]): the images that `train_pet.py` holds out.
        images ([`ImageSet`]): the images that generated images are compared with.
    """

    train: ImageSet
    validation: ImageSet
    images: ImageSet


def load_reference(
    dataset_name: str,
    classes: list[str],
    resolution: int,
    split: str = "train",
    validation_fraction: float = 0.1,
    max_train_samples: int | None = None,
    train_split: str = "train",
    **kwargs: Any,
) -> Reference:
    """Loads a data set for an evaluation, split as `train_pet.py` splits it.

    Images that would take more than half of the free memory are decoded when they are needed.

    Args:
        dataset_name (`str`), classes (`list[str]`), resolution (`int`): see [`open_image_dataset`].
        split (`str`, defaults to `"train"`): the images that generated images are compared with: `"train"`
            for those trained on, `"validation"` for those held out, or another split of the data set.
        validation_fraction (`float`, defaults to 0.1), max_train_samples (`int`, *optional*): those of the
            training, see [`stratified_split`] and `max_samples` of [`open_image_dataset`].
        train_split (`str`, defaults to `"train"`): the split of the data set that the training was given.
        kwargs: further arguments of [`open_image_dataset`].
    """
    dataset = open_image_dataset(
        dataset_name, classes, resolution, train_split, max_samples=max_train_samples, **kwargs
    )
    train, validation = load_if_small(stratified_split(dataset, validation_fraction))
    if split == "train":
        images: ImageSet = train
    elif split == "validation":
        images = validation
    else:
        images = open_image_dataset(dataset_name, classes, resolution, split, **kwargs)
    return Reference(train, validation, images)


def num_balanced(dataset: ImageSet, start: float = 0.0) -> int:
    """Returns how many images [`balanced_subset`] can take in equal shares of each class."""
    num_classes = len(dataset.class_names)
    smallest = int(dataset.labels.bincount(minlength=num_classes).min())
    return num_classes * (smallest - int(start * smallest))


def balanced_subset(dataset: ImageSet, num_images: int, start: float = 0.0) -> ImageDataset:
    """Returns `num_images` images in equal shares of each class, after the share `start` of its images.

    A class with fewer images than its share is in it with all of them.
    """
    num_classes = len(dataset.class_names)
    rows = []
    for label in range(num_classes):
        count = (num_images - label + num_classes - 1) // num_classes
        of_class = (dataset.labels == label).nonzero().flatten()
        first = int(start * len(of_class))
        rows.append(of_class[first : first + count])
    return dataset.subset(torch.cat(rows)).load()
