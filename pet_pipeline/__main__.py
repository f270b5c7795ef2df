"""The command line: `pet-pipeline generate …`, also as `python -m pet_pipeline generate …`."""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from .schedulers import SCHEDULERS, scheduler_by_name


if TYPE_CHECKING:
    from PIL import Image

    from .evaluation import Reference
    from .pipeline_pet_classification import PetClassificationPipeline
    from .pipeline_pet_diffusion import PetDiffusionPipeline


# Known here too, as `--help` should not wait for PyTorch.
SCHEDULES = ["adaptive", "constant", "interval", "original"]
# Which extra brings a module that may be missing.
EXTRAS = {"datasets": "train", "torchmetrics": "eval", "gradio": "app"}
GRID_COLUMNS = 32  # images of each class in the grid of `generate`


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not `None` and `False`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; each command's function is its default `run`."""
    parser = argparse.ArgumentParser(prog="pet-pipeline", description="Cats and dogs by diffusion.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="make images",
        description="Makes images of the model's classes, one PNG file each and a labelled grid of the first "
        "of each class.",
        formatter_class=HelpFormatter,
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
    generate.add_argument("--steps", type=number_of_steps, default=18, help="denoising steps, at most 1000")
    generate.add_argument(
        "--guidance_scale", type=float, default=2.5, help="strength of the guidance by classes; 1 is none"
    )
    generate.add_argument(
        "--guidance_schedule",
        choices=SCHEDULES,
        default="adaptive",
        help="how the strength varies with the noise level",
    )
    generate.add_argument(
        "--pag_scale",
        type=float,
        help="strength of perturbed-attention guidance, for clearer shapes; 0 is none, and what suits the "
        "model is saved with it",
    )
    generate.add_argument(
        "--negative_class", metavar="NAME", help="class to steer away from, instead of from no class"
    )
    generate.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        help="a solver of the model's own scheduler, or a scheduler of diffusers; as saved if not given",
    )
    generate.add_argument(
        "--seed", type=seed, default=0, help="of the first image of each class; the next count up"
    )
    generate.add_argument("--batch_size", type=positive_integer, default=64, help="images at once")
    generate.add_argument("--device", help="for example cpu or cuda; a GPU is taken where there is one")
    generate.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights"
    )
    generate.add_argument(
        "--like",
        type=Path,
        metavar="IMAGE",
        help="repeat the image in this PNG of ours; what else is given replaces its settings",
    )
    generate.add_argument("--strip", action="store_true", help="draw the denoising step by step too")
    generate.add_argument(
        "--compare_steps", action="store_true", help="draw the same noise at 5, 10, 20 and 40 steps too"
    )
    generate.add_argument("--out", default="samples", metavar="FOLDER", help="where the images go")
    generate.set_defaults(run=run_generate)

    classify = commands.add_parser(
        "classify",
        help="tell the class of images",
        description="Tells which class each image is of, a line each. A file that is not an image is "
        "named, and the others are still classified.",
        formatter_class=HelpFormatter,
    )
    classify.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them"
    )
    classify.add_argument(
        "--model",
        "--model_path",
        metavar="PATH",
        help="saved pipeline or Hub id; the model of the package if not given",
    )
    classify.add_argument(
        "--num_evaluations", type=positive_integer, default=32, help="of the denoiser for each class, at most"
    )
    classify.add_argument(
        "--weighting",
        choices=["calibrated", "elbo"],
        default="calibrated",
        help="of the noise levels: fitted to held-out images, or that of the likelihood bound",
    )
    classify.add_argument("--seed", type=seed, default=0, help="of the noise")
    classify.add_argument("--device", help="a GPU is taken where there is one")
    classify.add_argument("--json", action="store_true", help="print one JSON object a line")
    classify.add_argument("--evidence", type=Path, metavar="FILE", help="draw why, into this picture")
    classify.set_defaults(run=run_classify)

    calibrate = commands.add_parser(
        "calibrate",
        help="fit the weights of the classifier",
        description="Fits how much each noise level counts when images are classified, on training "
        "images that were held out, and keeps it in the model's folder.",
        formatter_class=HelpFormatter,
    )
    calibrate.add_argument("model", metavar="PATH", help="folder of a saved pipeline")
    add_reference_options(calibrate, "Hub id, local data set or image folder", required=True)
    calibrate.add_argument(
        "--num_images", type=positive_integer, default=1000, help="of all classes, at most"
    )
    calibrate.add_argument("--num_evaluations", type=positive_integer, default=32, help="for each class")
    calibrate.add_argument("--seed", type=seed, default=0, help="of the noise")
    calibrate.add_argument("--device", help="a GPU is taken where there is one")
    calibrate.set_defaults(run=run_calibrate)

    evaluate = commands.add_parser(
        "evaluate",
        help="measure the images of a model",
        description="Measures how good a model's images are against a data set: Fréchet and kernel distance, "
        "precision and recall, class accuracy, memorisation, evaluations and speed. Prints a Markdown table; "
        "writes evaluation.json, the first images and the images closest to a copy.",
        formatter_class=HelpFormatter,
    )
    evaluate.add_argument(
        "model",
        nargs="?",
        metavar="PATH",
        help="saved pipeline or Hub id; the model of the package if not given",
    )
    add_reference_options(evaluate, "Hub id, local data set or image folder", required=True)
    evaluate.add_argument(
        "--split",
        default="train",
        help="split compared with: train, validation (held out of train), or another of the data set",
    )
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
    evaluate.add_argument(
        "--classification",
        action="store_true",
        help="measure the classifier instead, on `--num_images` of the split; writes classification.json and "
        "reliability.png",
    )
    evaluate.add_argument(
        "--num_evaluations", type=positive_integer, default=32, help="of the classifier, for each class"
    )
    evaluate.add_argument(
        "--curve", action="store_true", help="measure its accuracy by evaluations too, which takes longer"
    )
    evaluate.add_argument("--steps", type=number_of_steps, default=18, help="denoising steps")
    evaluate.add_argument("--guidance_scale", type=float, default=2.5, help="strength of the guidance")
    evaluate.add_argument(
        "--guidance_schedule",
        choices=SCHEDULES,
        default="adaptive",
        help="how the guidance varies with the noise level",
    )
    evaluate.add_argument(
        "--pag_scale",
        type=float,
        help="strength of perturbed-attention guidance, for clearer shapes; 0 is none, and what suits the "
        "model is saved with it",
    )
    evaluate.add_argument("--scheduler", choices=SCHEDULERS, help="as saved if not given")
    evaluate.add_argument("--device", help="a GPU is taken where there is one")
    evaluate.add_argument("--seed", type=seed, default=0, help="of the first image; the next count up")
    evaluate.add_argument("--batch_size", type=positive_integer, default=64, help="images at once")
    evaluate.add_argument("--out", default="evaluation", metavar="FOLDER", help="where the files go")
    evaluate.set_defaults(run=run_evaluate)

    app = commands.add_parser(
        "app",
        help="open a web page to make, compare and classify images",
        description="Serves a web page on this machine, to make and classify images and compare settings.",
        formatter_class=HelpFormatter,
    )
    app.add_argument(
        "--model",
        "--model_path",
        metavar="PATH",
        help="saved pipeline or Hub id; the model of the package if not given",
    )
    add_reference_options(
        app,
        "what the model was trained on (Hub id, local data set or image folder): the page then shows the "
        "training images closest to each sample",
    )
    app.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; with 0.0.0.0 other machines see the page"
    )
    app.add_argument("--port", type=port, help="the first free one from 7860 on if not given")
    app.add_argument(
        "--share", action="store_true", help="get a public address, through the servers of Gradio"
    )
    app.add_argument("--device", help="a GPU is taken where there is one")
    app.set_defaults(run=run_app)

    push = commands.add_parser(
        "push",
        help="publish a model on the Hugging Face Hub",
        description="Publishes a saved pipeline in one commit: its code, configurations and weights, and its "
        "README.md, samples and evaluation where it has them; nothing else that lies in the folder.",
        formatter_class=HelpFormatter,
    )
    push.add_argument("folder", metavar="PATH", help="folder of a saved pipeline")
    push.add_argument("repo_id", metavar="REPO", help="USER/NAME, or NAME for the owner of the token")
    push.add_argument("--private", action="store_true", help="only its owner sees it")
    push.add_argument(
        "--space",
        action="store_true",
        help="publish a Space of the same name too, with the page of the model",
    )
    push.add_argument("--token", help="better set HF_TOKEN or use `hf auth login`: others see a command line")
    push.add_argument("--message", default="Upload the pipeline", help="of the commit")
    push.set_defaults(run=run_push)
    return parser


