"""The hardware that a training runs on: precision and processes, through Accelerate."""

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch.distributed.tensor import DTensor


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Sets up Accelerate by the options of `train_pet.py`."""
    accelerator = Accelerator(
        mixed_precision=automatic_precision() if args.mixed_precision == "auto" else args.mixed_precision,
        # Micro-steps are counted across the ends of epochs, so that every optimizer step has the same number
        # of images.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=args.seed, non_blocking=True
        ),
        # The other processes wait while the main process validates, draws samples and pushes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
        log_with=args.report_to,
        project_config=ProjectConfiguration(
            args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)
        ),
    )
    if args.report_to is not None and not accelerator.log_with:
        raise ValueError(f"--report_to {args.report_to} requires that package, which is not installed.")
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    if num_started != accelerator.num_processes:
        raise ValueError(
            f"{num_started} processes were started, but found no GPUs to share the training. On CPUs, set "
            "ACCELERATE_USE_CPU=true in the environment."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed takes the steps of the optimizer by itself, also those whose gradient is not finite. "
            "Choose FSDP of version 2, or neither, with `accelerate config`."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP must be of version 2: launch with --fsdp_version 2.")
    return accelerator


def automatic_precision() -> str:
    """Returns the precision that Accelerate is configured for, or else `"bf16"` if that is clearly faster.

    A CPU must be measured: with AMX, bfloat16 is several times as fast as float32, but with AVX512-BF16 alone
    it may be half as fast.
    """
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by `accelerate launch`
    if configured != "no":
        return configured
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        return "no"  # processes could measure different answers
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    matrix = torch.randn(1024, 1024)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        operand = matrix.to(dtype)
        operand @ operand  # the first call is slower
        times = []
        for _ in range(5):
            began = time.perf_counter()
            operand @ operand
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return "bf16" if 1.2 * seconds[torch.bfloat16] < seconds[torch.float32] else "no"


def whole_parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    """Returns the parameters of a module; every process must call it, since FSDP must gather its shards."""
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]


def device_name(accelerator: Accelerator) -> str:
    """Returns a description of the devices of a training, for its model card."""
    kind = accelerator.device.type
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{kind} ({torch.get_num_threads()} threads)"
    return f"{accelerator.num_processes} × {name}"
