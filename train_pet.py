"""Trains a class-conditional diffusion model on small images and saves it as a pipeline folder.

    accelerate launch train_pet.py --dataset_name uoft-cs/cifar10 --classes cat dog --output_dir out \\
        --max_train_minutes 60

    python train_pet.py --help          # every option
    accelerate launch train_pet.py … --resume_from_checkpoint latest
    accelerate launch train_pet.py … --push_to_hub

The folder then holds a `PetDiffusionPipeline` of the averaged (EMA) weights with its model card and samples,
`best/` the pipeline at the lowest validation loss, `samples/` the pictures, and `metrics.jsonl` every logged
number.
"""

import argparse
import inspect
import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
    set_seed,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

from pet_pipeline import (
    AdaptiveEDMScheduler,
    BalancedAdaptiveLoss,
    PetDiffusionPipeline,
    PetTransformer2DModel,
)
from pet_pipeline.commands.options import HelpFormatter
from pet_pipeline.evaluation.metrics import validation_loss
from pet_pipeline.pipeline_pet_loading import check_labels
from pet_pipeline.publishing.card import TrainingReport, render_model_card
from pet_pipeline.publishing.client import create_repository
from pet_pipeline.publishing.push import EVALUATION_FILES, push_folder
from pet_pipeline.training.checkpointing import (
    Interruption,
    checkpoint_path,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    read_split,
    save_checkpoint,
    save_pipeline,
    set_aside,
    trim_log,
)
from pet_pipeline.training.data import (
    ImageDataset,
    describe_split,
    load_image_dataset,
    random_horizontal_flip,
    split_dataset,
    to_model_range,
)
from pet_pipeline.training.losses import PRESETS as LOSS_PRESETS
from pet_pipeline.training.losses import DenoiserWithLoss
from pet_pipeline.training.optimization import create_optimizer, learning_rate_factor
from pet_pipeline.transformer_pet import PRESETS as MODEL_PRESETS
from pet_pipeline.transformer_pet import frequency_variances
from pet_pipeline.visualization import denoising_strip, loss_curves, sample_grid, step_comparison


MODEL_CARD = Path(__file__).with_name("model_card.md")

# Arguments of the model that the data and the scheduler have a say in.
MODEL_OPTIONS = {
    "sample_size": "use --resolution",
    "num_classes": "use --classes",
    "in_channels": "images are read in RGB",
    "prediction_type": "use --prediction_type",
    "sigma_data": "the scheduler's is 0.5",
}