def add_reference_options(parser: argparse.ArgumentParser, help: str, required: bool = False) -> None:
    """Adds the options that name a data set and how `train_pet.py` read and split it."""
    parser.add_argument("--reference", required=required, metavar="DATASET", help=help)
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--image_column", help="found by its type if not given")
    parser.add_argument("--label_column", help="found by its type if not given")
    parser.add_argument(
        "--validation_fraction", type=float, default=0.1, help="of each class; what the training held out"
    )
    parser.add_argument("--max_train_samples", type=positive_integer, help="what the training was given")
    parser.add_argument("--cache_dir", help="cache of `datasets`")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message where an option would have no effect."""
    if args.command != "evaluate":
        return
    defaults = parser.parse_args(["evaluate", "--reference", "any"])
    if args.classification:
        word = "with"
        unused = ["steps", "guidance_scale", "guidance_schedule", "pag_scale", "scheduler"]
        unused += ["features", "floors"]
    else:
        word, unused = "without", ["num_evaluations", "curve"]
    for name in unused:
        if getattr(args, name) != getattr(defaults, name):
            parser.error(f"--{name} has no use {word} --classification")


def positive_integer(text: str) -> int:
    """Parses a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"has to be at least 1, but is {number}")
    return number


def number_of_steps(text: str) -> int:
    """Parses a number of denoising steps, which an image from anywhere may ask for."""
    number = positive_integer(text)
    if number > 1000:
        raise argparse.ArgumentTypeError(f"has to be at most 1000, but is {number}")
    return number


