"""Images through `datasets`: chosen classes, decoded once, held in memory as uint8."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from ..pipeline_pet_loading import eight_bit_image


IMAGE_MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # modes of Pillow, and their numbers of channels
UNLABELLED = "image"  # the name of the only class of a data set without labels
LABEL_NAMES = ("label", "labels")  # a column of integers or strings of this name holds labels


def image_mode(num_channels: int) -> str:
    """Returns the mode of Pillow for images of a number of channels, or raises `ValueError`."""
    for mode, number in IMAGE_MODES.items():
        if number == num_channels:
            return mode
    raise ValueError(f"Images are read with 1, 3 or 4 channels, but the model has {num_channels}.")


@dataclass
class ImageDataset(torch.utils.data.Dataset):
    """Images and labels in memory, fetched a batch at a time.

    A `DataLoader` of this data set needs `collate_fn=ImageDataset.collate`. A batch is then one indexing
    operation, which is far faster than any training.
    """

    images: torch.Tensor  # (N, channels, resolution, resolution), uint8
    labels: torch.Tensor  # (N,), int64; indices in `class_names`
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.as_tensor(indices)
        return self.images[rows], self.labels[rows]

    @staticmethod
    def collate(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the batch that `__getitems__` returned."""
        return batch

    def subset(self, indices: torch.Tensor) -> "ImageDataset":
        """Returns the images at `indices`, of the same classes."""
        return ImageDataset(self.images[indices], self.labels[indices], self.class_names)

    def first(self, num_images: int) -> "ImageDataset":
        """Returns the first images, at most `num_images`."""
        return self.subset(torch.arange(min(num_images, len(self))))


def load_image_dataset(
    dataset_name: str,
    classes: list[str] | None = None,
    resolution: int = 32,
    split: str = "train",
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    max_samples: int | None = None,
    image_mode: str = "RGB",
) -> ImageDataset:
    """Loads the images of some classes of a data set, or of a data set without labels.

    Args:
        dataset_name (`str`): Hub id, or a local folder that `datasets.load_dataset` reads (Parquet files or
            an image folder, with one subfolder per class or without).
        classes (`list[str]`, *optional*): the wanted classes in the order of their label ids; the default is
            all of them. A data set without labels has one class, `"image"`.
        resolution (`int`, defaults to 32): images are resized and cropped at the centre to this size.
        split, dataset_config_name, cache_dir: see `datasets.load_dataset`.
        image_column (`str`, *optional*): found by its type when `None`.
        label_column (`str`, *optional*): a column of class labels, integers or strings. When `None`, it is
            the column of class labels, or else one of integers or strings that is called `label` or `labels`;
            if there is none, the data set has no labels.
        max_samples (`int`, *optional*): keep this many images, as many of each class, at least one.
        image_mode (`str`, defaults to `"RGB"`): images are converted to this mode of Pillow, one of
            [`IMAGE_MODES`]. All but `"RGBA"` put transparent images on white.

    Raises:
        ValueError: if the data set cannot be loaded, a column, class or label is missing, a class has no
            image, or an image cannot be used.
    """
    if Path(dataset_name).is_dir():
        dataset_name = str(Path(dataset_name).resolve())
    try:
        dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    except Exception as error:  # `datasets` raises many kinds, some of them only documented by their message
        raise ValueError(
            f"The data set {dataset_name!r} (split {split!r}) cannot be loaded: {error}"
        ) from error

    image_column = find_column(dataset, image_column, (datasets.Image,), "image_column")
    names, labels = read_labels(dataset, label_column)
    classes = list(classes) if classes else names
    unknown = [name for name in classes if name not in names]
    if unknown:
        known = (
            "it has no labels, use `--classes all`" if names == [UNLABELLED] else f"it has {', '.join(names)}"
        )
        raise ValueError(f"The data set has no class {', '.join(map(repr, unknown))}; {known}.")
    if len(set(classes)) < len(classes):
        raise ValueError(f"Each class may be named once, but `classes` is {', '.join(classes)}.")

    rows_of_class = [np.flatnonzero(labels == names.index(name)) for name in classes]
    empty = [name for name, rows in zip(classes, rows_of_class) if len(rows) == 0]
    if empty:
        raise ValueError(f"The split {split!r} has no image of class {', '.join(map(repr, empty))}.")
    if max_samples is not None:
        per_class = max(1, max_samples // len(classes))
        rows_of_class = [rows[:per_class] for rows in rows_of_class]
    rows = np.concatenate(rows_of_class)
    order = np.argsort(rows)  # in the data set's own order, which is the fast one to read
    class_ids = np.repeat(np.arange(len(classes)), [len(r) for r in rows_of_class])[order]
    images = torch.empty(len(rows), IMAGE_MODES[image_mode], resolution, resolution, dtype=torch.uint8)
    decoded = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=True))
    images_of_rows = iter(decoded.select(rows[order]))
    for index in range(len(rows)):
        try:
            image = next(images_of_rows)[image_column]
            if image is None:
                raise ValueError("it is missing.")
            images[index] = image_to_tensor(image, resolution, image_mode)
        except (ValueError, OSError) as error:  # OSError: an image that cannot be decoded
            raise ValueError(f"The image of row {rows[order][index]} cannot be used: {error}") from None
    return ImageDataset(images, torch.from_numpy(class_ids), classes)