# As many steps in a row without a finite gradient end a training. Each halves the loss scale of fp16, which
# starts at 65,536: up to here that alone may be the reason.
MAX_SKIPPED_STEPS = 10


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; exits with a message where it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Train a class-conditional diffusion model on small images.",
        formatter_class=HelpFormatter,
    )
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_name", default="uoft-cs/cifar10", help="Hub id, local data set or image folder"
    )
    group.add_argument("--dataset_config_name", help="configuration of the data set")
    group.add_argument("--image_column", help="found by its type if not given")
    group.add_argument("--label_column", help="found by its type if not given")
    group.add_argument("--classes", nargs="+", default=["cat", "dog"], help="class names, or `all`")
    group.add_argument(
        "--resolution",
        type=int,
        help="images are resized and cropped to this size; 32, or the saved model's, if not given",
    )
    group.add_argument("--random_flip", action=flag, default=True, help="mirror images at random")
    group.add_argument("--validation_fraction", type=float, default=0.1, help="of each class, held out")
    group.add_argument("--validation_images", type=int, default=512, help="how many of them measure the loss")
    group.add_argument("--max_train_samples", type=int, help="use only this many images")
    group.add_argument("--cache_dir", help="cache of `datasets`")
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="images are in memory: 0 is fastest"
    )

    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=list(MODEL_PRESETS), default="small", help="size of the denoiser")
    group.add_argument(
        "--model_config", type=json_object, default={}, help="JSON of arguments that override the preset's"
    )
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="start from this saved pipeline instead of a preset; classes are matched by name, new ones "
        "start afresh; another --resolution than its own is possible; noise levels are drawn as the options "
        "here say",
    )
    group.add_argument(
        "--frequency_preconditioning",
        action=flag,
        default=True,
        help="measure the images' frequencies and leave to a new model what they do not tell",
    )
    group.add_argument("--gradient_checkpointing", action=flag, default=False, help="less memory, more time")

    group = parser.add_argument_group("noise and loss")
    group.add_argument(
        "--noise_schedule",
        choices=["adaptive", "fixed"],
        default="adaptive",
        help="draw of noise levels; the adaptive one acts with --no-learned_weighting, as there is nothing "
        "to adapt to otherwise",
    )
    group.add_argument("--p_mean", type=float, default=-1.6, help="mean of ln σ in the training proposal")
    group.add_argument(
        "--p_std", type=float, default=1.4, help="standard deviation of ln σ in the training proposal"
    )
    group.add_argument(
        "--prediction_type", choices=["epsilon", "v_prediction"], default="epsilon", help="sign of c_out"
    )
    group.add_argument("--loss", choices=list(LOSS_PRESETS), default="balanced", help="preset of the loss")
    group.add_argument(
        "--learned_weighting", action=flag, default=True, help="learn the weight of each noise level"
    )
    group.add_argument(
        "--label_dropout", type=float, default=0.1, help="share of labels replaced by the null class"
    )

    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=64, help="images per process and micro-step")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step"
    )
    group.add_argument("--max_train_steps", type=int, help="stop after this many optimizer steps")
    group.add_argument("--num_train_epochs", type=int, help="stop after this many passes over the data")
    group.add_argument(
        "--max_train_minutes", type=float, help="stop by the clock, which the decay then follows"
    )
    group.add_argument(
        "--optimizer", choices=["muon", "adamw"], default="muon", help="Muon with AdamW, or AdamW alone"
    )
    group.add_argument(
        "--muon_learning_rate", type=float, default=0.02, help="for matrices of the transformer blocks"
    )
    group.add_argument("--learning_rate", type=float, default=3e-3, help="of AdamW")
    group.add_argument(
        "--lr_scheduler",
        choices=["constant", "linear", "cosine", "trapezoid"],
        default="cosine",
        help="decay of the learning rates; after the last step all but `constant` are exactly zero",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=50, help="optimizer steps of warm-up")
    group.add_argument("--weight_decay", type=float, default=0.0, help="decoupled weight decay")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="of AdamW")
    group.add_argument("--adam_beta2", type=float, default=0.99, help="of AdamW")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="of AdamW")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    group.add_argument("--use_ema", action=flag, default=True, help="average the weights (EMA)")
    group.add_argument("--ema_max_decay", type=float, default=0.9999, help="upper bound of the EMA decay")
    group.add_argument(
        "--ema_inv_gamma", type=float, default=1.0, help="EMA warm-up: decay = 1 - (1 + step/γ)^-power"
    )
    group.add_argument("--ema_power", type=float, default=0.75, help="EMA warm-up exponent")

    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--mixed_precision",
        choices=["auto", "no", "bf16", "fp16"],
        default="auto",
        help="auto: what Accelerate is configured for, else bf16 where it is clearly faster",
    )
    group.add_argument(
        "--allow_tf32", action=flag, default=False, help="faster float32 matrix products on Ampere and later"
    )
    group.add_argument("--torch_compile", action=flag, default=False, help="compile the denoiser")
    group.add_argument("--seed", type=int, default=0, help="of everything random")

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir", default="pet-model", help="folder of the pipeline, checkpoints and pictures"
    )
    group.add_argument("--logging_steps", type=int, default=50, help="optimizer steps between logged losses")
    group.add_argument(
        "--validation_steps", type=int, default=1000, help="optimizer steps between validations"
    )
    group.add_argument(
        "--preview_steps", type=int, default=1000, help="optimizer steps between sample pictures"
    )
    group.add_argument("--preview_images", type=int, default=8, help="images per class in them")
    group.add_argument(
        "--checkpointing_steps", type=int, default=500, help="optimizer steps between checkpoints"
    )
    group.add_argument("--checkpoints_total_limit", type=int, default=2, help="how many checkpoints are kept")
    group.add_argument("--resume_from_checkpoint", help="`latest`, a checkpoint's name or its path")
    group.add_argument(
        "--report_to", help="tracker: tensorboard, wandb or trackio (the last without pictures)"
    )
    group.add_argument(
        "--logging_dir", default="logs", help="folder of the tracker, inside the output folder"
    )
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
        "--hub_private_repo", action=flag, help="only its owner sees it; by default, as their settings say"
    )
    group.add_argument(
        "--hub_token",
        help="better set HF_TOKEN or use `hf auth login`: others see a command line, and `accelerate launch` "
        "prints it when a run fails",
    )
    group.add_argument(
        "--hub_strategy",
        choices=["end", "checkpoint"],
        default="end",
        help="push at the end, or at each checkpoint too",
    )

    args = parser.parse_args(arguments)
    for name in (
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
    ):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} has to be positive, but is {value}")
    if args.lr_warmup_steps < 0:
        parser.error(f"--lr_warmup_steps has to be 0 or more, but is {args.lr_warmup_steps}")
    if not 0 <= args.label_dropout <= 1:
        parser.error(f"--label_dropout has to be in [0, 1], but is {args.label_dropout}")
    if args.max_train_steps is None and args.num_train_epochs is None and args.max_train_minutes is None:
        parser.error("one of --max_train_steps, --num_train_epochs and --max_train_minutes is needed")
    if args.pretrained_model_name_or_path is not None:
        for name in ("preset", "model_config", "prediction_type", "frequency_preconditioning"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(
                    f"--{name} describes a new model; it has no use with --pretrained_model_name_or_path"
                )
    known = inspect.signature(PetTransformer2DModel.__init__).parameters
    for name in args.model_config:
        if name in MODEL_OPTIONS:
            parser.error(f"{name} in --model_config is not for a model alone: {MODEL_OPTIONS[name]}")
        if name not in known:
            parser.error(f"--model_config has {name!r}, but the model has no such argument")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision fp16 needs a GPU; use bf16 or no")
    for name in ("hub_model_id", "hub_private_repo", "hub_token", "hub_strategy"):
        if not args.push_to_hub and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no use without --push_to_hub")
    if args.hub_token is not None and args.report_to == "wandb":
        parser.error("wandb records the command line, and so --hub_token: set HF_TOKEN instead")
    return args


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object given on the command line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"has to be a JSON object, but is {text}")
    return value


