"""Images of a data set that is read as a stream, because it does not fit on the disk."""

import inspect
import math
import os
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import torch
from torch.utils.data import default_collate

from .data import (
    IMAGE_MODES,
    UNLABELLED,
    ImageDataset,
    ImageSet,
    UnusableImageError,
    choose_classes,
    decode_image,
    describe_split,
    find_column,
    find_label_column,
    image_digests,
    load_dataset,
)


NUM_SAMPLED = 2000  # images after those held out, whose spectrum stands for that of the stream


class StreamedImages(torch.utils.data.IterableDataset):
    """The images of some classes of a stream.

    A training must call [`hold_out`] first. A pass then has an order of its own.

    Args:
        stream (`datasets.IterableDataset`): the stream, whose images are not decoded.
        image_column (`str`), label_column (`str`, *optional*): columns of the stream.
        class_ids (`dict[str, int]`): the class id of each wanted label, as text; without a label column, that
            of `"None"`.
        class_names (`list[str]`): the names of the classes.
        resolution (`int`), image_mode (`str`): see [`open_image_dataset`].
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        image_column: str,
        label_column: str | None,
        class_ids: dict[str, int],
        class_names: list[str],
        resolution: int,
        image_mode: str,
    ) -> None:
        self.stream = stream
        self.image_column = image_column
        self.label_column = label_column
        self.class_ids = class_ids
        self.class_names = class_names
        self.image_shape = IMAGE_MODES[image_mode], resolution, resolution
        self.image_mode = image_mode
        self.held_out: frozenset[str] = frozenset()  # digests of the images that are left out

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for example in self.stream:
            label = self.class_ids.get(str(example.get(self.label_column)))
            if label is None:
                continue
            encoded = example[self.image_column]
            try:
                image = decode_image(encoded, self.image_shape[-1], self.image_mode, "the stream")
            except UnusableImageError as error:
                # A resumed run leaves the same image out.
                warnings.warn(f"{error} It is left out.", stacklevel=2)
                continue
            if image_digests(image[None])[0] not in self.held_out:
                yield image, label

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the images; Accelerate calls this method."""
        self.stream.set_epoch(epoch)

    def first(self, num_images: int) -> ImageDataset:
        """Returns images that are not held out, at most `num_images`, in memory."""
        return self.sample.first(num_images)

    def has_images(self, num_images: int) -> bool:
        """Whether the stream has so many images, as far as it was read."""
        return self.num_known >= num_images

    def hold_out(
        self, num_images: int, shuffle_buffer_size: int, seed: int, earlier: dict[str, Any] | None = None
    ) -> ImageDataset:
        """Returns the first images of the stream; from now on they are left out, and the others are shuffled.

        Held-out images are known by their pixels, so that copies of them are left out too. `earlier` is what
        [`describe_split`] returned for the training to continue.

        Raises:
            ValueError: if there are no other images, if all held-out images are of one of several classes, or
                if they are others than those held out before.
        """
        if num_images < len(self.class_names):
            raise ValueError(
                f"--validation_images must be at least {len(self.class_names)}, the number of classes, with "
                f"--streaming, but is {num_images}."
            )
        examples = list(islice(self, num_images + NUM_SAMPLED))
        if len(examples) <= num_images:
            raise ValueError(
                f"The stream has {len(examples):,} images of the classes {', '.join(self.class_names)}, but "
                f"--validation_images holds out {num_images:,}."
            )
        images, labels = torch.stack([image for image, _ in examples]), torch.tensor([y for _, y in examples])
        held_out, self.sample = (
            ImageDataset(images[part], labels[part], self.class_names)
            for part in (slice(num_images), slice(num_images, None))
        )
        if len(self.class_names) > 1 and len(held_out.labels.unique()) == 1:
            raise ValueError(
                f"The stream begins with {len(held_out):,} images of one class, but --streaming needs a data "
                "set in random order."
            )
        if earlier is not None and describe_split(held_out) != earlier:
            raise ValueError(
                "The checkpoint has other classes, or other held-out images than the first of this stream. "
                "Give its data set, --classes and --validation_images, or start a new run."
            )
        self.held_out = frozenset(image_digests(held_out.images))
        is_other = torch.tensor([x not in self.held_out for x in image_digests(self.sample.images)])
        self.sample = self.sample.subset(is_other.nonzero().flatten())
        is_read = len(examples) < num_images + NUM_SAMPLED  # otherwise there may be any number of others
        self.num_known = len(self.sample) if is_read else math.inf
        # Newer versions of `datasets` would read several files at a time, and wait five seconds at the end.
        takes_shards = "max_buffer_input_shards" in inspect.signature(self.stream.shuffle).parameters
        options = {"max_buffer_input_shards": 1} if takes_shards else {}
        self.stream = self.stream.shuffle(seed, buffer_size=shuffle_buffer_size, **options)
        return held_out

    collate = staticmethod(default_collate)


def num_loading_processes(
    dataset: ImageSet | StreamedImages, wanted: int | None, is_main_process: bool
) -> int:
    """Returns the number of processes that load images for one process of a training.

    The default of `wanted` is none for images in memory, and otherwise this process's share of the cores, at
    most 8. Only the main process reads a stream, and each loading process reads files of its own.
    """
    if wanted is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        wanted = 0 if isinstance(dataset, ImageDataset) else min(max(1, cores), 8)
    if isinstance(dataset, StreamedImages):
        return min(wanted, dataset.stream.num_shards) if is_main_process else 0
    return wanted


def open_image_stream(
    dataset_name: str,
    classes: list[str] | None,
    resolution: int,
    split: str = "train",
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
    image_mode: str = "RGB",
) -> StreamedImages:
    """Opens a data set as a stream in its own order; see [`open_image_dataset`] for the arguments.

    Raises:
        ValueError: if the data set cannot be opened, a column or class is missing, or all classes are wanted
            but the stream does not name them.
    """
    stream = load_dataset(dataset_name, dataset_config_name, split, cache_dir, streaming=True)
    if stream.features is None:
        raise ValueError(
            f"The data set {dataset_name!r} does not describe its columns, which --streaming requires."
        )
    image_column = find_column(stream, image_column, (datasets.Image,), "image_column")
    label_column = find_label_column(stream, label_column)
    if label_column is None:
        names = [UNLABELLED]
        label_of = {UNLABELLED: "None"}
    elif isinstance(stream.features[label_column], datasets.ClassLabel):
        names = stream.features[label_column].names
        label_of = {name: str(label) for label, name in enumerate(names)}
    elif classes:
        names = classes
        label_of = {name: name for name in names}
    else:
        raise ValueError(
            f"The labels in the column {label_column!r} have no list of names, and only the end of a stream "
            "tells all of them: name the classes with --classes."
        )
    class_names = choose_classes(classes, names)
    class_ids = {label_of[name]: class_id for class_id, name in enumerate(class_names)}
    stream = stream.select_columns([name for name in (image_column, label_column) if name is not None])
    stream = stream.cast_column(image_column, datasets.Image(decode=False))
    return StreamedImages(stream, image_column, label_column, class_ids, class_names, resolution, image_mode)
