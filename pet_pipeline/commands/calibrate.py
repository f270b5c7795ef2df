"""`pet-pipeline calibrate`: fits the classifier, on training images and on held-out images."""

import argparse
from pathlib import Path
from typing import Any

from .loading import load_pipeline, load_reference_of
from .options import (
    HelpFormatter,
    add_device_option,
    add_dtype_option,
    add_reference_options,
    positive_integer,
    seed,
)


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "calibrate",
        help="fit the classifier",
        description="Fits what the classifier needs, and keeps it in the model's folder: how much each noise "
        "level counts, on images that the training held out; a probe of the model's features, on the images "
        "of the training; and how much each of the two counts in their combination.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", metavar="PATH", help="folder of a saved pipeline")
    add_reference_options(
        parser,
        "data set that the model was trained on: Hub id, local data set or image folder",
        required=True,
    )
    parser.add_argument(
        "--num_images",
        type=positive_integer,
        default=1000,
        help="highest number of held-out images of all classes",
    )
    parser.add_argument(
        "--num_evaluations",
        type=positive_integer,
        default=32,
        help="number of evaluations of the denoiser for each class",
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the noise")
    add_device_option(parser)
    add_dtype_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Calibrates the model and prints how well the calibrated classifier does on the same images."""
    import torch

    from ..evaluation.calibration import (
        class_errors,
        fit_calibration,
        fit_probe,
        fit_weights,
        measure_classification,
    )
    from ..evaluation.reference import balanced_subset
    from ..pipeline_pet_classification import PetClassificationPipeline

    if not Path(args.model).is_dir():
        raise ValueError(
            f"{args.model!r} is not a folder; a calibration is kept in the folder of a saved pipeline."
        )
    pipeline = load_pipeline(args.model, device=args.device, dtype=args.dtype)
    classifier = PetClassificationPipeline.from_pipe(pipeline)
    classifier.set_progress_bar_config(disable=True)
    reference = load_reference_of(args, pipeline, "validation")
    held_out = balanced_subset(reference.validation, args.num_images)
    errors = class_errors(classifier, held_out, args.num_evaluations, seed=args.seed)
    calibration = fit_calibration(errors, held_out.labels)
    weights = classifier.band_weights(errors.sigmas, calibration, held_out.images[0].numel())
    scores = {"denoising": -(errors.errors * weights).mean(-1)}
    if pipeline.takes_argument("feature_layer"):
        probe, scores["features"] = fit_probe(classifier, reference.train, held_out)
        both = torch.stack([scores["features"], scores["denoising"]], -1)
        calibration["combination"] = fit_weights(both, held_out.labels)
        scores["combined"] = both @ torch.tensor(calibration["combination"])
        pipeline.register_modules(probe=probe)
        probe.save_pretrained(Path(args.model) / "probe")
    # The index is written anew, with the code beside it; the weights of the model stay as they are.
    pipeline.register_to_config(calibration=calibration)
    pipeline.save_config(args.model)
    print(f"calibration: {calibration}")
    for method, values in scores.items():
        measures = measure_classification(values.softmax(1), held_out.labels, pipeline.class_names)
        print(
            f"On the {len(held_out)} images of the fit, the accuracy of the method {method} is "
            f"{measures['accuracy']:.3f}, the log-loss {measures['log_loss']:.3f} and the calibration error "
            f"{measures['calibration_error']:.3f}."
        )
