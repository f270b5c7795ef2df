"""Images through `datasets`: chosen classes as uint8, held in memory or decoded when they are fetched."""

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from ..pipeline_pet_loading import eight_bit_image


IMAGE_MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # modes of Pillow, and their numbers of channels
UNLABELLED = "image"  # the name of the only class of a data set without labels
LABEL_NAMES = ("label", "labels")  # a column of integers or strings of this name holds labels
NUM_DESCRIBED = 1000  # training images that tell one split of a data set from another, with those held out


def image_mode(num_channels: int) -> str:
    """Returns the mode of Pillow for images of a number of channels, or raises `ValueError`."""
    for mode, number in IMAGE_MODES.items():
        if number == num_channels:
            return mode
    raise ValueError(f"Images are read with 1, 3 or 4 channels, but the model has {num_channels}.")


class UnusableImageError(ValueError):
    """An image of a data set that is missing or cannot be decoded."""

    def __str__(self) -> str:
        # PyTorch raises the error of a worker process anew, with its traceback before the message.
        message = super().__str__()
        return message[message.rfind("The image of ") :].rstrip()


class ImageSet(torch.utils.data.Dataset):
    """Images with labels that are fetched by their numbers, a batch at a time.

    A `DataLoader` of this data set needs `collate_fn=ImageSet.collate`.
    """

    labels: torch.Tensor  # (N,), int64; indices in `class_names`
    class_names: list[str]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of the images."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def has_images(self, num_images: int) -> bool:
        """Whether there are so many images."""
        return len(self) >= num_images

    def __getitems__(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns uint8 images `(batch, channels, height, width)` and their labels."""
        raise NotImplementedError

    @staticmethod
    def collate(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the batch that `__getitems__` returned."""
        return batch

    def batches(self, batch_size: int = 1000) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Returns all images and labels in their order, in batches."""
        return (self.__getitems__(rows) for rows in torch.arange(len(self)).split(batch_size))

    def subset(self, indices: torch.Tensor) -> Self:
        """Returns the images at `indices`, of the same classes."""
        raise NotImplementedError

    def load(self) -> "ImageDataset":
        """Returns the images in memory."""
        raise NotImplementedError

    def first(self, num_images: int) -> "ImageDataset":
        """Returns the first images, at most `num_images`, in memory."""
        return self.subset(torch.arange(min(num_images, len(self)))).load()


@dataclass
class ImageDataset(ImageSet):
    """Images in memory. A batch is one indexing operation, which is far faster than any training."""

    images: torch.Tensor  # (N, channels, resolution, resolution), uint8
    labels: torch.Tensor
    class_names: list[str]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __getitems__(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.as_tensor(indices)
        return self.images[rows], self.labels[rows]

    def subset(self, indices: torch.Tensor) -> "ImageDataset":
        return ImageDataset(self.images[indices], self.labels[indices], self.class_names)

    def load(self) -> "ImageDataset":
        return self


@dataclass
class StoredImages(ImageSet):
    """Images in memory-mapped files, which are decoded when they are fetched."""

    encoded: datasets.Dataset  # its only column has images that are not decoded
    rows: torch.Tensor  # (N,), int64; the places of the images in `encoded`
    labels: torch.Tensor
    class_names: list[str]
    resolution: int
    image_mode: str

    @property
    def image_shape(self) -> tuple[int, ...]:
        return IMAGE_MODES[self.image_mode], self.resolution, self.resolution

    @property
    def num_bytes(self) -> int:
        """The size of all images in memory."""
        return len(self) * math.prod(self.image_shape)

    def __getitems__(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.as_tensor(indices)
        rows = self.rows[indices].tolist()
        (column,) = self.encoded[rows].values()
        images = [
            decode_image(image, self.resolution, self.image_mode, f"row {row}")
            for row, image in zip(rows, column)
        ]
        return torch.stack(images), self.labels[indices]

    def subset(self, indices: torch.Tensor) -> "StoredImages":
        return replace(self, labels=self.labels[indices], rows=self.rows[indices])

    def load(self) -> ImageDataset:
        """Returns the images in memory; `ValueError` is raised if one is unusable, or if they do not fit."""
        free = psutil.virtual_memory().available
        if self.num_bytes > free:
            raise ValueError(
                f"{len(self):,} decoded images take {self.num_bytes / 1e9:.1f} GB of memory, but only "
                f"{free / 1e9:.1f} GB are free."
            )
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        for indices in self.rows.argsort().split(1000):  # in the order of the files, which is fast to read
            images[indices] = self.__getitems__(indices)[0]
        return ImageDataset(images, self.labels, self.class_names)


Images = TypeVar("Images", bound=ImageSet)


def decode_image(encoded: Any, resolution: int, mode: str, place: str) -> torch.Tensor:
    """Returns the uint8 tensor of an image that `datasets` has not decoded; see [`image_to_tensor`].

    `UnusableImageError` is raised if that is impossible. Its message begins with "The image of" and `place`.
    """
    try:
        if encoded is None:
            raise ValueError("it is missing.")
        return image_to_tensor(datasets.Image().decode_example(encoded), resolution, mode)
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise UnusableImageError(f"The image of {place} cannot be used: {error}") from None


def open_image_dataset(
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
) -> StoredImages:
    """Opens the images of some classes of a data set, or of a data set without labels.

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
        ValueError: if the data set cannot be loaded, a column, class or label is missing, or a class has no
            image.
    """
    dataset = load_dataset(dataset_name, dataset_config_name, split, cache_dir)
    image_column = find_column(dataset, image_column, (datasets.Image,), "image_column")
    names, labels = read_labels(dataset, label_column)
    classes = choose_classes(classes, names)
    rows_of_class = [np.flatnonzero(labels == names.index(name)) for name in classes]
    empty = [name for name, rows in zip(classes, rows_of_class) if len(rows) == 0]
    if empty:
        raise ValueError(f"The split {split!r} has no image of class {', '.join(map(repr, empty))}.")
    if max_samples is not None:
        per_class = max(1, max_samples // len(classes))
        rows_of_class = [rows[:per_class] for rows in rows_of_class]
    class_ids = np.repeat(np.arange(len(classes)), [len(rows) for rows in rows_of_class])
    ordered_rows, order = torch.from_numpy(np.concatenate(rows_of_class)).sort()
    ordered_labels = torch.from_numpy(class_ids)[order]
    encoded = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return StoredImages(encoded, ordered_rows, ordered_labels, classes, resolution, image_mode)


def load_if_small(
    parts: Sequence[StoredImages], max_memory_gb: float | None = None
) -> Sequence[StoredImages] | Sequence[ImageDataset]:
    """Loads the parts of a data set into memory if all of them fit there, and otherwise returns them.

    The default of `max_memory_gb` is half of the memory that is free, which the processes on this machine
    share.
    """
    limit = psutil.virtual_memory().available / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fits = sum(part.num_bytes for part in parts) <= (limit if max_memory_gb is None else max_memory_gb * 1e9)
    return [part.load() for part in parts] if fits else parts


def load_dataset(
    dataset_name: str, config_name: str | None, split: str, cache_dir: str | None, **kwargs: Any
) -> Any:
    """Calls `datasets.load_dataset`, and raises `ValueError` if that fails."""
    if Path(dataset_name).is_dir():
        dataset_name = str(Path(dataset_name).resolve())
    try:
        return datasets.load_dataset(dataset_name, config_name, split=split, cache_dir=cache_dir, **kwargs)
    except Exception as error:  # `datasets` raises many kinds, some of them only documented by their message
        raise ValueError(
            f"The data set {dataset_name!r} (split {split!r}) cannot be loaded: {error}"
        ) from error


def choose_classes(classes: list[str] | None, names: list[str]) -> list[str]:
    """Returns the wanted classes, or all `names` of a data set; `ValueError` is raised if one is unknown."""
    classes = list(classes) if classes else names
    unknown = [name for name in classes if name not in names]
    if unknown:
        known = (
            "it has no labels, use `--classes all`" if names == [UNLABELLED] else f"it has {', '.join(names)}"
        )
        raise ValueError(f"The data set has no class {', '.join(map(repr, unknown))}; {known}.")
    if len(set(classes)) < len(classes):
        raise ValueError(f"Each class may be named once, but `classes` is {', '.join(classes)}.")
    return classes


def find_label_column(dataset: Any, column: str | None = None) -> str | None:
    """Returns the given column of labels, or the one that a data set has; `None` if it has no labels.

    `ValueError` is raised if the given column cannot hold labels, or if there are several columns of class
    labels.
    """
    features = dataset.features
    kinds: tuple[type, ...] = (datasets.ClassLabel, datasets.Value)
    if column is None and any(isinstance(feature, datasets.ClassLabel) for feature in features.values()):
        kinds = (datasets.ClassLabel,)
    elif column is None:
        column = next((name for name in LABEL_NAMES if holds_labels(features.get(name))), None)
        if column is None:
            return None
    return find_column(dataset, column, kinds, "label_column")


def read_labels(dataset: datasets.Dataset, column: str | None = None) -> tuple[list[str], np.ndarray]:
    """Returns the names of the classes of a data set, and the class id of each row.

    `ValueError` is raised as [`find_label_column`] does, and if a row has no label.
    """
    column = find_label_column(dataset, column)
    if column is None:
        return [UNLABELLED], np.zeros(len(dataset), dtype=np.int64)
    if isinstance(dataset.features[column], datasets.ClassLabel):
        return dataset.features[column].names, np.array(dataset[column])
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


def find_column(dataset: Any, column: str | None, feature_types: tuple[type, ...], argument: str) -> str:
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
    dataset: Images, validation_fraction: float = 0.1, seed: int = 0
) -> tuple[Images, Images]:
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

    def shuffled(parts: list[torch.Tensor]) -> Images:
        rows = torch.cat(parts)
        return dataset.subset(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))])

    return shuffled(train), shuffled(validation)


def image_digests(images: torch.Tensor) -> list[str]:
    """Returns a hash of the pixels of each image."""
    return [hashlib.blake2b(image.numpy(), digest_size=16).hexdigest() for image in images.contiguous()]


def describe_split(held_out_set: ImageSet, train_set: ImageSet | None = None) -> dict[str, Any]:
    """Describes a split of a data set, so that a checkpoint can tell whether a later split is the same.

    The description is JSON of the class names, a hash of all labels and of the first training images, and a
    hash of each image that is held out. It does not depend on whether the images are in memory. A stream is
    described without its training images.
    """
    content = hashlib.sha256(held_out_set.labels.numpy().data)
    if train_set is not None:
        for part in (train_set.labels, train_set.first(NUM_DESCRIBED).images):
            content.update(part.contiguous().numpy().data)
    return {
        "class_names": held_out_set.class_names,
        "content": content.hexdigest(),
        "held_out": [digest for images, _ in held_out_set.batches() for digest in image_digests(images)],
    }


def split_dataset(
    dataset: Images, validation_fraction: float, earlier: dict[str, Any] | None = None
) -> tuple[Images, Images]:
    """Splits a data set by [`stratified_split`] for a training, which may continue an earlier one.

    `earlier` is what [`describe_split`] returned for the training to continue. If the data set has changed
    since, this function warns and holds out the same images again, as far as it still has them.
    """
    split = stratified_split(dataset, validation_fraction)
    if earlier is None or describe_split(*reversed(split)) == earlier:
        return split
    if earlier["class_names"] != dataset.class_names:
        raise ValueError(
            f"The checkpoint was trained on the classes {', '.join(earlier['class_names'])}, but the classes "
            f"are now {', '.join(dataset.class_names)}."
        )
    # Each image's place among those held out before; -1 for the others.
    places = {digest: place for place, digest in enumerate(earlier["held_out"])}
    digests = (digest for images, _ in dataset.batches() for digest in image_digests(images))
    place = torch.tensor([places.get(digest, -1) for digest in digests])
    rows = place.argsort(stable=True)
    num_train = int((place < 0).sum())
    num_found = len(place[place >= 0].unique())
    if 0 < num_train < len(dataset):
        split = dataset.subset(rows[:num_train]), dataset.subset(rows[num_train:])
        if describe_split(*reversed(split)) == earlier:
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
