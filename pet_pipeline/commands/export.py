"""`pet-pipeline export`: writes a model as ONNX files, alone or with a web page that runs them."""

import argparse
from pathlib import Path
from typing import Any

from .loading import load_classifier_pipeline, load_pipeline
from .options import HelpFormatter, add_model_option, add_sampling_options, sample_settings


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "export",
        help="write a model as ONNX files, with or without a web page",
        description="Writes the networks of a model as ONNX files, the numbers of its sampling as "
        "sampling.json, and with --web a static page that draws and classifies in the browser.",
        formatter_class=HelpFormatter,
    )
    add_model_option(parser, positional=True)
    parser.add_argument("--format", choices=["onnx"], default="onnx", help="format of the networks")
    parser.add_argument(
        "--weights",
        choices=["float32", "int8"],
        help="how the files store matrices; int8 makes them a quarter as large, with a small error; the "
        "default is int8 with --web, and otherwise float32",
    )
    parser.add_argument(
        "--web", action="store_true", help="also write the page; needs npm, which fetches ONNX Runtime Web"
    )
    add_sampling_options(parser)
    parser.add_argument("--out", default="exported", metavar="FOLDER", help="folder of the files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Exports the model, and says how far each network is from PyTorch."""
    from ..export.onnx_models import TOLERANCES, export_onnx
    from ..pipeline_pet_classification import PetClassificationPipeline

    settings = sample_settings(args)
    pipeline = load_pipeline(args.model, args.scheduler, "cpu", revision=args.revision)
    classifier = None
    if args.model == "fast":  # the model from which it was tuned classifies in its place
        classifier = load_classifier_pipeline(None, "cpu")
    elif pipeline.probe is not None:
        classifier = PetClassificationPipeline.from_pipe(pipeline)
    weights = args.weights or ("int8" if args.web else "float32")
    out = Path(args.out)
    differences = export_onnx(pipeline, out, settings, weights, classifier, args.web)
    for name, difference in differences.items():
        size = (out / name).stat().st_size / 1e6
        print(
            f"{out / name}: {size:.1f} MB, differs from PyTorch by at most {difference:.1g} of the root mean "
            f"square of its output (tolerance {TOLERANCES[weights]:g})"
        )
    if classifier is None:
        print("The model has no probe, so that nothing classifies; `pet-pipeline calibrate` fits one.")
    if args.web:
        print(f"{out / 'index.html'} is the page. `python -m http.server --directory {out}` serves it here.")
