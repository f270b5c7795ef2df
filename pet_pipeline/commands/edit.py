"""`pet-pipeline edit`: draws an image anew from what is left of it under noise, as another class."""

import argparse
from pathlib import Path
from typing import Any

from ..sampling import label_ids
from .generate import file_stem
from .loading import load_pipeline
from .options import HelpFormatter, add_drawing_options, sample_settings


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "edit",
        help="turn an image into another class, or draw a part of it anew",
        description="Adds noise to an image and denoises it as another class (SDEdit). With --mask, only the "
        "white part of the mask is drawn anew. Writes one PNG file for each result, and a grid of all.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="image file to edit")
    add_drawing_options(parser)
    parser.add_argument(
        "--strength",
        type=float,
        help="share of the steps that are taken, in (0, 1]: the higher, the less is left of the image; the "
        "default is 0.5, or 1 with --mask",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="image file that is white where pixels are drawn anew, and black where they are kept",
    )
    parser.add_argument("--out", default="edited", metavar="FOLDER", help="folder of the images")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Edits the image and saves the results."""
    from ..sampling import generate, seeds_by_class
    from ..visualization import array_image, image_grid

    settings = sample_settings(args)
    pipeline = load_pipeline(args.model, args.scheduler, args.device, args.dtype, revision=args.revision)
    names = args.classes or pipeline.class_names
    ids = label_ids(pipeline, names)
    drawn = generate(
        pipeline,
        seeds_by_class(ids, args.num_samples, args.seed),
        image=args.image,
        strength=args.strength,
        mask_image=args.mask,
        **settings.call_arguments(pipeline),
    )
    original = pipeline.prepare_images(args.image)[0]
    rows = [[array_image(((original + 1) * 127.5).round().byte())] for _ in names]
    out = Path(args.out)
    for index, (label_id, number, image) in enumerate(drawn):
        out.mkdir(parents=True, exist_ok=True)
        name = names[index // args.num_samples]
        image.save(out / f"{file_stem(name, label_id)}-{number}.png")
        rows[index // args.num_samples].append(image)
    image_grid(rows, names, ["original", *map(str, range(args.seed, args.seed + args.num_samples))], 4).save(
        out / "grid.png"
    )
    print(f"{len(names) * args.num_samples} images and grid.png are in {out}.")
