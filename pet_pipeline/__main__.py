"""The command line: `pet-pipeline generate …`, also as `python -m pet_pipeline generate …`."""

import argparse
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; each command's function is its default `run`."""
    parser = argparse.ArgumentParser(prog="pet-pipeline", description="Cats and dogs by diffusion.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="make images",
        description="Makes images of the model's classes, one PNG file each and a labelled grid of all.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    generate.add_argument(
        "--model",
        "--model_path",
        metavar="PATH",
        help="saved pipeline or Hub id; the model of the package if not given",
    )
    generate.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="class to draw, may be repeated; all if not given",
    )
    generate.add_argument("--num_samples", type=positive_integer, default=5, help="images per class")
    generate.add_argument("--steps", type=positive_integer, default=18, help="denoising steps")
    generate.add_argument(
        "--guidance_scale", type=float, default=1.5, help="strength of the guidance; 1 is none"
    )
    generate.add_argument(
        "--seed", type=int, default=0, help="of the first image of each class; the next count up"
    )
    generate.add_argument("--out", default="samples", metavar="FOLDER", help="where the images go")
    generate.set_defaults(run=run_generate)
    return parser


def positive_integer(text: str) -> int:
    """Parses a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, but is {number}")
    return number


def run_generate(args: argparse.Namespace) -> None:
    """Makes the images of `pet-pipeline generate`."""
    # Imported here: `--help` and mistakes should not wait for PyTorch.
    from diffusers.utils import logging

    from .pipeline_pet_diffusion import PetDiffusionPipeline
    from .visualization import class_names, image_generators, image_grid

    logging.disable_progress_bar()  # of the loading; sampling has its own
    pipeline = PetDiffusionPipeline.from_pretrained(args.model)
    names = args.classes or class_names(pipeline)
    label_ids = pipeline.get_label_ids([int(name) if name.isdigit() else name for name in names])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    images = pipeline(
        label_ids,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_samples,
        # Every class starts from the same noise, and each image depends on its own seed alone.
        generator=[generator for _ in names for generator in image_generators(args.num_samples, args.seed)],
    ).images
    rows = [images[row * args.num_samples : (row + 1) * args.num_samples] for row in range(len(names))]
    for name, row in zip(names, rows):
        for index, image in enumerate(row):
            image.save(out / f"{name}-{args.seed + index}.png")
    image_grid(rows, names, scale=4).save(out / "grid.png")
    print(f"{len(images)} images and grid.png are in {out}.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 for a failure or 130 for Ctrl-C, and exits with 2 for misuse."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"pet-pipeline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
