"""The command line: `pet-pipeline COMMAND …`, also `python -m pet_pipeline COMMAND …`."""

import argparse
import sys

from .commands import app, calibrate, classify, edit, evaluate, export, generate, interpolate, push


# The extra of the package that installs a module which may be missing.
EXTRAS = {
    "datasets": "train",
    "torch_fidelity": "eval",
    "gradio": "app",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; `run` of its result carries the command out."""
    parser = argparse.ArgumentParser(prog="pet-pipeline", description="Draw and classify cats and dogs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, edit, interpolate, classify, calibrate, evaluate, app, export, push):
        command.add_parser(commands)
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    """Parses the command line, and with `--like` the options of an image before those that are given."""
    parser = build_parser()
    args = parser.parse_args(words)
    if getattr(args, "like", None) is not None:
        options = generate.options_of_image(args.like)
        if args.classes:  # an option that can be repeated would add to that of the image
            options = [option for option in options if not option.startswith("--class=")]
        args = parser.parse_args([args.command, *options, *words[words.index(args.command) + 1 :]])
    if "check" in args:
        args.check(args)
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        `int`: 0, 1 after a failure, or 130 after Ctrl-C. Wrong options exit with 2.
    """
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        hint = f'; in a clone, `pip install ".[{extra}]"` installs it' if extra else ""
        print(f"pet-pipeline: {error}{hint}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"pet-pipeline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