def port(text: str) -> int:
    """Parses the number of a port."""
    number = positive_integer(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"has to be at most 65535, but is {number}")
    return number


def seed(text: str) -> int:
    """Parses a seed, in half the range of PyTorch's, so that one can be counted up from."""
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"has to be in [0, 2⁶³ - 1], but is {number}")
    return number


def words_like(path: Path) -> list[str]:
    """Returns the options that made a PNG of ours.

    Raises:
        ValueError: if it keeps none, or what it keeps cannot be an option.
        OSError: if it cannot be read.
    """
    from .image_metadata import image_settings
    from .pipeline_pet_diffusion import MAX_LABEL_LENGTH

    settings = {"pag_scale": 0.0, **image_settings(path)}  # images from before it was there
    words = ["--num_samples=1"]
    for name in (
        "class",
        "seed",
        "steps",
        "guidance_scale",
        "guidance_schedule",
        "pag_scale",
        "negative_class",
        "scheduler",
        "dtype",
    ):
        value = settings.get(name)
        if value is None:
            continue
        if not isinstance(value, (str, int, float)) or len(str(value)) > MAX_LABEL_LENGTH:
            raise ValueError(f"{str(path)!r} keeps {textwrap.shorten(repr(value), 80)} for {name!r}.")
        words.append(f"--{name}={value}")
    return words