def adapt_model(
    pipeline: PetDiffusionPipeline, class_names: list[str], resolution: int
) -> PetTransformer2DModel:
    """Returns a saved pipeline's model for these classes and images of this size, to be trained further.

    Classes that the pipeline knows by name keep their embedding, and the null class does; new ones start as
    in a new model. Where the pipeline knows no names, the classes have to be as many, and keep their order.
    Positions span the same range on images of any size.

    Raises:
        ValueError: if it knows no names and another number of classes, or is not for RGB images.
    """
    transformer = pipeline.transformer
    config = transformer.config
    if config.in_channels != 3:
        raise ValueError(f"Images are read in RGB, but the saved model has {config.in_channels} channels.")
    num_classes = config.num_classes
    known = {pipeline.id2label[index]: index for index in range(num_classes) if index in pipeline.id2label}
    if not known and num_classes != len(class_names):
        raise ValueError(
            f"The saved model has {num_classes} classes without names, but --classes names "
            f"{len(class_names)}."
        )
    same_classes = not known or (num_classes == len(class_names) and list(known) == class_names)
    if same_classes and resolution == config.sample_size:
        return transformer
    adapted = type(transformer).from_config(
        config,
        num_classes=len(class_names),
        sample_size=resolution,
        interpolation_scale=config.interpolation_scale * resolution / config.sample_size,
    )
    weights = transformer.state_dict()
    if not same_classes:
        rows = adapted.class_embedding.weight.detach().clone()
        rows[-1] = weights["class_embedding.weight"][-1]
        for row, name in enumerate(class_names):
            if name in known:
                rows[row] = weights["class_embedding.weight"][known[name]]
        weights["class_embedding.weight"] = rows
    adapted.load_state_dict(weights)
    return adapted


