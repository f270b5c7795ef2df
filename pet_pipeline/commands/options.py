"""Options that several commands share, and the types of their values."""

import argparse
from collections.abc import Callable

from ..sampling import MAX_SEED, SampleSettings


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option, except where it is `None` or `False`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_no_default = action.default is None or action.default is False
        return action.help if has_no_default else super()._get_help_string(action)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Returns a parser of whole numbers of at least `low` and, if it is given, at most `high`."""

    def parse(text: str) -> int:
        number = int(text)
        if number < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, but is {number}")
        if high is not None and number > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, but is {number}")
        return number

    parse.__name__ = "whole number"  # argparse shows it for text that is not a number
    return parse


positive_integer = whole_number(1)
seed = whole_number(0, MAX_SEED)


def add_model_option(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """Adds the option, or the optional positional argument, that names the model, and its revision."""
    names = ["model"] if positional else ["--model", "--model_path"]
    help = "folder of a saved pipeline, its Hub id, or `fast`; the default is the model of the package"
    parser.add_argument(*names, nargs="?" if positional else None, metavar="PATH", help=help)
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the device."""
    parser.add_argument(
        "--device", help="device, such as cpu or cuda; the default is a GPU where there is one"
    )


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option that chooses the precision of the weights."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="precision of the weights",
    )


def add_classification_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose how images are classified."""
    parser.add_argument(
        "--method",
        choices=["denoising", "features", "combined"],
        help="what tells the class: the errors of denoising, the features of the model, or both combined; "
        "the default is both if the model was calibrated for it, and otherwise denoising",
    )
    parser.add_argument(
        "--num_evaluations",
        type=positive_integer,
        default=32,
        help="highest number of evaluations of the denoiser for each class, an even number",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every field of [`SampleSettings`]."""
    defaults = SampleSettings()
    for name, option in SampleSettings.options().items():
        kind = SampleSettings.number_type(name)
        parser.add_argument(
            f"--{name}",
            type=whole_number(int(option.low), int(option.high)) if kind is int else kind or str,
            default=getattr(defaults, name),
            choices=option.choices or None,
            metavar=None if kind or option.choices else "NAME",
            help=option.help,
        )


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the commands that draw images: the model, what to draw, and how."""
    add_model_option(parser)
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="class to draw, may be repeated; the default is every class",
    )
    parser.add_argument("--num_samples", type=positive_integer, default=5, help="number of images per class")
    add_sampling_options(parser)
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="seed of the first image of each class; the seeds of the next images count up",
    )
    add_device_option(parser)
    add_dtype_option(parser)


def sample_settings(args: argparse.Namespace) -> SampleSettings:
    """Returns the values of the options of [`add_sampling_options`].

    Raises:
        ValueError: if a value is out of range.
    """
    return SampleSettings(**{name: getattr(args, name) for name in SampleSettings.options()})


def add_reference_options(parser: argparse.ArgumentParser, help: str, required: bool = False) -> None:
    """Adds the options that name a data set and repeat how `train_pet.py` read and split it."""
    parser.add_argument("--reference", required=required, metavar="DATASET", help=help)
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--train_split", default="train", help="split that the training was given")
    parser.add_argument(
        "--image_column", help="column of the images; the default is the only column of that type"
    )
    parser.add_argument(
        "--label_column", help="column of the labels; the default is what `train_pet.py` finds by itself"
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        help="share of each class that the training held out",
    )
    parser.add_argument(
        "--max_train_samples", type=positive_integer, help="number of images that the training was given"
    )
    parser.add_argument("--cache_dir", help="folder of the cache of `datasets`")
