"""Measures how many images a second the data path of `train_pet.py` delivers, and its memory.

python tests/benchmarks/measure_data_path.py --dataset_name uoft-cs/cifar10
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from pet_pipeline.training.data import open_image_dataset, random_horizontal_flip, to_model_range
from pet_pipeline.training.streaming import StreamedImages, open_image_stream


def own_megabytes() -> float:
    """The memory of this process and its children in MB, without that of mapped files, on Linux."""
    process = psutil.Process()
    total = 0
    for member in (process, *process.children(recursive=True)):
        for line in Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1])
    return total / 1000


def passes(loader: torch.utils.data.DataLoader, seconds: float) -> Iterator[torch.Tensor]:
    """Yields the images of whole passes until the time is over."""
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for images, _ in loader:
            yield images


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--classes", nargs="+", default=["cat", "dog"])
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seconds", type=float, default=10, help="shortest time of a measurement")
    parser.add_argument("--cache_dir")
    args = parser.parse_args()

    classes = None if args.classes == ["all"] else args.classes
    options = {"classes": classes, "resolution": args.resolution, "cache_dir": args.cache_dir}
    stored = open_image_dataset(args.dataset_name, **options)
    stream = open_image_stream(args.dataset_name, **options)
    stream.hold_out(512, shuffle_buffer_size=10_000, seed=0)
    print(f"{len(stored):,} images are {stored.num_bytes / 1e6:.0f} MB when they are decoded.\n")
    print("| images | loading processes | images/s | in [-1, 1] and flipped, images/s | memory, MB |")
    print("|---|---|---|---|---|")
    kinds = [("on the fly", stored, number) for number in args.num_workers]
    kinds += [("stream", stream, number) for number in args.num_workers if number <= stream.stream.num_shards]
    for kind, dataset, num_workers in [*kinds, ("in memory", None, 0)]:
        dataset = stored.load() if dataset is None else dataset
        loader = torch.utils.data.DataLoader(
            dataset,
            args.batch_size,
            shuffle=not isinstance(dataset, StreamedImages),
            drop_last=True,
            collate_fn=dataset.collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        rates, memory = [], []
        for prepare in (lambda x: x, lambda x: random_horizontal_flip(to_model_range(x))):
            began, count = time.perf_counter(), 0
            for step, images in enumerate(passes(loader, args.seconds)):
                count += len(prepare(images))
                if step % 100 == 99:
                    memory.append(own_megabytes())
            rates.append(count / (time.perf_counter() - began))
        spread = f"{min(memory):.0f} to {max(memory):.0f}"
        print(f"| {kind} | {num_workers} | {rates[0]:,.0f} | {rates[1]:,.0f} | {spread} |", flush=True)
        del loader


if __name__ == "__main__":
    main()