def load_pipeline(
    model: str | None, scheduler: str | None = None, device: str | None = None, dtype: str = "float32"
) -> "PetDiffusionPipeline":
    """Loads a saved pipeline, or the bundled one, for the command line.

    Raises:
        ValueError: if the pipeline cannot be loaded, or the device or the scheduler cannot be used.
    """
    import torch
    from diffusers.utils import logging

    from .pipeline_pet_diffusion import PetDiffusionPipeline

    logging.disable_progress_bar()  # of the loading; sampling has its own
    try:
        pipeline = PetDiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    except MemoryError:
        raise
    except Exception as error:  # diffusers and safetensors raise nearly anything of damaged files
        message = textwrap.shorten(str(error) or type(error).__name__, 500)
        raise ValueError(f"The model {model!r} cannot be loaded: {message}") from error
    if scheduler is not None:
        pipeline.scheduler = scheduler_by_name(scheduler, pipeline.scheduler)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def as_classifier(pipeline: "PetDiffusionPipeline") -> "PetClassificationPipeline":
    """Makes a classifier that shares the weights of a pipeline.

    As `PetClassificationPipeline.from_pipe` does, but without its cast, which diffusers warns of even if
    nothing changes.
    """
    from .pipeline_pet_classification import PetClassificationPipeline

    return PetClassificationPipeline(
        pipeline.transformer,
        pipeline.scheduler,
        id2label=pipeline.id2label,
        calibration=pipeline.config.calibration,
    )


def load_reference_of(args: argparse.Namespace, pipeline: "PetDiffusionPipeline", split: str) -> "Reference":
    """Loads the data set of the options of [`add_reference_options`] for the classes of a pipeline."""
    from .evaluation import load_reference
    from .visualization import class_names

    return load_reference(
        args.reference,
        class_names(pipeline),
        pipeline.transformer.config.sample_size,
        split,
        args.validation_fraction,
        args.max_train_samples,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column,
        cache_dir=args.cache_dir,
    )


def run_generate(args: argparse.Namespace) -> None:
    """Makes the images of `pet-pipeline generate`."""
    # Imported here: `--help` and mistakes should not wait for PyTorch.
    import torch

    from .image_metadata import image_settings, save_image, weights_digest
    from .visualization import (
        class_names,
        denoising_strip,
        image_grid,
        step_comparison,
    )

    pipeline = load_pipeline(args.model, args.scheduler, args.device, args.dtype)
    names = args.classes or class_names(pipeline)
    label_ids, negative_ids = (
        pipeline.get_label_ids(
            # A number is an id, unless a class has it for a name.
            [
                int(name) if name.isdecimal() and name not in pipeline.id2label.values() else name
                for name in list_of_names
            ]
        )
        for list_of_names in (names, [args.negative_class] if args.negative_class else [])
    )
    settings = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_schedule": args.guidance_schedule,
        "pag_scale": args.pag_scale,
        "negative_class_labels": negative_ids or None,
    }
    digest = weights_digest(pipeline.transformer)
    like = {} if args.like is None else image_settings(args.like)
    # In another precision the same weights have other digits.
    if args.like is not None and like.get("dtype") == args.dtype and like.get("weights") != digest:
        print(
            f"pet-pipeline: {args.like} was made by a model with other weights; --model names it",
            file=sys.stderr,
        )
    out = Path(args.out)
    rows: list[list[Image.Image]] = [[] for _ in names]
    # Every class starts from the same noise, and each image depends on its own seed alone.
    order = [(row, args.seed + index) for row in range(len(names)) for index in range(args.num_samples)]
    for start in range(0, len(order), args.batch_size):
        part = order[start : start + args.batch_size]
        images = pipeline(
            [label_ids[row] for row, _ in part],
            generator=[torch.Generator().manual_seed(number) for _, number in part],
            **settings,
        ).images
        out.mkdir(parents=True, exist_ok=True)
        for (row, number), image in zip(part, images):
            name = names[row]
            kept = {
                "class": name,
                "seed": number,
                "steps": args.steps,
                "guidance_scale": args.guidance_scale,
                "guidance_schedule": args.guidance_schedule,
                "pag_scale": pipeline.pag_scale,  # that of the model, if none was given
                "negative_class": args.negative_class,
                "scheduler": args.scheduler,
                "dtype": args.dtype,
                "weights": digest,
            }
            save_image(image, out / f"{file_stem(name, label_ids[row])}-{number}.png", kept)
            if len(rows[row]) < GRID_COLUMNS:
                rows[row].append(image)
    image_grid(rows, names, scale=4).save(out / "grid.png")
    pictures = ["grid.png"]
    if args.strip:
        denoising_strip(pipeline, args.seed, label_ids, **settings).save(out / "strip.png")
        pictures.append("strip.png")
    if args.compare_steps:
        del settings["num_inference_steps"]
        step_comparison(pipeline, seed=args.seed, class_labels=label_ids, **settings).save(out / "steps.png")
        pictures.append("steps.png")
    print(f"{len(order)} images, {' and '.join(pictures)} are in {out}.")


