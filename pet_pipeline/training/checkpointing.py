"""Training checkpoints and saved pipelines that are complete at any moment, whatever ends a training.

A checkpoint is a folder in the format of Accelerate with a manifest of hashes. Some of its files are pickles,
so resume from your own checkpoints only. Published models are pipeline folders of safetensors instead.
"""

import argparse
import hashlib
import json
import math
import os
import reprlib
import shutil
import signal
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError


PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
DESCRIPTION = "training.json"
FORMAT = 2  # of checkpoints; raised when earlier ones cannot be continued
LOCK = "training.lock"
# The prefix of files and folders that are still being written.
PARTIAL = "partial-"


@dataclass
class TrainingState:
    """The progress of a training, which Accelerate keeps in checkpoints."""

    step: int = 0  # optimizer steps
    epoch: int = 0
    micro_step: int = 0  # batches taken from the current epoch
    images: int = 0  # images seen by all processes
    seconds: float = 0.0
    best_loss: float = math.inf
    num_workers: int = 0  # processes that read the stream, if there is one
    has_ended: bool = False  # at this step, so that measurements which may not be due follow the checkpoint
    precision: str = ""  # of the steps so far, which `--mixed_precision auto` may choose differently later

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def checkpoint_path(output_dir: str | Path, step: int) -> Path:
    """Returns the folder of the checkpoint after a number of optimizer steps."""
    return Path(output_dir) / f"{PREFIX}{step}"


