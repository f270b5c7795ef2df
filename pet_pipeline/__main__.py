"""The command line: `pet-pipeline generate …`, also as `python -m pet_pipeline generate …`."""

import argparse
import sys
from pathlib import Path


# Known here too, as `--help` should not wait for PyTorch.
SCHEDULES = ["adaptive", "constant", "interval", "original"]


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

    evaluate = commands.add_parser(
        "evaluate",
        help="measure the images of a model",
        description="Measures how good a model's images are against a data set: Fréchet and kernel distance, "
        "precision and recall, class accuracy, memorisation, evaluations and speed. Prints a Markdown table; "
        "writes evaluation.json, the first images and the images closest to a copy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    evaluate.add_argument(
        "model",
        nargs="?",
        metavar="PATH",
        help="saved pipeline or Hub id; the model of the package if not given",
    )
    evaluate.add_argument(
        "--reference", required=True, metavar="DATASET", help="Hub id, local data set or image folder"
    )
    evaluate.add_argument(
        "--split",
        default="train",
        help="split compared with: train, validation (held out of train), or another of the data set",
    )
    evaluate.add_argument("--cache_dir", help="cache of `datasets`")
    evaluate.add_argument("--num_images", type=positive_integer, default=1000, help="images of all classes")
    evaluate.add_argument(
        "--features",
        choices=["efficientnet", "inception"],
        default="efficientnet",
        help="inception gives FID and KID proper, and downloads its weights",
    )
    evaluate.add_argument(
        "--floors", action="store_true", help="measure real images and plain colours too, for scale"
    )
    evaluate.add_argument("--steps", type=positive_integer, default=18, help="denoising steps")
    evaluate.add_argument("--guidance_scale", type=float, default=1.5, help="strength of the guidance")
    evaluate.add_argument("--guidance_schedule", choices=SCHEDULES, default="adaptive")
    evaluate.add_argument("--seed", type=int, default=0, help="of the first image; the next count up")
    evaluate.add_argument("--batch_size", type=positive_integer, default=64, help="images at once")
    evaluate.add_argument("--out", default="evaluation", metavar="FOLDER", help="where the files go")
    evaluate.set_defaults(run=run_evaluate)

    push = commands.add_parser(
        "push",
        help="publish a model on the Hugging Face Hub",
        description="Publishes a saved pipeline in one commit: its code, configurations and weights, and its "
        "README.md, samples and evaluation where it has them; nothing else that lies in the folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    push.add_argument("folder", metavar="PATH", help="folder of a saved pipeline")
    push.add_argument("repo_id", metavar="REPO", help="USER/NAME, or NAME for the owner of the token")
    push.add_argument("--private", action="store_true", help="only its owner sees it")
    push.add_argument("--token", help="better set HF_TOKEN or use `hf auth login`: others see a command line")
    push.add_argument("--message", default="Upload the pipeline", help="of the commit")
    push.set_defaults(run=run_push)
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


def run_evaluate(args: argparse.Namespace) -> None:
    """Measures a model, as `pet-pipeline evaluate` does."""
    from diffusers.utils import logging

    from .evaluation import evaluate, load_reference, markdown_table, neighbor_grid, save_record
    from .metrics import FEATURE_EXTRACTORS
    from .pipeline_pet_diffusion import PetDiffusionPipeline
    from .visualization import class_names, sample_grid

    logging.disable_progress_bar()
    extractor = FEATURE_EXTRACTORS[args.features]()
    pipeline = PetDiffusionPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(leave=False)
    names = class_names(pipeline)
    resolution = pipeline.transformer.config.sample_size
    reference = load_reference(args.reference, names, resolution, args.split, args.cache_dir)
    settings = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_schedule": args.guidance_schedule,
    }
    record, generated = evaluate(
        pipeline,
        reference,
        extractor,
        args.num_images,
        args.batch_size,
        args.seed,
        with_floors=args.floors,
        **settings,
    )
    is_local = Path(args.reference).exists()
    record["settings"] = {
        "model": args.model,
        # Absolute, a path cannot be taken for a Hub id.
        "reference": str(Path(args.reference).resolve()) if is_local else args.reference,
        "split": args.split,
        **record["settings"],
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_record(record, out / "evaluation.json")
    neighbor_grid(generated.images, reference).save(out / "neighbors.png")
    sample_grid(pipeline, seed=args.seed, **settings).save(out / "samples.png")
    print(markdown_table(record, Path(args.model).name if args.model else "bundled model"))
    print(f"evaluation.json, samples.png and neighbors.png are in {out}.")


def run_push(args: argparse.Namespace) -> None:
    """Publishes a folder, as `pet-pipeline push` does."""
    from .hub import push_folder

    url = push_folder(args.folder, args.repo_id, args.private or None, args.token, args.message)
    print(f"{args.folder} is on the Hub: {url}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 for a failure or 130 for Ctrl-C, and exits with 2 for misuse."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"pet-pipeline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
