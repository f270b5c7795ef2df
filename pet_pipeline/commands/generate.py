"""`pet-pipeline generate`: draws images, one PNG file each, and a labelled grid of them."""

import argparse
import re
import sys
import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sampling import (
    MAX_SEED,
    SampleSettings,
    generate,
    image_settings,
    label_ids,
    model_digests,
    save_image,
    seeds_by_class,
)
from .loading import load_pipeline
from .options import HelpFormatter, add_drawing_options, positive_integer, sample_settings


if TYPE_CHECKING:
    from PIL import Image

GRID_COLUMNS = 32  # the grid shows at most this many images of each class
MAX_TEXT_LENGTH = 256  # of a setting that an image keeps


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "generate",
        help="draw images",
        description="Draws images of the model's classes: one PNG file for each image, and a labelled grid "
        "of the first images of each class.",
        formatter_class=HelpFormatter,
    )
    add_drawing_options(parser)
    parser.add_argument(
        "--batch_size", type=positive_integer, default=64, help="number of images that are drawn at once"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="IMAGE",
        help="repeat the image in this PNG of `pet-pipeline generate`; other options replace its settings",
    )
    parser.add_argument("--strip", action="store_true", help="also draw the denoising step by step")
    parser.add_argument(
        "--compare_steps", action="store_true", help="also draw the same noise in several numbers of steps"
    )
    parser.add_argument("--out", default="samples", metavar="FOLDER", help="folder of the images")
    parser.set_defaults(run=run, check=partial(check, parser))


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if the seeds would leave their range."""
    if args.seed + args.num_samples - 1 > MAX_SEED:
        parser.error(
            f"the last seed, --seed plus --num_samples less 1, must be at most {MAX_SEED}, so that every "
            "image can be repeated"
        )


def options_of_image(path: Path) -> list[str]:
    """Returns the options of the command that drew an image.

    Raises:
        ValueError: if the image keeps no settings, or a setting cannot be an option.
        OSError: if the file cannot be read.
    """
    # Images of earlier versions do not know these kinds of guidance.
    settings = {"pag_scale": 0.0, "autoguidance_scale": 1.0, **image_settings(path)}
    options = ["--num_samples=1"]
    for name in ("class", "seed", *SampleSettings.options(), "dtype"):
        value = settings.get(name)
        if value is None:
            continue
        if not isinstance(value, (str, int, float)) or len(str(value)) > MAX_TEXT_LENGTH:
            raise ValueError(
                f"{str(path)!r} keeps {textwrap.shorten(repr(value), 80)} for {name!r}; no option takes it."
            )
        options.append(f"--{name}={value}")
    return options


def run(args: argparse.Namespace) -> None:
    """Draws the images and saves them."""
    from ..visualization import denoising_strip, image_grid, step_comparison

    settings = sample_settings(args)
    pipeline = load_pipeline(args.model, args.scheduler, args.device, args.dtype, revision=args.revision)
    names = args.classes or pipeline.class_names
    ids = label_ids(pipeline, names)
    call_arguments = settings.call_arguments(pipeline)
    digests = model_digests(pipeline)
    warning = None
    if args.like is not None:
        kept = image_settings(args.like)
        # The same weights in another precision have another digest.
        is_other = any(kept.get(name, digest) != digest for name, digest in digests.items())
        if kept.get("dtype") == args.dtype and is_other:
            warning = f"{args.like} was drawn by a model with other weights; --model names the model"

    out = Path(args.out)
    rows: list[list[Image.Image]] = [[] for _ in names]
    drawn = generate(
        pipeline, seeds_by_class(ids, args.num_samples, args.seed), args.batch_size, **call_arguments
    )
    for index, (label_id, number, image) in enumerate(drawn):
        out.mkdir(parents=True, exist_ok=True)
        row = index // args.num_samples
        kept = {
            "class": names[row],
            "seed": number,
            **asdict(settings),
            # The values that were used where none was given.
            "steps": settings.steps or pipeline.config.num_inference_steps,
            "guidance_scale": pipeline.guidance_scale,
            "pag_scale": pipeline.pag_scale,
            "autoguidance_scale": pipeline.autoguidance_scale,
            "dtype": args.dtype,
            **digests,
        }
        save_image(image, out / f"{file_stem(names[row], label_id)}-{number}.png", kept)
        if len(rows[row]) < GRID_COLUMNS:
            rows[row].append(image)

    image_grid(rows, names, scale=4).save(out / "grid.png")
    pictures = ["grid.png"]
    if args.strip:
        denoising_strip(pipeline, args.seed, ids, **call_arguments).save(out / "strip.png")
        pictures.append("strip.png")
    if args.compare_steps:
        del call_arguments["num_inference_steps"]
        picture = step_comparison(pipeline, seed=args.seed, class_labels=ids, **call_arguments)
        picture.save(out / "steps.png")
        pictures.append("steps.png")
    print(f"{len(names) * args.num_samples} images, {' and '.join(pictures)} are in {out}.")
    if warning is not None:  # not above an error that has the same cause
        print(f"pet-pipeline: {warning}", file=sys.stderr)


def file_stem(name: str, label_id: int) -> str:
    """Returns a class name if it is a safe beginning of a file name, and else one made of its id."""
    is_plain = all(part.isalnum() for part in re.split("[ _-]", name)) and len(name) <= 64
    return name if is_plain else f"class-{label_id}"