def checkpoint_step(path: Path) -> int:
    """Returns the number of optimizer steps in a checkpoint's name."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoint folders in `output_dir`, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    description: dict[str, Any],
    total_limit: int | None = None,
) -> Path:
    """Saves the training state and removes the oldest checkpoints; every process must call it.

    The checkpoint is written under another name, flushed to the disk with a manifest of hashes, and renamed.
    So a folder with the name of a checkpoint is complete, whatever ends the process. If the checkpoint cannot
    be written, `OSError` is raised, and earlier checkpoints stay as they were.
    """
    path = checkpoint_path(output_dir, step)
    partial = path.with_name(f"{PARTIAL}{path.name}")
    if accelerator.is_main_process:
        for leftover in path.parent.glob(f"{PARTIAL}{PREFIX}*"):  # of a process that was killed
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (partial / DESCRIPTION).write_text(json.dumps(description))
            write_manifest(partial)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
            synchronize(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors have their own
        shutil.rmtree(partial, ignore_errors=True)  # what it takes of a full disk is needed
        raise OSError(f"The checkpoint {str(path)!r} cannot be written: {error}") from error
    if accelerator.is_main_process and total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def write_manifest(folder: Path) -> None:
    """Flushes the files of a folder to the disk, and writes a manifest of their SHA-256 hashes."""
    hashes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb+") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w") as file:
        json.dump({"sha256": hashes}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    synchronize(folder)


def synchronize(folder: Path) -> None:
    """Flushes the names of the files in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def find_damage(checkpoint: Path) -> str | None:
    """Checks a checkpoint against its manifest, and returns a description of the damage or `None`."""
    try:
        hashes = dict(json.loads((checkpoint / MANIFEST).read_text())["sha256"])
    except FileNotFoundError:
        return f"its {MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, expected in hashes.items():
        try:
            with (checkpoint / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError) as error:
            return f"{name!r} cannot be read: {error}"
        if found != expected:
            return f"{name!r} is not what was written"
    return None


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path:
    """Returns the checkpoint that `--resume_from_checkpoint` means: a name in `output_dir`, or a path.

    `"latest"` means the newest intact checkpoint, with a warning for each damaged one. `ValueError` is raised
    if there is no such checkpoint, or if the one that is named is damaged.
    """
    if resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise ValueError(f"There is no checkpoint in {str(output_dir)!r} to resume from.")
        for path in reversed(checkpoints):
            damage = find_damage(path)
            if damage is None:
                return path
            warnings.warn(f"The checkpoint {str(path)!r} is damaged: {damage}.", stacklevel=2)
        raise ValueError(
            f"Every checkpoint in {str(output_dir)!r} is damaged, so that the run cannot be continued; "
            "start it anew in another folder."
        )
    for path in (Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if path in list_checkpoints(path.parent):
            damage = find_damage(path)
            if damage is not None:
                raise ValueError(f"The checkpoint {str(path)!r} is damaged: {damage}.")
            return path
    raise ValueError(
        f"There is no checkpoint {resume_from_checkpoint!r}, neither in {str(output_dir)!r} nor as a path."
    )


def choose_checkpoint(
    args: argparse.Namespace, num_processes: int, is_sharded: bool
) -> tuple[Path | None, list[Path]]:
    """Returns the checkpoint that a training continues, or `None`, and the damaged later checkpoints.

    `is_sharded` tells whether FSDP shards the training. `ValueError` is raised if the checkpoint cannot be
    continued, or if the output folder holds another training.
    """
    checkpoints = list_checkpoints(args.output_dir)
    if args.resume_from_checkpoint is None:
        if checkpoints:
            raise ValueError(
                f"{args.output_dir!r} holds the checkpoints of another run: continue it with "
                "--resume_from_checkpoint latest, or choose another --output_dir."
            )
        return None, []
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoints and checkpoint.parent.resolve() != Path(args.output_dir).resolve():
        raise ValueError(
            f"{args.output_dir!r} holds the checkpoints of another run than {str(checkpoint)!r}: choose "
            "another --output_dir."
        )
    later = [path for path in checkpoints if checkpoint_step(path) > checkpoint_step(checkpoint)]
    if later and args.resume_from_checkpoint != "latest":
        raise ValueError(
            f"{args.output_dir!r} holds later checkpoints than the one to resume from: "
            f"{', '.join(path.name for path in later)}. Move them away, or choose another --output_dir."
        )
    if any(checkpoint.glob("pytorch_model_fsdp*")) != is_sharded:
        before, now = ("without", "with") if is_sharded else ("with", "without")
        raise ValueError(f"{str(checkpoint)!r} was written {before} FSDP and cannot be continued {now} it.")
    num_before = len(list(checkpoint.glob("random_states_*")))
    if num_before != num_processes:
        warnings.warn(
            f"{str(checkpoint)!r} is of {num_before} processes: with {num_processes} the training continues, "
            "but not with the numbers of an uninterrupted one.",
            stacklevel=2,
        )
    return checkpoint, later


def describe_training(
    args: argparse.Namespace, transformer: ModelMixin, split: dict[str, Any], teacher: str | None = None
) -> dict[str, Any]:
    """Describes in JSON what a resumed training must have in common with its checkpoint.

    This is the split (see [`describe_split`]), the options that decide what a checkpoint holds, the digest
    of a `teacher`, and the configuration of the denoiser without its dropout, which a resumed training may
    change.
    """
    config = json.loads(transformer.to_json_string())
    config.pop("dropout", None)  # not every model has this argument
    return {
        "format": FORMAT,
        "split": split,
        "options": {
            **{
                name: getattr(args, name)
                for name in ("objective", "optimizer", "learned_weighting", "lora_rank")
            },
            "teacher": teacher,
        },
        "model": {name: value for name, value in config.items() if not name.startswith("_")},
    }


def read_description(checkpoint: Path) -> dict[str, Any]:
    """Returns the description of the training that wrote a checkpoint, see [`describe_training`]."""
    path = checkpoint / DESCRIPTION
    description = json.loads(path.read_text()) if path.exists() else {}
    if description.get("format") != FORMAT:
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} is of an earlier version of pet_pipeline and cannot be "
            "continued. A new run can start from the weights of a pipeline folder, such as that run's "
            "`best`, with --pretrained_model_name_or_path."
        )
    return description