def automatic_precision() -> str:
    """Returns what Accelerate is configured for, else `"bf16"` where that is clearly faster, or `"no"`.

    CPUs have to be asked: with AMX bfloat16 is several times faster, with AVX512-BF16 alone it may be half as
    fast.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by `accelerate launch`
    if configured != "no":
        return configured
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        return "no"  # each process could find another answer
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    matrix = torch.randn(1024, 1024)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        operand = matrix.to(dtype)
        operand @ operand  # the first call prepares
        times = []
        for _ in range(5):
            began = time.perf_counter()
            operand @ operand
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return "bf16" if 1.2 * seconds[torch.bfloat16] < seconds[torch.float32] else "no"


def how_to_resume(output_dir: Path) -> str:
    """Returns a sentence for who reads that a training ended early."""
    if not list_checkpoints(output_dir):
        return "There is no checkpoint yet."
    return "To go on, give the same command with --resume_from_checkpoint latest."


@dataclass
class TrainingState:
    """How far a training is; registered with Accelerate, so that checkpoints keep it."""

    step: int = 0  # optimizer steps
    epoch: int = 0
    micro_step: int = 0  # batches taken from the current epoch
    images: int = 0  # images seen by all processes
    seconds: float = 0.0
    best_loss: float = math.inf
    precision: str = ""  # of the steps so far: --mixed_precision auto may decide otherwise another time

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def main(args: argparse.Namespace, state: TrainingState) -> None:
    """Trains, from the first step or a checkpoint, and saves; `state` says at any time how far it is."""
    # 1. Accelerate, randomness, output folder
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=automatic_precision() if args.mixed_precision == "auto" else args.mixed_precision,
        # Micro-steps are counted over the ends of epochs, so that every optimizer step has the same number of
        # images.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=args.seed, non_blocking=True
        ),
        # The other processes wait while the main process validates, draws samples and pushes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=args.report_to,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / args.logging_dir)),
    )
    if args.report_to is not None and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to} needs that package, which is not installed.")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but found no GPUs to share the training; on CPUs they need "
            "ACCELERATE_USE_CPU=true in the environment."
        )
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    samples_dir, metrics_path = output_dir / "samples", output_dir / "metrics.jsonl"

    checkpoint, later = None, []
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
        step = checkpoint_step(checkpoint)
        later = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) > step]
        if later and args.resume_from_checkpoint != "latest":
            raise ValueError(
                f"{args.output_dir!r} holds later checkpoints than the one to resume from: "
                f"{', '.join(path.name for path in later)}. Move them away, or choose another --output_dir."
            )
        num_processes = len(list(checkpoint.glob("random_states_*")))
        if num_processes != accelerator.num_processes:
            warnings.warn(
                f"{str(checkpoint)!r} is of {num_processes} processes: with {accelerator.num_processes} the "
                "training goes on, but not with the numbers of an uninterrupted one.",
                stacklevel=1,
            )
    elif list_checkpoints(output_dir):
        raise ValueError(
            f"{args.output_dir!r} holds the checkpoints of another run: continue it with "
            "--resume_from_checkpoint latest, or choose another --output_dir."
        )

    # 2. Data: decoded once, the validation part held out
    if args.pretrained_model_name_or_path is None:
        pretrained, resolution = None, 32
    else:
        pretrained = PetDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
        resolution = pretrained.transformer.config.sample_size
    if args.resolution is not None:
        resolution = args.resolution
    classes = None if args.classes == ["all"] else args.classes
    dataset = load_image_dataset(
        args.dataset_name,
        classes,
        resolution,
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column,
        cache_dir=args.cache_dir,
        max_samples=args.max_train_samples,
    )
    # The split does not depend on the seed: what one run has not seen, no run has.
    train_set, held_out_set = split_dataset(
        dataset, args.validation_fraction, None if checkpoint is None else read_split(checkpoint)
    )
    validation_set = held_out_set.subset(torch.arange(min(args.validation_images, len(held_out_set))))
    train_loader = torch.utils.data.DataLoader(
        train_set,
        batch_size=args.train_batch_size,
        shuffle=True,
        collate_fn=ImageDataset.collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=len(train_set) >= args.train_batch_size * accelerator.num_processes,
        generator=torch.Generator().manual_seed(args.seed),
    )

    # 3. Model, scheduler, loss, optimizer, EMA
    num_classes = len(dataset.class_names)
    check_labels(dict(enumerate(dataset.class_names)), num_classes)  # before any step is made
    scheduler_config = {
        "adaptive": args.noise_schedule == "adaptive",
        "p_mean": args.p_mean,
        "p_std": args.p_std,
    }
    if pretrained is not None:
        transformer = adapt_model(pretrained, dataset.class_names, resolution).train()
        scheduler = AdaptiveEDMScheduler.from_config(pretrained.scheduler.config, **scheduler_config)
    else:
        scheduler = AdaptiveEDMScheduler(prediction_type=args.prediction_type, **scheduler_config)
        model_config = {
            "sample_size": resolution,
            "num_classes": num_classes,
            "sigma_data": scheduler.config.sigma_data,
            "prediction_type": args.prediction_type,
            **args.model_config,
        }
        if args.frequency_preconditioning and "frequency_variances" not in model_config:
            patch_size = model_config.get("patch_size", MODEL_PRESETS[args.preset]["patch_size"])
            model_config["frequency_variances"] = frequency_variances(train_set.images, patch_size)
        transformer = PetTransformer2DModel.from_preset(args.preset, **model_config)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    loss_function = BalancedAdaptiveLoss(
        args.loss, sigma_data=scheduler.config.sigma_data, learned_weighting=args.learned_weighting
    )
    optimizer = create_optimizer(
        transformer,
        loss_function,
        args.optimizer,
        args.muon_learning_rate,
        args.learning_rate,
        args.weight_decay,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]
    # The averaged weights live in a model of their own, which validation, pictures and saving use.
    ema_transformer = PetTransformer2DModel.from_config(transformer.config).to(accelerator.device).eval()
    ema = EMAModel(
        transformer.parameters(),
        decay=args.ema_max_decay if args.use_ema else 0.0,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
    if args.torch_compile:
        transformer.compile()

    # Nothing is written before everything that was asked for has been found.
    repo_id = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = create_repository(repo_id, args.hub_private_repo, args.hub_token).id
    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in later:  # than the newest that is intact
            set_aside(path)
    # One module with one forward: FSDP takes only one, and DDP none without parameters.
    model = DenoiserWithLoss(transformer, loss_function)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    accelerator.register_for_checkpointing(ema, scheduler, state)

    # 4. Length of the training, and where it starts
    limits = [args.max_train_steps] if args.max_train_steps is not None else []
    if args.num_train_epochs is not None:
        limits.append(math.ceil(args.num_train_epochs * len(train_loader) / args.gradient_accumulation_steps))
    max_steps = min(limits, default=None)
    set_seed(args.seed, device_specific=True)  # a process that the checkpoint does not know keeps this
    if checkpoint is not None:
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        ema_options = {name: getattr(ema, name) for name in ("decay", "inv_gamma", "power")}
        try:
            accelerator.load_state(str(checkpoint))
        except (RuntimeError, ValueError, KeyError) as error:  # of shapes, parameter groups and names
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} is of another configuration: {error}"
            ) from error
        # Where the command says something else now, it counts, as for everything that no checkpoint keeps.
        for group, values in zip(optimizer.param_groups, options):
            group.update(values)
        vars(ema).update(ema_options)
        if state.precision and state.precision != accelerator.mixed_precision:
            warnings.warn(
                f"{str(checkpoint)!r} was trained with --mixed_precision {state.precision}: with "
                f"{accelerator.mixed_precision} the training goes on, but not with the numbers of an "
                "uninterrupted one.",
                stacklevel=1,
            )
        accelerator.print(f"Resumed at step {state.step:,} after {state.images:,} images.")
    state.precision = accelerator.mixed_precision
    ema.to(accelerator.device)  # loading leaves it on the CPU
    if accelerator.is_main_process:
        samples_dir.mkdir(exist_ok=True)
        trim_log(metrics_path, state.step)
    if args.report_to is not None:
        plain = {
            key: value
            for key, value in vars(args).items()
            if isinstance(value, (int, float, str, bool)) and key != "hub_token"
        }
        accelerator.init_trackers(args.tracker_project_name, config=plain)

    split = describe_split(train_set, held_out_set)
    start_time = time.monotonic() - state.seconds
    validation_losses: dict[int, float] = {}  # by step

    def progress() -> float:
        """Share of the training that is done, by steps or by the clock, whichever is further."""
        state.seconds = time.monotonic() - start_time
        done = 0.0 if max_steps is None else state.step / max_steps
        if args.max_train_minutes is not None:
            seconds = broadcast(torch.tensor([state.seconds], device=accelerator.device)).item()
            done = max(done, seconds / 60 / args.max_train_minutes)
        return min(done, 1.0)

    def log(values: dict[str, float]) -> None:
        """Writes numbers to `metrics.jsonl` and to the tracker."""
        if accelerator.is_main_process:
            record = {
                "step": state.step,
                "images": state.images,
                "seconds": round(state.seconds, 1),
                **values,
            }
            with metrics_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        accelerator.log(values, step=state.step)

    def log_picture(name: str, image: Image.Image, file_name: str) -> None:
        """Writes a picture to the samples folder and to the tracker."""
        image.save(samples_dir / file_name)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=state.step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: [image]}, step=state.step)

    def ema_pipeline() -> PetDiffusionPipeline:
        """The pipeline as it would be saved now."""
        ema.copy_to(ema_transformer.parameters())
        id2label = dict(enumerate(dataset.class_names))
        pipeline = PetDiffusionPipeline(
            ema_transformer,
            AdaptiveEDMScheduler.from_config(scheduler.config),
            id2label=id2label,
            pag_scale=0.0 if pretrained is None else pretrained.config.pag_scale,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def validate() -> None:
        """Measures the EMA weights on the held-out images and keeps the best; on the main process."""
        if not accelerator.is_main_process:
            return
        pipeline = ema_pipeline()
        with accelerator.autocast():
            errors = validation_loss(pipeline.transformer, scheduler, validation_set, args.train_batch_size)
        loss = validation_losses[state.step] = sum(errors.values()) / len(errors)
        log(
            {
                "validation/loss": loss,
                **{f"validation/sigma_{sigma:.3g}": error for sigma, error in errors.items()},
            }
        )
        accelerator.print(f"step {state.step:,}, {state.images:,} images, validation loss {loss:.4f}")
        if loss < state.best_loss or not (output_dir / "best").exists():
            state.best_loss = loss
            save_pipeline(pipeline, output_dir / "best")

    def preview() -> None:
        """Samples from the EMA weights; on the main process."""
        if not accelerator.is_main_process:
            return
        pipeline = ema_pipeline()
        with accelerator.autocast():
            grid = sample_grid(pipeline, args.preview_images, args.seed)
            strip = denoising_strip(pipeline, args.seed)
        log_picture("samples", grid, f"samples-{state.step:06}.png")
        log_picture("denoising", strip, f"denoising-{state.step:06}.png")

    def measure() -> None:
        """Validates and samples where that is due after a step; a resumed run does it again."""
        if state.step % args.validation_steps == 0:
            validate()
        if state.step % args.preview_steps == 0:
            preview()

    def save_results() -> None:
        """Saves the EMA pipeline with its samples and its card; on the main process."""
        pipeline = ema_pipeline()
        save_pipeline(pipeline, output_dir)
        for name in EVALUATION_FILES:  # of earlier weights
            (output_dir / name).unlink(missing_ok=True)
        sample_grid(pipeline, num_images=8, seed=0).save(output_dir / "samples.png")
        kind = accelerator.device.type
        device = (
            torch.cuda.get_device_name() if kind == "cuda" else f"{kind} ({torch.get_num_threads()} threads)"
        )
        report = TrainingReport(
            dataset_name=args.dataset_name,
            options=vars(args),
            num_train_images=len(train_set),
            num_held_out_images=len(dataset) - len(train_set),
            num_validation_images=len(validation_set),
            num_steps=state.step,
            num_images_seen=state.images,
            seconds=state.seconds,
            device=f"{accelerator.num_processes} × {device}",
            precision=accelerator.mixed_precision,
            base_model=args.pretrained_model_name_or_path,
            validation_loss=validation_losses.get(state.step),
        )
        card = render_model_card(output_dir, MODEL_CARD, pipeline, report)
        (output_dir / "README.md").write_text(card, encoding="utf-8")

    def log_skipped_step(sigmas: torch.Tensor, sample_losses: torch.Tensor) -> None:
        """Tells of a step without finite gradients, and at which noise levels its losses were not finite."""
        is_bad = ~sample_losses.isfinite()
        what = f"{int(is_bad.sum())} of {len(sigmas)} losses are" if is_bad.any() else "a gradient is"
        sigmas = sigmas[is_bad] if is_bad.any() else sigmas
        low, high = sigmas.min().item(), sigmas.max().item()
        log({"train/skipped_sigma_min": low, "train/skipped_sigma_max": high})
        accelerator.print(
            f"step {state.step + 1:,} is skipped: {what} not finite, at σ from {low:.3g} to {high:.3g}"
        )

    def stop(message: str, exit_code: int) -> None:
        """Ends every process, with a message on how to go on."""
        accelerator.print(f"train_pet.py: {message} {how_to_resume(output_dir)}", file=sys.stderr)
        accelerator.end_training()
        sys.exit(exit_code)

    def push(message: str) -> str:
        """Publishes the saved pipeline; returns the address."""
        return push_folder(output_dir, repo_id, args.hub_private_repo, args.hub_token, message)

    # 5. Training loop
    progress_bar = tqdm(
        total=max_steps,
        initial=state.step,
        desc="steps",
        disable=not accelerator.is_local_main_process,
        mininterval=1,
    )
    log_time, log_images = time.monotonic(), state.images
    sums: dict[str, torch.Tensor] = {}
    num_summed = num_skipped = 0
    observed: list[tuple[torch.Tensor, torch.Tensor]] = []  # σ and losses of the micro-steps of a step
    done = progress()
    if checkpoint is not None and state.step > 0 and done < 1:
        measure()
    with Interruption() as interruption:
        while done < 1:
            train_loader.set_epoch(state.epoch)
            loader = (
                accelerator.skip_first_batches(train_loader, state.micro_step)
                if state.micro_step
                else train_loader
            )
            for images, labels in loader:
                images = to_model_range(images)
                if args.random_flip:
                    images = random_horizontal_flip(images)
                dropped = torch.rand(len(labels), device=labels.device) < args.label_dropout
                labels = torch.where(dropped, num_classes, labels)
                sigmas, weights = scheduler.sample_training_sigmas(
                    len(images), device=images.device
                ).to_tuple()
                timesteps = scheduler.precondition_noise(sigmas)
                noisy_images = scheduler.add_noise(images, torch.randn_like(images), timesteps)

                with accelerator.accumulate(model):
                    losses = model(
                        scheduler.precondition_inputs(noisy_images, sigmas),
                        timesteps,
                        labels,
                        scheduler.training_target(images, noisy_images, sigmas),
                        sigmas,
                        weights,
                    )
                    accelerator.backward(losses.loss)
                    if accelerator.sync_gradients:
                        factor = learning_rate_factor(
                            args.lr_scheduler, done, state.step, args.lr_warmup_steps
                        )
                        for group, rate in zip(optimizer.param_groups, base_rates):
                            group["lr"] = rate * factor
                        gradient_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                        # The norm is that of all processes together, so that they agree.
                        is_finite = math.isfinite(gradient_norm.item())
                        if not is_finite:
                            optimizer.zero_grad()  # a step without gradients changes nothing
                    optimizer.step()
                    optimizer.zero_grad()

                observed.append(accelerator.gather((sigmas, losses.sample_losses)))
                scheduler.update_training_losses(*observed[-1])
                terms = {f"train/term_{name}": term for name, term in losses.terms.items()}
                for name, value in {"train/loss": losses.loss.detach(), **terms}.items():
                    sums[name] = sums.get(name, 0) + value
                num_summed += 1
                state.micro_step += 1
                state.images += len(labels) * accelerator.num_processes
                if not accelerator.sync_gradients:
                    continue
                step_sigmas, step_losses = (torch.cat(parts) for parts in zip(*observed))
                observed = []
                if is_finite:
                    num_skipped = 0
                    ema.step(transformer.parameters())
                    state.step += 1
                    done = progress()
                    progress_bar.update()
                else:
                    num_skipped += 1
                    num_summed, sums = 0, {}  # the log's means are of finite losses
                    log_skipped_step(step_sigmas, step_losses)
                    if num_skipped == MAX_SKIPPED_STEPS:
                        stop(
                            f"{num_skipped} steps in a row had no finite gradient. Lower --learning_rate and "
                            "--muon_learning_rate, try --mixed_precision no, or look at the images.",
                            exit_code=1,
                        )
                if is_finite and (state.step % args.logging_steps == 0 or done >= 1):
                    values = {
                        name: accelerator.reduce(x / num_summed, "mean").item() for name, x in sums.items()
                    }
                    rate = (state.images - log_images) / (time.monotonic() - log_time)
                    factor = learning_rate_factor(args.lr_scheduler, done, state.step, args.lr_warmup_steps)
                    values["train/learning_rate"] = args.learning_rate * factor
                    values["train/images_per_second"] = rate
                    log(values)
                    progress_bar.set_postfix(
                        loss=f"{values['train/loss']:.3f}", images_per_second=f"{rate:.0f}"
                    )
                    log_time, log_images, num_summed, sums = time.monotonic(), state.images, 0, {}
                if interruption.signal is not None:
                    accelerator.set_trigger()
                is_interrupted = accelerator.check_trigger()  # on any process
                is_due = is_finite and (state.step % args.checkpointing_steps == 0 or done >= 1)
                # After a skipped step, the checkpoint of the step before is as good: the skipped batches,
                # drawn again, are skipped again.
                is_saved = checkpoint == checkpoint_path(output_dir, state.step)
                if is_due or (is_interrupted and not is_saved):
                    checkpoint = save_checkpoint(
                        accelerator, output_dir, state.step, split, args.checkpoints_total_limit
                    )
                if is_interrupted:
                    stop(
                        f"interrupted; step {state.step:,} is saved in {checkpoint}.", interruption.exit_code
                    )
                if not is_finite:
                    continue
                if done >= 1:
                    break
                measure()
                if (
                    args.hub_strategy == "checkpoint"
                    and state.step % args.checkpointing_steps == 0
                    and accelerator.is_main_process
                ):
                    save_results()
                    try:
                        push(f"Step {state.step:,}")
                    except (ValueError, OSError) as error:  # the next push brings what this one did not
                        warnings.warn(f"Step {state.step:,} was not pushed to the Hub. {error}", stacklevel=1)
            else:
                state.epoch += 1
                state.micro_step = 0
    progress_bar.close()

    # 6. Last measurements, pictures, the pipeline, and the Hub
    validate()
    preview()
    if accelerator.is_main_process:
        pipeline = ema_pipeline()
        with accelerator.autocast():
            comparison = step_comparison(pipeline, seed=args.seed)
        log_picture("step_comparison", comparison, "step-comparison.png")
        log_picture("curves", loss_curves(metrics_path), "curves.png")
        save_results()
        accelerator.print(f"Saved the pipeline in {output_dir}; its pictures are in {samples_dir}.")
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        try:
            print(f"Pushed it to the Hub: {push(f'End of the training, step {state.step:,}')}")
        except (ValueError, OSError) as error:
            sys.exit(
                f"train_pet.py: {error} The pipeline is saved in {output_dir}; push it later with "
                f"`pet-pipeline push {output_dir} {repo_id}`."
            )


if __name__ == "__main__":
    arguments, training_state = parse_args(), TrainingState()
    try:
        main(arguments, training_state)
    except KeyboardInterrupt:  # before or after the training loop
        print(f"train_pet.py: interrupted. {how_to_resume(Path(arguments.output_dir))}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        hint = f" {how_to_resume(Path(arguments.output_dir))}" if training_state.step > 0 else ""
        sys.exit(f"train_pet.py: {error}{hint}")
    except ValueError as error:
        if training_state.step > 0:  # no mistake of the user, who needs the traceback
            raise
        sys.exit(f"train_pet.py: {error}")