def file_stem(name: str, label_id: int) -> str:
    """Returns a class name if it can begin the name of a file anywhere, else one made of its id."""
    is_plain = all(part.isalnum() for part in re.split("[ _-]", name)) and len(name) <= 64
    return name if is_plain else f"class-{label_id}"


def image_files(paths: list[Path]) -> list[Path]:
    """Returns the files among the paths and in the folders among them, without hidden ones.

    Raises:
        ValueError: if there is none.
    """
    files = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [file for file in inside if not file.is_dir() and (file == path or file.name[0] != ".")]
    if not files:
        raise ValueError(f"There is no file in {', '.join(map(str, paths))}.")
    return files


def run_classify(args: argparse.Namespace) -> None:
    """Classifies images, as `pet-pipeline classify` does; ends with an error if one could not be read."""
    import torch
    from PIL import Image

    from .pipeline_pet_classification import IMAGE_FORMATS, eight_bit_image
    from .visualization import class_names, evidence_figure

    files = image_files(args.images)
    pipeline = as_classifier(load_pipeline(args.model, device=args.device))
    pipeline.set_progress_bar_config(disable=True)
    good, tensors, bad = [], [], []
    for file in files:
        try:
            tensors.append(pipeline.prepare_image(file, str(file)) / 2 + 0.5)
            good.append(file)
        except ValueError as error:
            bad.append(str(error))
            print(f"pet-pipeline: {error}", file=sys.stderr)
    if not good:
        raise ValueError("None of the files is an image.")
    evidence = []
    for start in range(0, len(good), 50):
        output = pipeline(
            tensors[start : start + 50],
            num_evaluations=args.num_evaluations,
            weighting=args.weighting,
            generator=torch.Generator().manual_seed(args.seed),
            return_evidence=args.evidence is not None,
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
            with Image.open(file, formats=IMAGE_FORMATS) as picture:
                pictures.append(eight_bit_image(picture))
        evidence_figure(pictures, evidence, class_names(pipeline)).save(args.evidence)
    if bad:
        raise ValueError(f"{len(bad)} of {len(files)} files could not be classified.")


def run_calibrate(args: argparse.Namespace) -> None:
    """Calibrates a model, as `pet-pipeline calibrate` does."""
    from .classification import class_errors, fit_calibration, measure_classification
    from .evaluation import balanced_subset
    from .visualization import class_names

    if not Path(args.model).is_dir():
        raise ValueError(
            f"{args.model!r} is no folder; a calibration is kept in the folder of a saved pipeline."
        )
    pipeline = load_pipeline(args.model, device=args.device)
    classifier = as_classifier(pipeline)
    classifier.set_progress_bar_config(disable=True)
    reference = load_reference_of(args, pipeline, "validation")
    held_out = balanced_subset(reference.validation, args.num_images)
    errors = class_errors(classifier, held_out, args.num_evaluations, seed=args.seed)
    calibration = fit_calibration(errors, held_out.labels)
    # The index changes, and the code beside it is brought up to date; the weights stay as they are.
    pipeline.register_to_config(calibration=calibration)
    pipeline.save_config(args.model)
    weights = classifier.band_weights(errors.sigmas, calibration, held_out.images[0].numel())
    measures = measure_classification(
        (-(errors.errors * weights).mean(-1)).softmax(1), held_out.labels, class_names(pipeline)
    )
    print(f"calibration: {calibration['weights']}")
    print(
        f"{len(held_out)} images, by which it was fitted: accuracy {measures['accuracy']:.3f}, log-loss "
        f"{measures['log_loss']:.3f}, calibration error {measures['calibration_error']:.3f}"
    )


def run_evaluate_classification(args: argparse.Namespace) -> None:
    """Measures the classifier, as `pet-pipeline evaluate --classification` does."""
    from .classification import accuracy_curve, evaluate_classification
    from .evaluation import balanced_subset, class_accuracy, load_classifier, save_record
    from .visualization import class_names, reliability_diagram

    pipeline = as_classifier(load_pipeline(args.model, device=args.device))
    pipeline.set_progress_bar_config(disable=True)
    names = class_names(pipeline)
    reference = load_reference_of(args, pipeline, args.split)
    images = balanced_subset(reference.images, args.num_images)
    measures, probabilities = evaluate_classification(
        pipeline, images, args.num_evaluations, args.batch_size, args.seed
    )
    record = {
        "settings": {
            "model": args.model,
            "reference": args.reference,
            "split": args.split,
            "num_evaluations": args.num_evaluations,
            "seed": args.seed,
        },
        "measures": measures,
    }
    network = load_classifier(names, pipeline.transformer.config.sample_size)
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


def run_evaluate(args: argparse.Namespace) -> None:
    """Measures a model, as `pet-pipeline evaluate` does."""
    if args.classification:
        return run_evaluate_classification(args)
    from .evaluation import evaluate, generated_grid, neighbor_grid, save_record
    from .hub import markdown_table
    from .metrics import FEATURE_EXTRACTORS
    from .visualization import class_names

    extractor = FEATURE_EXTRACTORS[args.features]()
    pipeline = load_pipeline(args.model, args.scheduler, args.device)
    pipeline.set_progress_bar_config(leave=False)
    reference = load_reference_of(args, pipeline, args.split)
    settings = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_schedule": args.guidance_schedule,
        "pag_scale": args.pag_scale,
    }
    # Features and classes are judged on the CPU: the same numbers everywhere.
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
        **({} if args.scheduler is None else {"scheduler": args.scheduler}),
        **record["settings"],
    }
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_record(record, out / "evaluation.json")
    neighbor_grid(generated.images, reference).save(out / "neighbors.png")
    generated_grid(generated, class_names(pipeline)).save(out / "generated.png")
    print(markdown_table(record, Path(args.model).name if args.model else "bundled model"))
    print(f"evaluation.json, generated.png and neighbors.png are in {out}.")