def check_description(earlier: dict[str, Any], description: dict[str, Any]) -> None:
    """Raises `ValueError` if a training cannot continue a checkpoint; [`split_dataset`] checks the split.

    `earlier` is the description in the checkpoint, or an empty one for a new training.
    """
    for part in ("options", "model"):
        for name, value in description[part].items():
            before = earlier.get(part, {}).get(name, value)
            if before != value:
                raise ValueError(
                    f"The checkpoint was trained with `{name}` {reprlib.repr(before)}, and so it cannot be "
                    f"continued with {reprlib.repr(value)}."
                )


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    state: TrainingState,
    num_workers: int | None = None,
) -> None:
    """Loads a training from a checkpoint; the options of the command line win over those in it.

    `num_workers` is the number of processes that read the stream, if there is one and this process reads it.
    """
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    ema_options = {name: getattr(ema, name) for name in ("decay", "inv_gamma", "power")}
    accelerator.load_state(str(checkpoint))
    # The next optimizer step begins with the next micro-step, also if their number has changed.
    accelerator.step -= accelerator.step % accelerator.gradient_accumulation_steps
    for group, values in zip(optimizer.param_groups, options):
        group.update(values)
    vars(ema).update(ema_options)
    if state.precision and state.precision != accelerator.mixed_precision:
        warnings.warn(
            f"{str(checkpoint)!r} was trained with --mixed_precision {state.precision}: with "
            f"{accelerator.mixed_precision} the training continues, but not with the numbers of an "
            "uninterrupted one.",
            stacklevel=2,
        )
    if num_workers is not None and state.num_workers != num_workers:
        warnings.warn(
            f"{str(checkpoint)!r} read its stream with {state.num_workers} loading processes: with "
            f"{num_workers} the training continues, but some images of this pass are left out or seen twice. "
            f"Use --dataloader_num_workers {state.num_workers}.",
            stacklevel=2,
        )
    accelerator.print(f"Resumed at step {state.step:,} after {state.images:,} images.")


def how_to_resume(output_dir: str | Path) -> str:
    """Returns a sentence that tells how to continue a training that ended early."""
    if not list_checkpoints(output_dir):
        return "There is no checkpoint yet."
    return "To continue, give the same command with --resume_from_checkpoint latest."


def claim_folder(folder: Path, damaged: Sequence[Path] = ()) -> IO[str]:
    """Makes the output folder of a training, and raises `ValueError` if another training is running in it.

    The lock ends when the returned file is closed or the process ends. Damaged checkpoints are renamed, so
    that they are not found again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("w")
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"Another training is running in {str(folder)!r}. Wait until it ends, or choose another "
            "--output_dir."
        ) from None
    except OSError:  # some network file systems have no locks
        pass
    for checkpoint in damaged:
        target = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(checkpoint, target)
    return file


def trim_log(path: Path, step: int) -> None:
    """Removes the lines of `metrics.jsonl` that a training resumed at a step will write again.

    These are all lines of later steps, and the measurements at the step, which are made after the checkpoint.
    A line that was half-written when the process ended is removed too.
    """
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record["step"] < step or (record["step"] == step and "train/loss" in record):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, path)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline over an earlier one of the same configuration; the folder is complete at any moment.

    If the pipeline cannot be written, `OSError` is raised, and an earlier pipeline stays as it was.
    """
    partial = folder / f"{PARTIAL}pipeline"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
        files = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        for name in files:
            with (partial / name).open("rb+") as file:
                os.fsync(file.fileno())
        # The index makes a folder a pipeline: it is last.
        for name in sorted(files, key=lambda name: name == Path(pipeline.config_name)):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(partial / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"The pipeline {str(folder)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Interruption:
    """Records SIGTERM and Ctrl-C, so that a training can finish its step and save before it ends.

    Further signals are ignored, since launchers pass on signals that the terminal has already sent.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first signal that was received

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The exit code of a process that a signal ended; SIGTERM if another process received the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
