# /// script
# requires-python = ">=3.11"
# dependencies = ["pet-pipeline[train]==0.2.*"]
# ///
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
import copy
import math
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from pet_pipeline import (
    AdaptiveEDMScheduler,
    BalancedAdaptiveLoss,
    PetDiffusionPipeline,
    PetTransformer2DModel,
)
from pet_pipeline.publishing.client import create_repository
from pet_pipeline.publishing.push import push_folder
from pet_pipeline.training.augmentation import random_affine
from pet_pipeline.training.checkpointing import (
    Interruption,
    TrainingState,
    check_description,
    checkpoint_path,
    choose_checkpoint,
    claim_folder,
    describe_training,
    how_to_resume,
    load_checkpoint,
    read_description,
    save_checkpoint,
)
from pet_pipeline.training.consistency import ConsistencyTeacher
from pet_pipeline.training.data import (
    UnusableImageError,
    describe_split,
    image_mode,
    random_horizontal_flip,
    to_model_range,
)
from pet_pipeline.training.denoiser import create_denoiser, pipeline_defaults
from pet_pipeline.training.hardware import create_accelerator, whole_parameters
from pet_pipeline.training.loading import create_loader, load_data
from pet_pipeline.training.log import TrainingLog
from pet_pipeline.training.losses import BalancedAdaptiveLossOutput, DenoiserWithLoss
from pet_pipeline.training.optimization import create_optimizer, learning_rate_factor
from pet_pipeline.training.options import parse_args
from pet_pipeline.training.results import TrainingResults, load_features
from pet_pipeline.training.streaming import StreamedImages


# After so many steps in a row without a finite gradient, the training ends. Each of them halves the loss
# scale of fp16, which starts at 65,536, so that fewer may be due to that scale alone.
MAX_SKIPPED_STEPS = 10


@dataclass
class Training:
    """What a training consists of, beside its options and its progress."""

    accelerator: Accelerator
    transformer: PetTransformer2DModel
    teacher: ConsistencyTeacher | None  # for the objective `consistency`
    model: torch.nn.Module  # the prepared `DenoiserWithLoss`, which contains the transformer
    scheduler: AdaptiveEDMScheduler
    optimizer: torch.optim.Optimizer
    base_rates: list[float]  # the learning rate of each group of parameters, without warm-up and decay
    loader: Any  # a `DataLoader` as Accelerate prepares it
    ema: EMAModel
    log: TrainingLog
    results: TrainingResults
    lock: AbstractContextManager  # keeps other trainings out of the output folder
    description: dict[str, Any]  # what a resumed training must have in common with its checkpoint
    checkpoint: Path | None  # the checkpoint that the training continues
    max_steps: int | None
    repo_id: str


