"""The command-line options of `train_pet.py`, and what is checked about them before anything is loaded."""

import argparse
import inspect
import json
from typing import Any

import torch

from ..commands.options import HelpFormatter, positive_integer, whole_number
from ..transformer_pet import PRESETS as MODEL_PRESETS
from ..transformer_pet import PetTransformer2DModel
from .consistency import NUM_LEVELS
from .data import IMAGE_MODES
from .losses import PRESETS as LOSS_PRESETS


NUM_EVALUATED = 256  # samples that `--evaluation_steps` compares with the validation images
NEW_MODEL_OPTIONS = ("preset", "model_config", "prediction_type", "frequency_preconditioning")
# Defaults of the objective `consistency` that differ from those of the objective `denoising`.
CONSISTENCY_DEFAULTS: dict[str, Any] = {
    "loss": "mse",
    "learned_weighting": False,
    "label_dropout": 0.0,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
}
NO_CONSISTENCY_OPTIONS = ("noise_schedule", "p_mean", "p_std", "augmentation_probability")
NOT_FOR_STREAMS = ("num_train_epochs", "max_train_samples", "validation_fraction", "max_memory_gb")
HUB_OPTIONS = ("hub_model_id", "hub_private_repo", "hub_token", "hub_strategy")

# `--model_config` does not take these arguments of the model, since the data or the scheduler share them.
SHARED_ARGUMENTS = {
    "sample_size": "use --resolution",
    "num_classes": "use --classes",
    "in_channels": "use --image_mode",
    "augment_dim": "use --augmentation_probability",
    "prediction_type": "use --prediction_type",
    "sigma_data": "the scheduler fixes it at 0.5",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; exits with a message if the options contradict each other."""
    parser = build_parser()
    if parser.parse_args(arguments).objective == "consistency":
        parser.set_defaults(**CONSISTENCY_DEFAULTS)
    args = parser.parse_args(arguments)
    check_options(parser, args)
    return args


def positive_number(text: str) -> float:
    """Parses a number above 0."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be positive, but is {text}")
    return number


