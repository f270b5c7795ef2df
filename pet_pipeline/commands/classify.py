"""`pet-pipeline classify`: tells the class of image files."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import load_classifier_pipeline
from .options import (
    HelpFormatter,
    add_classification_options,
    add_device_option,
    add_dtype_option,
    add_model_option,
    seed,
)


if TYPE_CHECKING:
    from ..pipeline_pet_classification import ClassificationEvidence

IMAGES_AT_ONCE = 50


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "classify",
        help="tell the class of images",
        description="Tells the class of each image, one line for each. A file that is not an image is named, "
        "and the other files are still classified.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image file, or folder of image files"
    )
    add_model_option(parser)
    add_classification_options(parser)
    parser.add_argument(
        "--weighting",
        choices=["calibrated", "elbo"],
        default="calibrated",
        help="weights of the noise levels: fitted to held-out images, or those of the likelihood bound",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise")
    add_device_option(parser)
    add_dtype_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object for each image")
    parser.add_argument(
        "--evidence", type=Path, metavar="FILE", help="draw why each image was classified, into this file"
    )
    parser.set_defaults(run=run)


def image_files(paths: list[Path]) -> list[Path]:
    """Returns the files among the paths and in the folders among them, without hidden files.

    Raises:
        ValueError: if there is no file.
    """
    files = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [file for file in inside if not file.is_dir() and (file == path or file.name[0] != ".")]
    if not files:
        raise ValueError(f"There is no file in {', '.join(map(str, paths))}.")
    return files


def run(args: argparse.Namespace) -> None:
    """Classifies the images, and ends with an error if one of them could not be read."""
    import torch
    from PIL import Image

    from ..pipeline_pet_loading import read_image
    from ..visualization import evidence_figure

    files = image_files(args.images)
    if args.evidence is not None:
        if args.evidence.suffix.lower() not in Image.registered_extensions():
            raise ValueError(
                f"--evidence {str(args.evidence)!r} must end as an image file does, such as .png."
            )
        args.evidence.parent.mkdir(parents=True, exist_ok=True)
    pipeline = load_classifier_pipeline(args.model, args.device, args.dtype, revision=args.revision)
    pipeline.set_progress_bar_config(disable=True)
    good, tensors = [], []
    for file in files:
        try:
            tensors.append(pipeline.prepare_image(file, str(file)) / 2 + 0.5)
            good.append(file)
        except ValueError as error:
            print(f"pet-pipeline: {error}", file=sys.stderr)
    if not good:
        raise ValueError("None of the files can be classified.")
    evidence: list[ClassificationEvidence] = []
    for start in range(0, len(good), IMAGES_AT_ONCE):
        output = pipeline(
            tensors[start : start + IMAGES_AT_ONCE],
            num_evaluations=args.num_evaluations,
            weighting=args.weighting,
            generator=torch.Generator().manual_seed(args.seed),
            return_evidence=args.evidence is not None,
            method=args.method,
        )
        evidence += output.evidence or []
        for file, label, probabilities, evaluations in zip(
            good[start:], output.labels, output.probabilities, output.num_evaluations
        ):
            if args.json:
                record = {"image": str(file), "label": label, "probabilities": probabilities}
                print(json.dumps({**record, "num_evaluations": evaluations}, ensure_ascii=False), flush=True)
            else:
                shares = ", ".join(f"{name} {share:.1%}" for name, share in probabilities.items())
                print(f"{file}: {label} ({shares}; {evaluations} evaluations)", flush=True)
    if args.evidence is not None:
        pictures = []
        for file in good:
            pictures.append(read_image(file))
            pictures[-1].thumbnail((256, 256))
        evidence_figure(pictures, evidence, pipeline.class_names).save(args.evidence)
    if len(good) < len(files):
        raise ValueError(f"{len(files) - len(good)} of {len(files)} files could not be classified.")
