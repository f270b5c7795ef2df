"""Measures how the speed of training grows with the number of processes; prints a Markdown table.

    PYTHONPATH=tests python tests/benchmarks/measure_processes.py --repeats 3

One process, two processes, and two processes that shard the parameters (FSDP2) train in turns, on one core
each. The images are random, so that the time is that of the steps alone. The last column is the time of the
processors for an image, which other programs on the machine hardly change.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.queues import Queue

import torch
from accelerate import Accelerator
from support.training_process import shard_on_cpus

import train_pet
from pet_pipeline import AdaptiveEDMScheduler, BalancedAdaptiveLoss, PetTransformer2DModel
from pet_pipeline.evaluation.metrics import validation_loss
from pet_pipeline.training.data import ImageDataset
from pet_pipeline.training.hardware import whole_parameters
from pet_pipeline.training.losses import DenoiserWithLoss
from pet_pipeline.training.optimization import create_optimizer


PROCESSES = multiprocessing.get_context("spawn")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "PetTransformerBlock",
}
VARIANTS = {"one process": (1, {}), "two processes": (2, {}), "two processes, FSDP2": (2, FSDP)}


def train(environment: dict[str, str], args: argparse.Namespace, results: Queue) -> None:
    """Trains in one process of several, and reports its seconds by the clock and of the processor."""
    os.environ.update(environment)
    if "ACCELERATE_USE_FSDP" in environment:
        shard_on_cpus()
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    transformer, scheduler = PetTransformer2DModel.from_preset(args.preset), AdaptiveEDMScheduler()
    model = DenoiserWithLoss(transformer, BalancedAdaptiveLoss())
    optimizer = create_optimizer(
        train_pet.parse_args(["--max_train_steps", "1"]), transformer, model.loss_function
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    images, labels = torch.randn(args.batch_size, 3, 32, 32), torch.zeros(args.batch_size, dtype=torch.long)

    def step() -> None:
        sigmas = torch.ones(args.batch_size)
        losses = model(images, scheduler.precondition_noise(sigmas), labels, images, sigmas)
        accelerator.backward(losses.loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        whole_parameters(transformer)

    step()
    accelerator.wait_for_everyone()
    began, used = time.perf_counter(), time.process_time()
    for _ in range(args.steps):
        step()
    accelerator.wait_for_everyone()
    results.put((time.perf_counter() - began, time.process_time() - used))


def run(number: int, environment: dict[str, str], args: argparse.Namespace) -> tuple[float, float]:
    """Returns the images per second of one training and its seconds of processor for an image."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    results, processes = PROCESSES.Queue(), []
    for rank in range(number):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
        ranks["LOCAL_WORLD_SIZE"] = str(number)
        target = {**address, **environment, **(ranks if number > 1 else {})}
        processes.append(PROCESSES.Process(target=train, args=(target, args, results)))
        processes[-1].start()
    measured = [results.get() for _ in processes]
    for process in processes:
        process.join()
    num_images = number * args.steps * args.batch_size
    return num_images / max(clock for clock, _ in measured), sum(used for _, used in measured) / num_images


def seconds_of_validation(args: argparse.Namespace, num_images: int = 32) -> float:
    """Returns the seconds of processor of a validation, for each image at 16 noise levels."""
    torch.set_num_threads(1)
    images = torch.zeros(num_images, 3, 32, 32, dtype=torch.uint8)
    dataset = ImageDataset(images, torch.zeros(num_images, dtype=torch.long), ["cat", "dog"])
    began = time.process_time()
    validation_loss(
        PetTransformer2DModel.from_preset(args.preset).eval(), AdaptiveEDMScheduler(), dataset, 32
    )
    return (time.process_time() - began) / num_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="small", help="size of the denoiser")
    parser.add_argument("--batch_size", type=int, default=32, help="number of images of one process and step")
    parser.add_argument("--steps", type=int, default=4, help="number of steps that are timed")
    parser.add_argument("--repeats", type=int, default=3, help="number of turns, of which the median counts")
    args = parser.parse_args()
    measured = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name, (number, environment) in VARIANTS.items():
            measured[name].append(run(number, environment, args))
    medians = {name: [statistics.median(c) for c in zip(*runs)] for name, runs in measured.items()}
    speed, processor = medians["one process"]
    print("| training | images/s | ratio | seconds of processor an image | ratio |\n|---|---|---|---|---|")
    for name, (images, seconds) in medians.items():
        print(f"| {name} | {images:.1f} | {images / speed:.2f} | {seconds:.4f} | {seconds / processor:.2f} |")
    print(f"\nValidation takes {seconds_of_validation(args):.3f} seconds of processor for each image.")


if __name__ == "__main__":
    main()