def run_app(args: argparse.Namespace) -> None:
    """Serves the web page of `pet-pipeline app`."""
    from .app import launch

    pipeline = load_pipeline(args.model, device=args.device)
    reference = None if args.reference is None else load_reference_of(args, pipeline, "train")
    launch(pipeline, reference, args.host, args.port, args.share)


def run_push(args: argparse.Namespace) -> None:
    """Publishes a folder, as `pet-pipeline push` does."""
    from .hub import push_folder, push_space

    url = push_folder(args.folder, args.repo_id, args.private or None, args.token, args.message)
    print(f"{args.folder} is on the Hub: {url}")
    if args.space:
        print(f"Its page is a Space: {push_space(args.repo_id, args.token)}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 for a failure or 130 for Ctrl-C, and exits with 2 for misuse."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    args = parser.parse_args(words)
    check_options(parser, args)
    try:
        if getattr(args, "like", None) is not None:
            # What is given comes after the settings of the image and so replaces them.
            like = [
                word for word in words_like(args.like) if not (args.classes and word.startswith("--class="))
            ]
            args = parser.parse_args([args.command, *like, *words[words.index(args.command) + 1 :]])
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        hint = f'; `pip install "pet-pipeline[{extra}]"` installs it' if extra else ""
        print(f"pet-pipeline: {error}{hint}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"pet-pipeline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
