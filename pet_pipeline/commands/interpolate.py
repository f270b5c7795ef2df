"""`pet-pipeline interpolate`: draws an animation that turns one image into another."""

import argparse
from pathlib import Path
from typing import Any

from ..sampling import MAX_SEED, label_ids
from .loading import load_pipeline
from .options import (
    HelpFormatter,
    add_device_option,
    add_dtype_option,
    add_model_option,
    add_sampling_options,
    positive_integer,
    sample_settings,
    whole_number,
)


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "interpolate",
        help="draw an animation that turns one image into another",
        description="Draws an endless animation that turns the first image into the second and so on, and "
        "the last one into the first.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "points",
        nargs="+",
        type=point,
        metavar="CLASS:SEED",
        help="an image on the way, such as cat:0: the one that `pet-pipeline generate` draws of this class "
        "with this seed, if the steps of the solver add no noise; two at the least",
    )
    add_model_option(parser)
    parser.add_argument(
        "--frames", type=positive_integer, default=16, help="number of frames from one image to the next"
    )
    parser.add_argument(
        "--duration", type=whole_number(20, 10_000), default=80, help="milliseconds that a frame is shown"
    )
    parser.add_argument("--scale", type=whole_number(1, 32), default=6, help="enlargement of the pixels")
    add_sampling_options(parser)
    add_device_option(parser)
    add_dtype_option(parser)
    parser.add_argument(
        "--out",
        type=animation,
        default="interpolation.webp",
        metavar="FILE",
        help="the animation: a .webp, .png or .gif file",
    )
    parser.set_defaults(run=run)


def animation(text: str) -> Path:
    """Parses the name of an animation."""
    path = Path(text)
    if path.suffix.lower() not in (".webp", ".png", ".gif"):
        raise argparse.ArgumentTypeError(f"must end in .webp, .png or .gif, but is {text!r}")
    return path


def point(text: str) -> tuple[str, int]:
    """Parses CLASS:SEED."""
    name, _, number = text.rpartition(":")
    if not name or not number.isdecimal() or int(number) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"must be CLASS:SEED, such as cat:0, but is {text!r}")
    return name, int(number)


def run(args: argparse.Namespace) -> None:
    """Draws the frames and saves them."""
    from ..visualization import interpolation, save_animation

    if len(args.points) < 2:
        raise ValueError("An animation needs two images at the least, such as cat:0 dog:0.")
    if args.out.is_dir():
        raise ValueError(f"--out must be a file, but {str(args.out)!r} is a folder.")
    settings = sample_settings(args)
    pipeline = load_pipeline(args.model, args.scheduler, args.device, args.dtype, revision=args.revision)
    ids = label_ids(pipeline, [name for name, _ in args.points])
    points = [(label_id, seed) for label_id, (_, seed) in zip(ids, args.points)]
    frames = interpolation(pipeline, points, args.frames, **settings.call_arguments(pipeline))
    save_animation(frames, args.out, args.duration, args.scale)
    print(f"{args.out} shows {len(frames)} frames.")
