"""`pet-pipeline evaluate`: measures the images or the classifications of a model against a data set."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..sampling import SampleSettings
from .loading import load_classifier_pipeline, load_pipeline, load_reference_of
from .options import (
    HelpFormatter,
    add_classification_options,
    add_device_option,
    add_dtype_option,
    add_model_option,
    add_reference_options,
    add_sampling_options,
    positive_integer,
    sample_settings,
    seed,
    whole_number,
)


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the images or the classifications of a model",
        description="Compares a model's images with a data set: Fréchet and kernel distance, precision and "
        "recall, class accuracy, memorisation, evaluations and speed. It prints a Markdown table and writes "
        "evaluation.json, a grid of the first images, and the images that are closest to a copy.",
        formatter_class=HelpFormatter,
    )
    add_model_option(parser, positional=True)
    add_reference_options(parser, "data set: Hub id, local data set or image folder", required=True)
    parser.add_argument(
        "--split",
        default="train",
        help="split to compare with: train, validation (held out of train), or another split of the data set",
    )
    parser.add_argument(
        "--num_images", type=positive_integer, default=1000, help="number of images of all classes"
    )
    parser.add_argument(
        "--validation_images",
        type=whole_number(0),
        default=512,
        help="number of held-out images for the validation loss, with 16 evaluations of each; 0 leaves "
        "it out",
    )
    parser.add_argument(
        "--features",
        choices=["efficientnet", "inception"],
        default="efficientnet",
        help="network whose features are compared; inception gives the usual FID and KID, but its weights "
        "are downloaded",
    )
    parser.add_argument(
        "--floors", action="store_true", help="also measure real images and plain colours, for scale"
    )
    parser.add_argument(
        "--classification",
        action="store_true",
        help="measure the classifier instead, on `--num_images` images of the split; this writes "
        "classification.json and reliability.png",
    )
    add_classification_options(parser)
    parser.add_argument(
        "--curve",
        action="store_true",
        help="also measure the classifier's accuracy by its number of evaluations, which takes longer",
    )
    add_sampling_options(parser)
    add_device_option(parser)
    add_dtype_option(parser)
    parser.add_argument(
        "--seed", type=seed, default=0, help="seed of the first image; the seeds of the next images count up"
    )
    parser.add_argument(
        "--batch_size", type=positive_integer, default=64, help="number of images that are drawn at once"
    )
    parser.add_argument("--out", default="evaluation", metavar="FOLDER", help="folder of the results")
    parser.set_defaults(run=run, check=partial(check, parser))


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if an option would have no effect."""
    if args.classification:
        word, unused = "with", [*SampleSettings.options(), "validation_images", "features", "floors"]
    else:
        word, unused = "without", ["method", "num_evaluations", "curve"]
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no effect {word} --classification")


def run(args: argparse.Namespace) -> None:
    """Measures the model and writes the results."""
    if args.classification:
        run_classification(args)
    else:
        run_images(args)


def run_images(args: argparse.Namespace) -> None:
    """Measures the images of the model."""
    from ..evaluation.images import evaluate, generated_grid, neighbor_grid
    from ..evaluation.metrics import FEATURE_EXTRACTORS
    from ..evaluation.tables import markdown_table, save_record

    settings = sample_settings(args)
    extractor = FEATURE_EXTRACTORS[args.features]()
    pipeline = load_pipeline(args.model, args.scheduler, args.device, args.dtype, revision=args.revision)
    pipeline.set_progress_bar_config(leave=False)
    reference = load_reference_of(args, pipeline, args.split)
    # Features and classes are computed on the CPU, so that the numbers are the same everywhere.
    record, generated = evaluate(
        pipeline,
        reference,
        extractor,
        args.num_images,
        args.batch_size,
        args.seed,
        args.validation_images,
        args.floors,
        **settings.call_arguments(pipeline),
    )
    is_local = Path(args.reference).exists()
    record["settings"] = {
        "model": args.model,
        # An absolute path cannot be taken for a Hub id.
        "reference": str(Path(args.reference).resolve()) if is_local else args.reference,
        "split": args.split,
        **({} if args.scheduler is None else {"scheduler": args.scheduler}),
        "dtype": args.dtype,
        **record["settings"],
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_record(record, out / "evaluation.json")
    neighbor_grid(generated.images, reference).save(out / "neighbors.png")
    generated_grid(generated, pipeline.class_names).save(out / "generated.png")
    print(markdown_table(record, Path(args.model).name if args.model else "bundled model"))
    print(f"evaluation.json, generated.png and neighbors.png are in {out}.")


def run_classification(args: argparse.Namespace) -> None:
    """Measures the classifications of the model."""
    from ..evaluation.calibration import accuracy_curve, evaluate_classification
    from ..evaluation.images import class_accuracy, load_classifier
    from ..evaluation.reference import balanced_subset
    from ..evaluation.tables import save_record
    from ..visualization import reliability_diagram

    pipeline = load_classifier_pipeline(args.model, args.device, args.dtype, revision=args.revision)
    pipeline.set_progress_bar_config(disable=True)
    names = pipeline.class_names
    reference = load_reference_of(args, pipeline, args.split)
    images = balanced_subset(reference.images, args.num_images)
    measures, probabilities = evaluate_classification(
        pipeline, images, args.num_evaluations, args.batch_size, args.seed, args.method
    )
    record: dict[str, Any] = {
        "settings": {
            "model": args.model,
            "reference": args.reference,
            "split": args.split,
            "method": args.method or pipeline.default_method(),
            "num_evaluations": args.num_evaluations,
            "dtype": args.dtype,
            "seed": args.seed,
        },
        "measures": measures,
    }
    config = pipeline.transformer.config
    network = load_classifier(names, config.sample_size, config.in_channels)
    if network is not None:
        measures["network_accuracy"] = class_accuracy(images.images, images.labels, network)
    if args.curve:
        record["curve"] = accuracy_curve(pipeline, images, args.num_evaluations, args.batch_size, args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_record(record, out / "classification.json")
    reliability_diagram(probabilities, images.labels).save(out / "reliability.png")
    print("| measure | value |\n|---|---|")
    for name, value in measures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {share:.3f}" for key, share in value.items())
        print(f"| {name.replace('_', ' ')} | {value if isinstance(value, (str, int)) else f'{value:.4f}'} |")
    for point in record.get("curve", []):
        print("| " + " | ".join(str(value) for value in point.values()) + " |")
    print(f"classification.json and reliability.png are in {out}.")
