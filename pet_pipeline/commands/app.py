"""`pet-pipeline app`: serves the web page."""

import argparse
from typing import Any

from .loading import load_pipeline, load_reference_of
from .options import HelpFormatter, add_device_option, add_model_option, add_reference_options, whole_number


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "app",
        help="open a web page to draw, edit, compare and classify images",
        description="Serves a web page on this machine, to draw, edit, compare and classify images.",
        formatter_class=HelpFormatter,
    )
    add_model_option(parser)
    add_reference_options(
        parser,
        "data set that the model was trained on (Hub id, local data set or image folder); the page then "
        "shows the training images that are closest to each sample",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; other machines see the page if it is 0.0.0.0",
    )
    parser.add_argument(
        "--port",
        type=whole_number(1, 65535),
        help="port to listen on; the default is the first free one from 7860 on",
    )
    parser.add_argument(
        "--share", action="store_true", help="get a public address through the servers of Gradio"
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    from ..app import launch

    pipeline = load_pipeline(args.model, device=args.device, revision=args.revision)
    reference = None if args.reference is None else load_reference_of(args, pipeline, "train")
    launch(pipeline, reference, args.host, args.port, args.share)
