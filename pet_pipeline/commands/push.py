"""`pet-pipeline push`: publishes a saved pipeline on the Hugging Face Hub."""

import argparse
from typing import Any

from .options import HelpFormatter


def add_parser(commands: Any) -> None:
    """Describes the command to argparse."""
    parser = commands.add_parser(
        "push",
        help="publish a model on the Hugging Face Hub",
        description="Publishes a saved pipeline in one commit: its code, configurations and weights, and its "
        "README.md, notebook, samples and evaluation if the folder has them. Other files in the folder stay "
        "at home. A second commit writes the hash of the first into the snippets that trust the code.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("folder", metavar="PATH", help="folder of a saved pipeline")
    parser.add_argument(
        "repo_id", metavar="REPO", help="repository, USER/NAME, or NAME for the owner of the token"
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="create the repository as private; an existing public one is refused",
    )
    parser.add_argument(
        "--space", action="store_true", help="also publish a Space of the same name with the model's page"
    )
    parser.add_argument(
        "--token",
        help="token that may write; HF_TOKEN or `hf auth login` are better, as others can see a command line",
    )
    parser.add_argument("--message", default="Upload the pipeline", help="first line of the commit message")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Publishes the folder and, if it is asked for, the Space."""
    from ..publishing.push import push_folder
    from ..publishing.space import push_space

    url = push_folder(args.folder, args.repo_id, args.private or None, args.token, args.message)
    print(f"{args.folder} is on the Hub: {url}")
    if args.space:
        print(f"Its page is a Space: {push_space(args.repo_id, args.token)}")
