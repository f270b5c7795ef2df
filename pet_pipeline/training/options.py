"""The command-line options of `train_pet.py`, and what is checked about them before anything is loaded."""

import argparse
import inspect
import json
from typing import Any

import torch

from ..commands.options import HelpFormatter
from ..transformer_pet import PRESETS as MODEL_PRESETS
from ..transformer_pet import PetTransformer2DModel
from .losses import PRESETS as LOSS_PRESETS


POSITIVE_OPTIONS = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "num_train_epochs",
    "max_train_minutes",
    "max_train_samples",
    "resolution",
    "max_grad_norm",
    "ema_inv_gamma",
    "logging_steps",
    "validation_images",
    "validation_steps",
    "preview_steps",
    "preview_images",
    "checkpointing_steps",
    "checkpoints_total_limit",
)
NEW_MODEL_OPTIONS = ("preset", "model_config", "prediction_type", "frequency_preconditioning")
HUB_OPTIONS = ("hub_model_id", "hub_private_repo", "hub_token", "hub_strategy")

# `--model_config` does not take these arguments of the model, since the data or the scheduler share them.
SHARED_ARGUMENTS = {
    "sample_size": "use --resolution",
    "num_classes": "use --classes",
    "in_channels": "images are read in RGB",
    "prediction_type": "use --prediction_type",
    "sigma_data": "the scheduler fixes it at 0.5",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; exits with a message if the options contradict each other."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    check_options(parser, args)
    return args


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object given on the command line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, but is {text}")
    return value


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message if an option is out of range or contradicts another."""

    def is_given(name: str) -> bool:
        return getattr(args, name) != parser.get_default(name)

    for name in POSITIVE_OPTIONS:
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be positive, but is {value}")
    if args.lr_warmup_steps < 0:
        parser.error(f"--lr_warmup_steps must be 0 or more, but is {args.lr_warmup_steps}")
    if not 0 <= args.label_dropout <= 1:
        parser.error(f"--label_dropout must be in [0, 1], but is {args.label_dropout}")
    if args.max_train_steps is None and args.num_train_epochs is None and args.max_train_minutes is None:
        parser.error("one of --max_train_steps, --num_train_epochs and --max_train_minutes is required")
    for name in NEW_MODEL_OPTIONS:
        if args.pretrained_model_name_or_path is not None and is_given(name):
            parser.error(
                f"--{name} describes a new model and cannot be used with --pretrained_model_name_or_path"
            )
    known = inspect.signature(PetTransformer2DModel.__init__).parameters
    for name in args.model_config:
        if name in SHARED_ARGUMENTS:
            parser.error(f"--model_config cannot set {name!r}: {SHARED_ARGUMENTS[name]}")
        if name not in known:
            parser.error(f"--model_config has {name!r}, but the model has no such argument")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision fp16 requires a GPU; use bf16 or no")
    for name in HUB_OPTIONS:
        if not args.push_to_hub and is_given(name):
            parser.error(f"--{name} requires --push_to_hub")
    if args.hub_token is not None and args.report_to == "wandb":
        parser.error("wandb records the command line, and so --hub_token: set HF_TOKEN instead")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the options, one group for each part of a training."""
    parser = argparse.ArgumentParser(
        description="Train a class-conditional diffusion model on small images.",
        formatter_class=HelpFormatter,
    )
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        default="uoft-cs/cifar10",
        help="Hub id, folder of a local data set, or image folder",
    )
    group.add_argument("--dataset_config_name", help="configuration of the data set")
    group.add_argument("--image_column", help="column of the images; found by its type if not given")
    group.add_argument("--label_column", help="column of the labels; found by its type if not given")
    group.add_argument("--classes", nargs="+", default=["cat", "dog"], help="names of the classes, or `all`")
    group.add_argument(
        "--resolution",
        type=int,
        help=(
            "size that images are resized and cropped to; if not given, the size of the saved model, or 32"
        ),
    )
    group.add_argument("--random_flip", action=flag, default=True, help="mirror images at random")
    group.add_argument(
        "--validation_fraction", type=float, default=0.1, help="fraction of each class that is held out"
    )
    group.add_argument(
        "--validation_images",
        type=int,
        default=512,
        help="number of held-out images that the validation loss is measured on",
    )
    group.add_argument("--max_train_samples", type=int, help="largest number of images that are used")
    group.add_argument("--cache_dir", help="folder of the cache of `datasets`")
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="number of loading processes; 0 is fastest, as images are in memory",
    )

    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=list(MODEL_PRESETS), default="small", help="size of the denoiser")
    group.add_argument(
        "--model_config",
        type=json_object,
        default={},
        help="JSON object of arguments of the model that override those of the preset",
    )
    group.add_argument(
        "--pretrained_model_name_or_path",
        help=(
            "saved pipeline to start from, instead of a new model; classes are matched by "
            "name, new classes start afresh, and --resolution may differ from that of the "
            "pipeline"
        ),
    )
    group.add_argument(
        "--frequency_preconditioning",
        action=flag,
        default=True,
        help="measure the spectrum of the images and precondition a new model by it",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=flag,
        default=False,
        help="save memory by computing activations twice",
    )

    group = parser.add_argument_group("noise and loss")
    group.add_argument(
        "--noise_schedule",
        choices=["adaptive", "fixed"],
        default="adaptive",
        help="draw of noise levels; with the learned weighting, `adaptive` stays close to `fixed`",
    )
    group.add_argument("--p_mean", type=float, default=-1.6, help="mean of ln σ in the training proposal")
    group.add_argument(
        "--p_std", type=float, default=1.4, help="standard deviation of ln σ in the training proposal"
    )
    group.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        default="epsilon",
        help="sign of c_out, with the names of diffusers' EDM schedulers: + for epsilon, - for v_prediction",
    )
    group.add_argument("--loss", choices=list(LOSS_PRESETS), default="balanced", help="preset of the loss")
    group.add_argument(
        "--learned_weighting", action=flag, default=True, help="learn the weight of each noise level"
    )
    group.add_argument(
        "--label_dropout", type=float, default=0.1, help="share of labels that are replaced by the null class"
    )

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--train_batch_size", type=int, default=64, help="number of images per process and micro-step"
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="number of micro-steps per optimizer step"
    )
    group.add_argument(
        "--max_train_steps", type=int, help="number of optimizer steps after which the training ends"
    )
    group.add_argument(
        "--num_train_epochs", type=int, help="number of passes over the data after which the training ends"
    )
    group.add_argument(
        "--max_train_minutes",
        type=float,
        help="minutes after which the training ends; the learning rate decays by the clock",
    )
    group.add_argument(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="Muon together with AdamW, or AdamW alone",
    )
    group.add_argument(
        "--muon_learning_rate",
        type=float,
        default=0.02,
        help="learning rate of Muon, for the matrices of the transformer blocks",
    )
    group.add_argument("--learning_rate", type=float, default=0.003, help="learning rate of AdamW")
    group.add_argument(
        "--lr_scheduler",
        choices=["constant", "linear", "cosine", "trapezoid"],
        default="cosine",
        help="decay of the learning rates; all but `constant` reach zero after the last step",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=50, help="number of optimizer steps of warm-up")
    group.add_argument("--weight_decay", type=float, default=0.0, help="decoupled weight decay")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="first beta of AdamW")
    group.add_argument("--adam_beta2", type=float, default=0.99, help="second beta of AdamW")
    group.add_argument("--adam_epsilon", type=float, default=1e-08, help="epsilon of AdamW")
    group.add_argument(
        "--max_grad_norm",
        type=float,
        default=1.0,
        help="largest norm of the gradients, which are clipped to it",
    )
    group.add_argument("--use_ema", action=flag, default=True, help="average the weights (EMA)")
    group.add_argument("--ema_max_decay", type=float, default=0.9999, help="upper bound of the EMA decay")
    group.add_argument(
        "--ema_inv_gamma",
        type=float,
        default=1.0,
        help="γ of the EMA warm-up, in which the decay is 1 - (1 + step/γ)^-power",
    )
    group.add_argument("--ema_power", type=float, default=0.75, help="power of the EMA warm-up")

    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--mixed_precision",
        choices=["auto", "no", "bf16", "fp16"],
        default="auto",
        help=("precision; `auto` is the choice of Accelerate, or else bf16 where it is clearly faster"),
    )
    group.add_argument(
        "--allow_tf32",
        action=flag,
        default=False,
        help="allow faster float32 matrix products on Ampere and later GPUs",
    )
    group.add_argument("--torch_compile", action=flag, default=False, help="compile the denoiser")
    group.add_argument("--seed", type=int, default=0, help="random seed")

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", default="pet-model", help="folder of the pipeline, checkpoints and pictures"
    )
    group.add_argument(
        "--logging_steps", type=int, default=50, help="number of optimizer steps between logged losses"
    )
    group.add_argument(
        "--validation_steps", type=int, default=1000, help="number of optimizer steps between validations"
    )
    group.add_argument(
        "--preview_steps", type=int, default=1000, help="number of optimizer steps between sample pictures"
    )
    group.add_argument(
        "--preview_images", type=int, default=8, help="number of images per class in sample pictures"
    )
    group.add_argument(
        "--checkpointing_steps", type=int, default=500, help="number of optimizer steps between checkpoints"
    )
    group.add_argument(
        "--checkpoints_total_limit", type=int, default=2, help="largest number of checkpoints that are kept"
    )
    group.add_argument(
        "--resume_from_checkpoint", help="checkpoint to continue from: `latest`, a name or a path"
    )
    group.add_argument(
        "--report_to", help="tracker: tensorboard, wandb or trackio (trackio without pictures)"
    )
    group.add_argument("--logging_dir", default="logs", help="folder of the tracker inside the output folder")
    group.add_argument(
        "--tracker_project_name", default="train_pet", help="name of the project in the tracker"
    )

    group = parser.add_argument_group("hub")
    group.add_argument(
        "--push_to_hub", action=flag, default=False, help="publish the pipeline on the Hugging Face Hub"
    )
    group.add_argument(
        "--hub_model_id", help="repository, USER/NAME or NAME; the name of the output folder if not given"
    )
    group.add_argument(
        "--hub_private_repo",
        action=flag,
        help="make the repository private; if not given, the owner's settings decide",
    )
    group.add_argument(
        "--hub_token",
        help=(
            "access token; HF_TOKEN or `hf auth login` are safer, since other users see "
            "command lines and `accelerate launch` prints them when a run fails"
        ),
    )
    group.add_argument(
        "--hub_strategy",
        choices=["end", "checkpoint"],
        default="end",
        help="push at the end only, or also at each checkpoint",
    )
    return parser