def share(text: str) -> float:
    """Parses a number in [0, 1]."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], but is {text}")
    return number


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
    """Exits with a message if an option contradicts another."""

    def is_given(name: str) -> bool:
        return getattr(args, name) != parser.get_default(name)

    if args.max_train_steps is None and args.num_train_epochs is None and args.max_train_minutes is None:
        parser.error("one of --max_train_steps, --num_train_epochs and --max_train_minutes is required")
    for name in NEW_MODEL_OPTIONS:
        if args.pretrained_model_name_or_path is not None and is_given(name):
            parser.error(
                f"--{name} describes a new model and cannot be used with --pretrained_model_name_or_path"
            )
    if args.objective == "consistency":
        if args.pretrained_model_name_or_path is None:
            parser.error("--objective consistency requires --pretrained_model_name_or_path, the teacher")
        if args.label_dropout:
            parser.error("--label_dropout must be 0 with --objective consistency: the student is not guided")
        if args.train_batch_size % NUM_LEVELS:
            parser.error(
                f"--train_batch_size must be a multiple of {NUM_LEVELS} with --objective consistency"
            )
        for name in NO_CONSISTENCY_OPTIONS:
            if is_given(name):
                parser.error(f"--{name} has no effect with --objective consistency")
    for name in NOT_FOR_STREAMS:
        if args.streaming and is_given(name):
            parser.error(f"--{name} cannot be used with --streaming: a stream has no known length and size")
    if is_given("shuffle_buffer_size") and not args.streaming:
        parser.error("--shuffle_buffer_size requires --streaming")
    if args.lora_rank is not None and args.pretrained_model_name_or_path is None:
        parser.error("--lora_rank requires --pretrained_model_name_or_path")
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

    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", default="uoft-cs/cifar10", help="Hub id, local data set, or image folder")
    add("--dataset_config_name", help="configuration of the data set")
    add("--image_column", help="column of the images; found by its type if not given")
    add(
        "--label_column",
        help="column of the labels, which may be class labels, integers or strings; found by its type or the "
        "name `label` if not given",
    )
    add("--train_split", default="train", help="split of the data set to train on")
    add(
        "--classes",
        nargs="+",
        default=["cat", "dog"],
        help="names of the classes, or `all`, which is also the choice for images without labels",
    )
    add(
        "--image_mode",
        choices=list(IMAGE_MODES),
        help="mode that images are converted to; the default is that of the saved model, or RGB",
    )
    add(
        "--resolution",
        type=positive_integer,
        help="size that images are resized and cropped to; the default is that of the saved model, or 32",
    )
    add("--random_flip", action=flag, default=True, help="mirror images at random")
    add(
        "--augmentation_probability",
        type=share,
        default=0.0,
        help="probability of each of five geometric changes of an image, which a new model is told of; 0.12 "
        "is usual for small data sets",
    )
    add("--validation_fraction", type=float, default=0.1, help="fraction of each class that is held out")
    add(
        "--validation_images",
        type=positive_integer,
        default=512,
        help="number of held-out images that the validation loss is measured on",
    )
    add(
        "--max_train_samples",
        type=positive_integer,
        help="largest number of images that are used, held-out ones too",
    )
    add("--cache_dir", help="folder of the cache of `datasets`")
    add(
        "--max_memory_gb",
        type=positive_number,
        help="largest size in GB of the decoded images that a process holds in memory; larger data sets are "
        "decoded in every pass; the default is the share of a process of half of the free memory",
    )
    add(
        "--streaming",
        action=flag,
        default=False,
        help="read the data set as a stream, without storing it; the first --validation_images images of the "
        "chosen classes are held out",
    )
    add(
        "--shuffle_buffer_size",
        type=positive_integer,
        default=10_000,
        help="number of images of a stream, not yet decoded, that each loading process shuffles",
    )
    add(
        "--dataloader_num_workers",
        type=whole_number(0),
        help="number of loading processes; the default is 0 for images in memory, and otherwise one for each "
        "core, at most 8",
    )

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(MODEL_PRESETS), default="small", help="size of the denoiser")
    add(
        "--model_config",
        type=json_object,
        default={},
        help="JSON object of arguments of the model that override those of the preset",
    )
    add(
        "--pretrained_model_name_or_path",
        help="saved pipeline to start from, instead of a new model; classes are matched by name, new classes "
        "start afresh, and --resolution may differ from that of the pipeline",
    )
    add(
        "--lora_rank",
        type=positive_integer,
        help="train low-rank updates of this rank (LoRA) of the saved pipeline, instead of all its weights",
    )
    add(
        "--frequency_preconditioning",
        action=flag,
        default=True,
        help="measure the spectrum of the images and precondition a new model by it",
    )
    add(
        "--gradient_checkpointing",
        action=flag,
        default=False,
        help="save memory by computing activations twice",
    )

    add = parser.add_argument_group("noise and loss").add_argument
    add(
        "--objective",
        choices=["denoising", "consistency"],
        default="denoising",
        help="`consistency` tunes the saved pipeline to draw in a few steps, with its guidance built in; "
        "other defaults then hold, which docs/training.md lists",
    )
    add(
        "--noise_schedule",
        choices=["adaptive", "fixed"],
        default="adaptive",
        help="how noise levels are drawn: `adaptive` draws those with a large loss more often; with the "
        "learned weighting, it stays close to `fixed`",
    )
    add(
        "--p_mean",
        type=float,
        default=-1.6,
        help="mean of ln σ in the training proposal; docs/training.md advises on sizes other than 32",
    )
    add("--p_std", type=float, default=1.4, help="standard deviation of ln σ in the training proposal")
    add(
        "--prediction_type",
        choices=["epsilon", "v_prediction"],
        default="epsilon",
        help="sign of the network's output in the preconditioning (c_out of EDM), with the names of the EDM "
        "schedulers of diffusers: + for epsilon, - for v_prediction",
    )
    add(
        "--loss",
        choices=list(LOSS_PRESETS),
        default="balanced",
        help="`mse` is the squared error; `balanced` adds L1, cosine, high-frequency and edge terms to it",
    )
    add("--learned_weighting", action=flag, default=True, help="learn the weight of each noise level")
    add("--label_dropout", type=share, default=0.1, help="share of labels replaced by the null class")

    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=positive_integer, default=64, help="images per process and micro-step")
    add(
        "--gradient_accumulation_steps",
        type=positive_integer,
        default=1,
        help="micro-steps per optimizer step",
    )
    add("--max_train_steps", type=positive_integer, help="optimizer steps after which the training ends")
    add(
        "--num_train_epochs", type=positive_integer, help="passes over the data after which the training ends"
    )
    add(
        "--max_train_minutes",
        type=positive_number,
        help="minutes after which the training ends; the learning rate decays by the clock",
    )
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="Muon with AdamW, or AdamW alone")
    add(
        "--muon_learning_rate",
        type=float,
        default=0.02,
        help="learning rate of Muon, for the matrices of the blocks of the denoiser",
    )
    add("--learning_rate", type=float, default=0.003, help="learning rate of AdamW")
    add(
        "--lr_scheduler",
        choices=["constant", "linear", "cosine", "trapezoid"],
        default="cosine",
        help="decay of the learning rates; all but `constant` reach zero after the last step",
    )
    add("--lr_warmup_steps", type=whole_number(0), default=50, help="number of optimizer steps of warm-up")
    add("--weight_decay", type=float, default=0.0, help="decoupled weight decay")
    add("--adam_beta1", type=float, default=0.9, help="first beta of AdamW")
    add("--adam_beta2", type=float, default=0.99, help="second beta of AdamW")
    add("--adam_epsilon", type=float, default=1e-08, help="epsilon of AdamW")
    add(
        "--max_grad_norm",
        type=positive_number,
        default=1.0,
        help="largest norm of the gradients, which are clipped to it",
    )
    add("--use_ema", action=flag, default=True, help="average the weights (EMA)")
    add("--ema_max_decay", type=float, default=0.9999, help="upper bound of the EMA decay")
    add(
        "--ema_inv_gamma",
        type=positive_number,
        default=1.0,
        help="γ of the EMA warm-up, in which the decay is 1 - (1 + step/γ)^-power",
    )
    add("--ema_power", type=float, default=0.75, help="power of the EMA warm-up")

    add = parser.add_argument_group("hardware").add_argument
    add(
        "--mixed_precision",
        choices=["auto", "no", "bf16", "fp16"],
        default="auto",
        help="precision; `auto` is the choice of Accelerate, or else bf16 where it is clearly faster",
    )
    add("--allow_tf32", action=flag, default=False, help="faster float32 products on Ampere and later GPUs")
    add("--torch_compile", action=flag, default=False, help="compile the denoiser")
    add("--seed", type=int, default=0, help="random seed")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="pet-model", help="folder of the pipeline, checkpoints and pictures")
    add("--logging_steps", type=positive_integer, default=50, help="optimizer steps between logged losses")
    add("--validation_steps", type=positive_integer, default=1000, help="optimizer steps between validations")
    add(
        "--evaluation_steps",
        type=positive_integer,
        help=f"optimizer steps between measurements of KID, the distance of {NUM_EVALUATED} samples from "
        "held-out images, which need the extra `eval`",
    )
    add(
        "--preview_steps", type=positive_integer, default=1000, help="optimizer steps between sample pictures"
    )
    add(
        "--preview_images",
        type=whole_number(0),
        default=8,
        help="images per class in sample pictures; 0 draws no pictures but that of the model card",
    )
    add(
        "--checkpointing_steps",
        type=positive_integer,
        default=500,
        help="optimizer steps between checkpoints",
    )
    add(
        "--checkpoints_total_limit",
        type=positive_integer,
        default=2,
        help="number of checkpoints that are kept",
    )
    add("--resume_from_checkpoint", help="checkpoint to continue from: `latest`, a name or a path")
    add("--report_to", help="tracker: tensorboard, wandb or trackio")
    add("--logging_dir", default="logs", help="folder of the tracker inside the output folder")
    add("--tracker_project_name", default="train_pet", help="name of the project in the tracker")

    add = parser.add_argument_group("hub").add_argument
    add("--push_to_hub", action=flag, default=False, help="publish the pipeline on the Hugging Face Hub")
    add("--hub_model_id", help="repository, USER/NAME or NAME; the name of the output folder if not given")
    add(
        "--hub_private_repo",
        action=flag,
        help="make the repository private; if not given, the owner's settings decide",
    )
    add(
        "--hub_token",
        help="access token; HF_TOKEN or `hf auth login` are safer, since other users see command lines and "
        "`accelerate launch` prints them when a run fails",
    )
    add(
        "--hub_strategy",
        choices=["end", "checkpoint"],
        default="end",
        help="push at the end only, or also at each checkpoint",
    )
    return parser
