"""Loads the images of a training: in memory, decoded on the fly, or as a stream."""

import argparse
from typing import Any

import torch
from accelerate import Accelerator

from .data import ImageSet, load_if_small, open_image_dataset, split_dataset
from .streaming import StreamedImages, num_loading_processes, open_image_stream


def load_data(
    args: argparse.Namespace, resolution: int, mode: str, earlier_split: dict[str, Any] | None
) -> tuple[ImageSet | StreamedImages, ImageSet]:
    """Opens the data set, and returns its images for training and those held out.

    The split does not depend on the seed, so that no run trains on images that another run holds out.

    Args:
        args (`argparse.Namespace`): the options of `train_pet.py`.
        resolution (`int`): height and width of the images.
        mode (`str`): `"RGB"`, `"L"` or `"RGBA"`.
        earlier_split (`dict`, *optional*): the split of the training to continue, see [`split_dataset`].

    Raises:
        ValueError: if the data set cannot be loaded, or is too small for the options.
    """
    common = {
        "dataset_name": args.dataset_name,
        "classes": None if args.classes == ["all"] else args.classes,
        "resolution": resolution,
        "split": args.train_split,
        "image_mode": mode,
        "dataset_config_name": args.dataset_config_name,
        "image_column": args.image_column,
        "label_column": args.label_column,
        "cache_dir": args.cache_dir,
    }
    train_set: ImageSet | StreamedImages
    if args.streaming:
        train_set = open_image_stream(**common)
        held_out_set: ImageSet = train_set.hold_out(
            args.validation_images, args.shuffle_buffer_size, args.seed, earlier_split
        )
    else:
        dataset = open_image_dataset(**common, max_samples=args.max_train_samples)
        split = split_dataset(dataset, args.validation_fraction, earlier_split)
        train_set, held_out_set = load_if_small(split, args.max_memory_gb)
    if args.evaluation_steps is not None and min(len(held_out_set), args.validation_images) < 2:
        raise ValueError("--evaluation_steps needs two held-out images at the least.")
    return train_set, held_out_set


def create_loader(
    args: argparse.Namespace, accelerator: Accelerator, train_set: ImageSet | StreamedImages
) -> torch.utils.data.DataLoader:
    """Returns the loader of the training images, which Accelerate has not prepared yet.

    Raises:
        ValueError: if a stream has too few images for one step.
    """
    is_enough = train_set.has_images(args.train_batch_size * accelerator.num_processes)
    if args.streaming and not is_enough:
        raise ValueError(
            "The stream has too few images for one step beside those held out: lower --validation_images or "
            "--train_batch_size."
        )
    num_workers = num_loading_processes(train_set, args.dataloader_num_workers, accelerator.is_main_process)
    num_batches = accelerator.num_processes + num_workers
    if args.streaming and not train_set.has_images(args.train_batch_size * num_batches):
        num_workers = min(num_workers, 1)  # each of several drops the images that do not fill a batch
    return torch.utils.data.DataLoader(
        train_set,
        batch_size=args.train_batch_size,
        shuffle=not args.streaming,
        collate_fn=train_set.collate,
        num_workers=num_workers,
        # The processes of a stream are told the epoch when they start.
        persistent_workers=num_workers > 0 and not args.streaming,
        pin_memory=torch.cuda.is_available(),
        drop_last=is_enough,
        generator=torch.Generator().manual_seed(args.seed),
    )