def prepare(args: argparse.Namespace, state: TrainingState) -> Training:
    """Builds everything that a training consists of, and loads its checkpoint."""
    # Processes, randomness, and the checkpoint to continue
    output_dir = Path(args.output_dir)
    accelerator = create_accelerator(args)
    extractor = None if args.evaluation_steps is None else load_features(accelerator.device)
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    checkpoint, damaged = choose_checkpoint(args, accelerator.num_processes, accelerator.is_fsdp2)
    earlier = {} if checkpoint is None else read_description(checkpoint)

    # The images, in memory where they fit
    pretrained, resolution, mode = None, args.resolution or 32, args.image_mode or "RGB"
    if args.pretrained_model_name_or_path is not None:
        pretrained = PetDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
        resolution = args.resolution or pretrained.transformer.config.sample_size
        mode = args.image_mode or image_mode(pretrained.transformer.config.in_channels)
    train_set, held_out_set = load_data(args, resolution, mode, earlier.get("split"))
    if len(train_set.class_names) == 1:
        args.label_dropout = 0.0  # guidance, which needs a null class, would have nothing to tell apart
    loader = create_loader(args, accelerator, train_set)
    num_workers = loader.num_workers

    # Model, loss, optimizer, and the pipeline of the averaged weights
    transformer, scheduler = create_denoiser(args, pretrained, train_set, earlier.get("model"))
    teacher = None
    if args.objective == "consistency" and pretrained is not None:
        teacher = ConsistencyTeacher(pretrained.to(accelerator.device))
    split = describe_split(held_out_set, None if isinstance(train_set, StreamedImages) else train_set)
    digest = None if teacher is None else teacher.digest
    description = describe_training(args, transformer, split, digest)
    check_description(earlier, description)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    loss_function = BalancedAdaptiveLoss(
        args.loss, sigma_data=scheduler.config.sigma_data, learned_weighting=args.learned_weighting
    )
    optimizer = create_optimizer(args, transformer, loss_function)
    ema = EMAModel(
        transformer.parameters(),
        decay=args.ema_max_decay if args.use_ema else 0.0,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
    pipeline = PetDiffusionPipeline(
        copy.deepcopy(transformer).to(accelerator.device).eval(),
        AdaptiveEDMScheduler.from_config(scheduler.config),
        id2label=dict(enumerate(train_set.class_names)),
        **pipeline_defaults(args, pretrained, len(train_set.class_names)),
    )
    if args.torch_compile:
        transformer.compile()

    # The Hub and the output folder: nothing is written before everything above has succeeded.
    repo_id = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:
        repo_id = create_repository(repo_id, args.hub_private_repo, args.hub_token).id
    lock = claim_folder(output_dir, damaged) if accelerator.is_main_process else nullcontext()
    accelerator.wait_for_everyone()

    # Accelerate, the length of the training, and the checkpoint
    model = DenoiserWithLoss(transformer, loss_function)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if args.streaming:
        # Accelerate drops the generator. A resumed pass would then draw once more from that of the training.
        loader.base_dataloader.generator = torch.Generator().manual_seed(args.seed)
    accelerator.register_for_checkpointing(ema, scheduler, state)
    limits = [args.max_train_steps] if args.max_train_steps is not None else []
    if args.num_train_epochs is not None:
        limits.append(math.ceil(args.num_train_epochs * len(loader) / args.gradient_accumulation_steps))
    set_seed(args.seed, device_specific=True)  # a checkpoint may have fewer processes
    if checkpoint is not None:
        reads_stream = args.streaming and accelerator.is_main_process
        load_checkpoint(accelerator, checkpoint, optimizer, ema, state, num_workers if reads_stream else None)
    state.num_workers = num_workers if args.streaming else 0
    state.precision = accelerator.mixed_precision
    ema.to(accelerator.device)  # loading leaves it on the CPU
    log = TrainingLog(accelerator, args, state)
    return Training(
        accelerator=accelerator,
        transformer=transformer,
        teacher=teacher,
        model=model,
        scheduler=scheduler,
        optimizer=optimizer,
        base_rates=[group["lr"] for group in optimizer.param_groups],
        loader=loader,
        ema=ema,
        log=log,
        results=TrainingResults(
            args, accelerator, state, log, ema, pipeline, train_set, held_out_set, teacher, extractor
        ),
        lock=lock,
        description=description,
        checkpoint=checkpoint,
        max_steps=min(limits, default=None),
        repo_id=repo_id,
    )


def fraction_done(args: argparse.Namespace, training: Training, state: TrainingState) -> float:
    """Returns the fraction of the training that is done, by steps or by the clock of the main process."""
    done = 0.0 if training.max_steps is None else state.step / training.max_steps
    if args.max_train_minutes is not None:
        seconds = torch.tensor([state.seconds], device=training.accelerator.device)
        done = max(done, broadcast(seconds).item() / 60 / args.max_train_minutes)
    return min(done, 1.0)


def compute_losses(
    args: argparse.Namespace, training: Training, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, BalancedAdaptiveLossOutput]:
    """Makes a batch of noisy images, and returns their noise levels and the losses of the denoiser."""
    scheduler = training.scheduler
    images = to_model_range(images)
    if args.random_flip:
        images = random_horizontal_flip(images)
    augment_labels, augment_dim = None, training.transformer.config.get("augment_dim")
    if training.teacher is not None:
        with training.accelerator.autocast():
            noisy_images, labels, sigmas, images = training.teacher.trajectories(images, labels)
        if augment_dim:  # the teacher draws images without any change
            augment_labels = noisy_images.new_zeros(len(labels), augment_dim)
        timesteps, weights = scheduler.precondition_noise(sigmas), torch.ones_like(sigmas)
    else:
        if augment_dim:
            images, augment_labels = random_affine(images, args.augmentation_probability)
        is_dropped = torch.rand(len(labels), device=labels.device) < args.label_dropout
        labels = torch.where(is_dropped, training.transformer.config.num_classes, labels)
        sigmas, weights = scheduler.sample_training_sigmas(len(images), device=images.device).to_tuple()
        timesteps = scheduler.precondition_noise(sigmas)
        noisy_images = scheduler.add_noise(images, torch.randn_like(images), timesteps)
    model_input = scheduler.precondition_inputs(noisy_images, sigmas)
    target = scheduler.training_target(images, noisy_images, sigmas)
    return sigmas, training.model(model_input, timesteps, labels, target, sigmas, weights, augment_labels)


def train(args: argparse.Namespace, training: Training, state: TrainingState) -> None:
    """Takes optimizer steps until the training is done or interrupted."""
    accelerator, optimizer, log = training.accelerator, training.optimizer, training.log
    start_time = time.monotonic() - state.seconds
    observed: list[tuple[torch.Tensor, torch.Tensor]] = []  # σ and losses of the micro-steps of a step
    checkpoint, num_skipped, done = training.checkpoint, 0, fraction_done(args, training, state)

    def rate_factor() -> float:
        return learning_rate_factor(args.lr_scheduler, done, state.step, args.lr_warmup_steps)

    if checkpoint is not None and state.step > 0 and done < 1:
        training.results.measure()
    is_hidden = not accelerator.is_local_main_process
    progress_bar = tqdm(
        total=training.max_steps, initial=state.step, desc="steps", disable=is_hidden, mininterval=1
    )
    with progress_bar, Interruption() as interruption:
        while done < 1:
            training.loader.set_epoch(state.epoch)
            batches = training.loader
            if state.micro_step:
                batches = accelerator.skip_first_batches(batches, state.micro_step)
            for images, labels in batches:
                with accelerator.accumulate(training.model):
                    sigmas, losses = compute_losses(args, training, images, labels)
                    accelerator.backward(losses.loss)
                    if accelerator.sync_gradients:
                        for group, rate in zip(optimizer.param_groups, training.base_rates):
                            group["lr"] = rate * rate_factor()
                        # The norm is that of all processes together, so that they agree on `is_finite`.
                        norm = accelerator.clip_grad_norm_(training.model.parameters(), args.max_grad_norm)
                        is_finite = math.isfinite(norm.item())
                        if not is_finite:
                            optimizer.zero_grad()  # a step without gradients changes nothing
                    optimizer.step()
                    optimizer.zero_grad()

                observed.append(accelerator.gather((sigmas, losses.sample_losses)))
                training.scheduler.update_training_losses(*observed[-1])
                log.add(losses)
                state.micro_step += 1
                state.images += len(labels) * accelerator.num_processes
                if not accelerator.sync_gradients:
                    continue

                if is_finite:
                    num_skipped = 0
                    training.ema.step(whole_parameters(training.transformer))
                    state.step += 1
                    state.seconds = time.monotonic() - start_time
                    done = fraction_done(args, training, state)
                    progress_bar.update()
                    if state.step % args.logging_steps == 0 or done >= 1:
                        means = log.write_means(args.learning_rate * rate_factor())
                        loss, speed = means["train/loss"], means["train/images_per_second"]
                        progress_bar.set_postfix(loss=f"{loss:.3f}", images_per_second=f"{speed:.0f}")
                else:
                    num_skipped += 1
                    log.write_skipped_step(*(torch.cat(parts) for parts in zip(*observed)))
                    if num_skipped == MAX_SKIPPED_STEPS:
                        message = (
                            f"{num_skipped} steps in a row had no finite gradient. Lower --learning_rate and "
                            "--muon_learning_rate, try --mixed_precision no, or look at the images."
                        )
                        stop(accelerator, args, message, exit_code=1)
                observed = []

                if interruption.signal is not None:
                    accelerator.set_trigger()
                is_interrupted = accelerator.check_trigger()  # on any process
                is_due = is_finite and (state.step % args.checkpointing_steps == 0 or done >= 1)
                # Steps that were skipped since the last checkpoint need no new one: a training that resumes
                # from it skips them again.
                is_saved = checkpoint == checkpoint_path(args.output_dir, state.step)
                state.has_ended = done >= 1
                if is_due or (is_interrupted and not is_saved):
                    checkpoint = save_checkpoint(
                        accelerator,
                        args.output_dir,
                        state.step,
                        training.description,
                        args.checkpoints_total_limit,
                    )
                if is_interrupted:
                    message = f"interrupted; step {state.step:,} is saved in {checkpoint}."
                    stop(accelerator, args, message, interruption.exit_code)
                if done >= 1:
                    break
                if is_finite:
                    training.results.measure()
                if is_due and args.hub_strategy == "checkpoint":
                    push_checkpoint(args, training, state)
            else:
                state.epoch += 1
                state.micro_step = 0


def stop(accelerator: Accelerator, args: argparse.Namespace, message: str, exit_code: int) -> None:
    """Ends every process, with a message that tells how to continue."""
    accelerator.print(f"train_pet.py: {message} {how_to_resume(args.output_dir)}", file=sys.stderr)
    accelerator.end_training()
    sys.exit(exit_code)


def push_checkpoint(args: argparse.Namespace, training: Training, state: TrainingState) -> None:
    """Saves and publishes the pipeline; if the push fails, it warns, and the next push includes this one."""
    training.results.save()
    if training.accelerator.is_main_process:
        try:
            push(args, training, f"Step {state.step:,}")
        except (ValueError, OSError) as error:
            warnings.warn(f"Step {state.step:,} was not pushed to the Hub. {error}", stacklevel=1)


def push(args: argparse.Namespace, training: Training, message: str) -> str:
    """Publishes the saved pipeline, and returns its address."""
    return push_folder(
        Path(args.output_dir), training.repo_id, args.hub_private_repo, args.hub_token, message
    )


def main(args: argparse.Namespace, state: TrainingState) -> None:
    """Trains from the first step or from a checkpoint, saves and publishes; `state` tells the progress."""
    training = prepare(args, state)
    with training.lock:
        train(args, training, state)
        training.results.finish()
    training.accelerator.end_training()
    if args.push_to_hub and training.accelerator.is_main_process:
        try:
            address = push(args, training, f"End of the training, step {state.step:,}")
        except (ValueError, OSError) as error:
            sys.exit(
                f"train_pet.py: {error} The pipeline is saved in {args.output_dir}; push it later with "
                f"`pet-pipeline push {args.output_dir} {training.repo_id}`."
            )
        print(f"Pushed the pipeline to the Hub: {address}")


if __name__ == "__main__":
    arguments, training_state = parse_args(), TrainingState()
    try:
        main(arguments, training_state)
    except KeyboardInterrupt:  # before or after the training loop
        print(f"train_pet.py: interrupted. {how_to_resume(arguments.output_dir)}", file=sys.stderr)
        sys.exit(130)
    except (OSError, UnusableImageError) as error:
        hint = f" {how_to_resume(arguments.output_dir)}" if training_state.step > 0 else ""
        sys.exit(f"train_pet.py: {str(error).rstrip('.')}.{hint}")
    except ValueError as error:
        if training_state.step > 0:  # a fault of the program, whose traceback is needed
            raise
        sys.exit(f"train_pet.py: {error}")