def read_labels(dataset: datasets.Dataset, column: str | None = None) -> tuple[list[str], np.ndarray]:
    """Returns the names of the classes of a data set, and the class id of each row.

    `ValueError` is raised if the given column cannot hold labels, if there are several columns of class
    labels, or if a row has no label.
    """
    features = dataset.features
    kinds: tuple[type, ...] = (datasets.ClassLabel, datasets.Value)
    if column is None and any(isinstance(feature, datasets.ClassLabel) for feature in features.values()):
        kinds = (datasets.ClassLabel,)
    elif column is None:
        column = next((name for name in LABEL_NAMES if holds_labels(features.get(name))), None)
        if column is None:
            return [UNLABELLED], np.zeros(len(dataset), dtype=np.int64)
    column = find_column(dataset, column, kinds, "label_column")
    if isinstance(features[column], datasets.ClassLabel):
        return features[column].names, np.array(dataset[column])
    labels = list(dataset[column])
    for row, label in enumerate(labels):
        if not isinstance(label, (int, str)):
            raise ValueError(
                f"The column {column!r} must have an integer or a string in every row, but row {row} has "
                f"{label!r}."
            )
    names, ids = np.unique(labels, return_inverse=True)
    return [str(name) for name in names], ids


def holds_labels(feature: Any) -> bool:
    """Whether a column of `datasets` holds integers or strings."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("int", "uint", "string", "large_s")
    )


def find_column(
    dataset: datasets.Dataset, column: str | None, feature_types: tuple[type, ...], argument: str
) -> str:
    """Returns the given column of a data set, or its only column of some feature types.

    `ValueError` is raised if the given column is not of these types, or if there is not exactly one.
    """
    found = [name for name, feature in dataset.features.items() if isinstance(feature, feature_types)]
    if column is None and len(found) == 1:
        return found[0]
    if column is not None and column in found:
        return column
    kind = " or ".join(feature_type.__name__ for feature_type in feature_types)
    if column is not None:
        problem = f"`{argument}` must be a column of the type {kind}, but is {column!r}"
    elif found:
        problem = f"`{argument}` is needed, because the data set has several columns of the type {kind}"
    else:
        problem = f"The data set has no column of the type {kind}"
    columns = [f"{name} ({type(feature).__name__})" for name, feature in dataset.features.items()]
    raise ValueError(f"{problem}; the columns are {', '.join(columns)}.")


def image_to_tensor(image: Image.Image, resolution: int, mode: str = "RGB") -> torch.Tensor:
    """Returns an image upright, resized and cropped at the centre, as uint8 `(channels, height, width)`."""
    tensor = functional.pil_to_tensor(eight_bit_image(image, mode))
    tensor = functional.resize(tensor, [resolution], functional.InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(tensor, [resolution])


def stratified_split(
    dataset: ImageDataset, validation_fraction: float = 0.1, seed: int = 0
) -> tuple[ImageDataset, ImageDataset]:
    """Splits a data set into training and validation parts with the same share of each class.

    The images that are held out of a class do not depend on the other classes, so that a model trained on
    more classes has not seen them either. Of each class, `validation_fraction` of the images is held
    out, but at least one. `ValueError` is raised if a class has fewer than two images.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction` must be between 0 and 1, but is {validation_fraction}.")
    train, validation = [], []
    for class_id, name in enumerate(dataset.class_names):
        rows = (dataset.labels == class_id).nonzero().flatten()
        if len(rows) < 2:
            raise ValueError(
                f"The class {name!r} has {len(rows)} image; training and validation need one each."
            )
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        num_validation = min(len(rows) - 1, max(1, round(validation_fraction * len(rows))))
        validation.append(rows[:num_validation])
        train.append(rows[num_validation:])

    def shuffled(parts: list[torch.Tensor]) -> ImageDataset:
        rows = torch.cat(parts)
        return dataset.subset(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))])

    return shuffled(train), shuffled(validation)


def image_digests(images: torch.Tensor) -> list[str]:
    """Returns a hash of the pixels of each image."""
    return [hashlib.blake2b(image.numpy(), digest_size=16).hexdigest() for image in images.contiguous()]


def describe_split(train_set: ImageDataset, held_out_set: ImageDataset) -> dict[str, Any]:
    """Describes a split of a data set, so that a checkpoint can tell whether a later split is the same.

    The description is JSON of the class names, a hash of all images and labels, and a hash of each image that
    is held out.
    """
    content = hashlib.sha256()
    for part in (train_set, held_out_set):
        content.update(part.images.contiguous().numpy().data)
        content.update(part.labels.contiguous().numpy().data)
    return {
        "class_names": train_set.class_names,
        "content": content.hexdigest(),
        "held_out": image_digests(held_out_set.images),
    }


def split_dataset(
    dataset: ImageDataset, validation_fraction: float, earlier: dict[str, Any] | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Splits a data set by [`stratified_split`] for a training, which may continue an earlier one.

    `earlier` is what [`describe_split`] returned for the training to continue. If the data set has changed
    since, this function warns and holds out the same images again, as far as it still has them.
    """
    split = stratified_split(dataset, validation_fraction)
    if earlier is None or describe_split(*split) == earlier:
        return split
    if earlier["class_names"] != dataset.class_names:
        raise ValueError(
            f"The checkpoint was trained on the classes {', '.join(earlier['class_names'])}, but the classes "
            f"are now {', '.join(dataset.class_names)}."
        )
    # Each image's place among those held out before; -1 for the others.
    places = {digest: place for place, digest in enumerate(earlier["held_out"])}
    place = torch.tensor([places.get(digest, -1) for digest in image_digests(dataset.images)])
    rows = place.argsort(stable=True)
    num_train = int((place < 0).sum())
    num_found = len(place[place >= 0].unique())
    if 0 < num_train < len(dataset):
        split = dataset.subset(rows[:num_train]), dataset.subset(rows[num_train:])
        if describe_split(*split) == earlier:
            return split
        outcome = f"{num_found:,} of the {len(places):,} images that were held out are held out again"
        if num_found < len(places):
            outcome += ", and so the validation losses before and now, and `best`, compare different images"
    else:
        outcome = (
            "the images that were held out cannot be held out again, and so some that were trained on are "
            "held out now, and `best` compares different images"
        )
    warnings.warn(
        "The data set or the validation fraction has changed since the checkpoint: the training continues, "
        f"but not with the numbers of an uninterrupted one; {outcome}.",
        stacklevel=2,
    )
    return split


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Returns uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def random_horizontal_flip(images: torch.Tensor, probability: float = 0.5) -> torch.Tensor:
    """Mirrors each image of a `(batch, channels, height, width)` tensor with the given probability."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(flip, images.flip(-1), images)
