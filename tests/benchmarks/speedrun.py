"""Runs and verifies an entry of the speedrun, see docs/speedrun.md: three trainings, one after the other.

    python tests/benchmarks/speedrun.py cpu --dataset_name uoft-cs/cifar10
    python tests/benchmarks/speedrun.py gpu --dataset_name uoft-cs/cifar10 -- --preset base --torch_compile

What follows `--` are options of `train_pet.py`. With the commit, they are the entry.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from compare_recipes import COLUMNS, OURS, RUNS, table_row, train_and_measure


SEEDS = (0, 1, 2)
NUM_IMAGES = 500  # samples of each training, without guidance
LOSS, KID = "up to σ = 7.4", "KID-EffLite0 ×10³"


@dataclass
class Track:
    """The limits of a track.

    Args:
        minutes (`float`): minutes of training, as `train_pet.py` counts them.
        largest_kid (`float`): what the mean of the KID-EffLite0 ×10³ must not exceed.
        cores (`int`, *optional*): number of cores that the training is bound to.
    """

    minutes: float
    largest_kid: float
    cores: int | None = None


TRACKS = {"cpu": Track(minutes=18, largest_kid=30, cores=2), "gpu": Track(minutes=10, largest_kid=10)}


def verdict(track: Track, records: list[dict[str, float]]) -> str:
    """Returns one line: the result of an entry, or the rule that it breaks."""
    longest, kid = max(record["minutes"] for record in records), mean(record[KID] for record in records)
    losses = [record[LOSS] for record in records]
    if longest > 1.01 * track.minutes:
        return f"No record: a training took {longest:.1f} minutes, but {track.minutes:g} are allowed."
    if not kid <= track.largest_kid:
        return f"No record: the mean KID is {kid:.1f}, but {track.largest_kid:g} is the most that is allowed."
    return f"Loss {LOSS}: {mean(losses):.4f} (standard deviation {stdev(losses):.4f}), mean KID {kid:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("track", choices=list(TRACKS))
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--cache_dir")
    parser.add_argument("--out", type=Path, default=Path("speedrun"), help="new folder of the trainings")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args, options = parser.parse_args(words[:end]), words[end + 1 :]
    track = TRACKS[args.track]
    if args.out.exists():
        parser.error(f"{args.out} exists: an entry starts from nothing")
    if track.cores is not None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < track.cores:
            parser.error(f"this track takes {track.cores} cores, but there are {len(cores)}")
        os.sched_setaffinity(0, cores[: track.cores])
        os.environ["OMP_NUM_THREADS"] = str(track.cores)
    elif not torch.cuda.is_available():
        parser.error("this track takes a GPU")

    args.max_train_minutes, args.num_images = track.minutes, NUM_IMAGES
    args.out.mkdir(parents=True)
    RUNS["entry"] = [*OURS, *options]
    print("| run | seed | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")
    records = []
    for seed in SEEDS:
        records.append(train_and_measure("entry", seed, None, args))
        print(table_row(records[-1]), flush=True)
    print(verdict(track, records))


if __name__ == "__main__":
    main()
