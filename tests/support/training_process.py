"""Trainings in processes of their own, which tests kill, disturb and compare."""

import errno
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import train_pet
from pet_pipeline import AdaptiveEDMScheduler, BalancedAdaptiveLoss
from pet_pipeline.scheduling_adaptive_edm import TrainingSigmas


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_pet.py"

# A model that trains in milliseconds.
TINY = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}

# Every process is forked from one that has imported everything, which takes longer than the training.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train_pet"])


def arguments(image_folder: Path, output_dir: Path, **options: Any) -> list[str]:
    """Returns the command line of a training of toy size; `None` leaves an option out, `True` is a flag."""
    options = {
        "dataset_name": image_folder,
        "cache_dir": output_dir.parent / "cache",
        "output_dir": output_dir,
        "resolution": 8,
        "model_config": json.dumps(TINY),
        "train_batch_size": 8,
        "max_train_steps": 6,
        "logging_steps": 1,
        "preview_images": 0,
        "validation_steps": 3,
        "checkpointing_steps": 3,
        "mixed_precision": "no",
        **options,
    }
    words = []
    for name, value in options.items():
        if value is None:
            continue
        words += (
            [f"--{name}"]
            if value is True
            else [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
        )
    return words


def train(image_folder: Path, output_dir: Path, **options: Any) -> None:
    """Runs a training in this process; the arguments are those of [`arguments`]."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = arguments(image_folder, output_dir, **options)
    train_pet.main(train_pet.parse_args(words), train_pet.TrainingState())


@dataclass
class Ended:
    """How a process ended: its exit code (negative for a signal) and what it wrote."""

    exit_code: int
    output: str


def run_script(
    words: list[str],
    output: Connection,
    fault: tuple[str, str] | None,
    environment: dict[str, str] | None,
    predictable: bool,
) -> None:
    """Runs the training script; see [`Training`]."""
    os.environ.update(environment or {})
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    torch.set_num_threads(1)
    sys.argv = [str(SCRIPT), *words]
    if fault is not None:
        break_writes(*fault)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpus()
    if predictable:
        make_predictable()
    runpy.run_path(str(SCRIPT), run_name="__main__")


def shard_on_cpus() -> None:
    """Lets Accelerate shard trainings by FSDP2 in this process, which it only does on GPUs by itself.

    The process group of CPUs (gloo) takes the place of that of GPUs. Everything else is what Accelerate does
    after `accelerate launch --use_fsdp --fsdp_version 2`.
    """
    initialize = AcceleratorState.__init__

    def initialize_sharded(
        self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any
    ) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:  # all instances share their state
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState().distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = initialize_sharded


def break_writes(name: str, kind: str) -> None:
    """Lets the writing of a file fail in this process from now on.

    Args:
        name (`str`): the end of the file's path, or for `"read-only"` a folder.
        kind (`str`): `"full"`, the disk has no room for the first byte; `"torn"`, the kernel refuses all but
            the first 10 bytes; or `"read-only"`.
    """
    import accelerate.utils.other
    import safetensors.torch

    def check(path: Any) -> None:
        path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if not (path.startswith(name) if kind == "read-only" else path.endswith(name)):
            return
        if kind != "torn":
            number = errno.ENOSPC if kind == "full" else errno.EROFS
            raise OSError(number, os.strerror(number), path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    def checked(function: Any) -> Any:
        def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            check(path)
            return function(content, path, *args, **kwargs)

        return save

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.save = checked(torch.save)
    safetensors.torch.save_file = checked(safetensors.torch.save_file)
    accelerate.utils.other.safe_save_file = checked(accelerate.utils.other.safe_save_file)
    writing = os.O_WRONLY | os.O_RDWR
    # PyTorch and safetensors open their files by themselves; Python tells of the others.
    sys.addaudithook(
        lambda event, arguments: (
            check(arguments[0]) if event == "open" and (arguments[2] or 0) & writing else None
        )
    )


class Training:
    """A running training.

    Args:
        words (`list[str]`): its command line.
        fault (`tuple[str, str]`, *optional*): arguments of [`break_writes`].
        environment (`dict[str, str]`, *optional*): further variables of its environment.
        predictable (`bool`, defaults to `False`): see [`make_predictable`].
    """

    def __init__(
        self,
        words: list[str],
        fault: tuple[str, str] | None = None,
        environment: dict[str, str] | None = None,
        predictable: bool = False,
    ) -> None:
        self._output, output = PROCESSES.Pipe(duplex=False)
        self._process = PROCESSES.Process(
            target=run_script, args=(words, output, fault, environment, predictable)
        )
        self._process.start()
        output.close()

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Returns when a file is there, or the process has ended."""
        deadline = time.monotonic() + timeout
        while not path.exists() and self._process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def end(self, timeout: float = 120) -> Ended:
        """Waits for the end."""
        chunks = []
        while chunk := os.read(self._output.fileno(), 1 << 16):
            chunks.append(chunk)
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the training hangs"
        return Ended(self._process.exitcode, b"".join(chunks).decode())


def train_process(words: list[str], fault: tuple[str, str] | None = None) -> Ended:
    """Runs a training to its end."""
    return Training(words, fault).end()


def start_processes(
    words: list[str],
    number: int = 2,
    environment: dict[str, str] | None = None,
    predictable: bool = False,
) -> list[Training]:
    """Starts the processes of one training as a launcher would, without a launcher that watches them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Training(
            words,
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(number),
                "LOCAL_WORLD_SIZE": str(number),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
                **(environment or {}),
            },
            predictable=predictable,
        )
        for rank in range(number)
    ]


def checkpoint_content(folder: Path) -> dict[str, Any]:
    """Returns everything in a checkpoint but the time that the training took."""
    content = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            content[path.name] = load_file(path)
        elif path.name == "training.json":
            content[path.name] = json.loads(path.read_text())
        elif path.name != "manifest.json":
            content[path.name] = torch.load(path, weights_only=False)
            if isinstance(content[path.name], dict):
                content[path.name].pop("seconds", None)
    return content


def assert_equal(first: Any, second: Any, name: str = "") -> None:
    """Asserts that two nested states are equal, bit for bit."""
    assert type(first) is type(second), name
    if isinstance(first, dict):
        assert list(first) == list(second), name
        for key in first:
            assert_equal(first[key], second[key], f"{name}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), name
        for index, (a, b) in enumerate(zip(first, second)):
            assert_equal(a, b, f"{name}/{index}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), name
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype and np.array_equal(first, second), name
    else:
        assert first == second, name


def assert_close(first: Any, second: Any, name: str) -> None:
    """Asserts that nested states are equal up to rounding."""
    if isinstance(first, dict):
        assert list(first) == list(second), name
        for key in first:
            assert_close(first[key], second[key], f"{name}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), name
        for index, (a, b) in enumerate(zip(first, second)):
            assert_close(a, b, f"{name}/{index}")
    elif isinstance(first, (float, torch.Tensor)):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5, msg=lambda text: f"{name}: {text}")
    else:
        assert first == second, name


def is_equal(first: Any, second: Any) -> bool:
    """Returns whether [`assert_equal`] finds no difference."""
    try:
        assert_equal(first, second)
    except AssertionError:
        return False
    return True


def log_of_losses(output_dir: Path) -> list[tuple[int, float]]:
    """Returns step and loss of each step that the run has logged."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]


def spoiled_forward(micro_steps: set[int]) -> Callable:
    """Returns a `forward` of the loss that is NaN for a sample in the given micro-steps, counted from 0."""
    forward = BalancedAdaptiveLoss.forward
    counter = iter(range(10_000))

    def spoiled(self: Any, model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if next(counter) in micro_steps:
            factors = torch.ones(len(model_output), 1, 1, 1)
            factors[-1] = torch.nan
            model_output = model_output * factors
        return forward(self, model_output, *args, **kwargs)

    return spoiled


def make_predictable() -> None:
    """Makes the noise of trainings in this process a function of the image, at one level.

    A run is then a function of the order of the images alone, and so the same for any number of processes.
    The third optimizer step of two micro-steps has a loss that is not finite, on the last process.
    """

    def one_level(self: Any, batch_size: int, generator: Any = None, device: Any = None) -> TrainingSigmas:
        return TrainingSigmas(sigmas=torch.ones(batch_size), weights=torch.ones(batch_size))

    AdaptiveEDMScheduler.sample_training_sigmas = one_level
    torch.randn_like = lambda images: torch.sin(997 * images)
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        BalancedAdaptiveLoss.forward = spoiled_forward({5})


def metrics(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def denoiser_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The denoiser's part of the module that a training prepares and a checkpoint keeps."""
    prefix = "transformer."
    weights = load_file(checkpoint / "model.safetensors")
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def finish_run(image_folder: Path, output_dir: Path) -> Path:
    """Trains to the end, with pictures and a tracker, and returns the output folder."""
    options = {"report_to": "tensorboard", "validation_images": 3, "lr_warmup_steps": 0}
    options |= {"preview_images": 2, "preview_steps": 4}
    options["model_config"] = json.dumps({**TINY, "dropout": 0.5})
    train(image_folder, output_dir, **options)
    return output_dir
