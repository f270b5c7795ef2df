"""Numbers stay finite in every precision, and memory stays flat in long runs."""

import json
import math
from collections.abc import Callable
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from conftest import random_model
from support.training_process import PROCESSES, TINY, train

import train_pet
from pet_pipeline import (
    AdaptiveEDMScheduler,
    BalancedAdaptiveLoss,
    PetDiffusionPipeline,
    PetTransformer2DModel,
)
from pet_pipeline.__main__ import main


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])


IN_CI = [(None, 16, 1), (None, 32, 7), (None, 64, 64)]


@pytest.mark.parametrize(
    ("preset", "size", "batch_size"),
    [
        pytest.param(*case, marks=[] if case in IN_CI else pytest.mark.slow)
        for case in product((None, "small"), (16, 32, 64), (1, 7, 64))
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_sampling_and_training_stay_finite(preset, size, batch_size, device):
    # In CI a tiny model, else the one that the training script makes.
    for dtype in dtypes(device):
        if preset is None:
            model = random_model(sample_size=size)
        else:
            model = PetTransformer2DModel.from_preset(preset, sample_size=size)
            for parameter in model.parameters():  # the paths to the pixels start at zero
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
        scheduler = AdaptiveEDMScheduler()
        pipeline = PetDiffusionPipeline(model.to(dtype), scheduler).to(device)
        pipeline.set_progress_bar_config(disable=True)
        labels = [index % 2 for index in range(batch_size)]
        images = pipeline(labels, num_inference_steps=4, guidance_scale=3.0, output_type="latent").images
        assert images.shape == (batch_size, 3, size, size) and images.isfinite().all(), dtype

        # A step of the training, with weights in float32 as there, at all noise levels of the grid.
        model = model.float().train()
        loss_function = BalancedAdaptiveLoss().to(device)
        images = torch.rand(batch_size, 3, size, size, device=device) * 2 - 1
        sigmas = torch.linspace(math.log(0.002), math.log(80), batch_size, device=device).exp()
        timesteps = scheduler.precondition_noise(sigmas)
        noisy_images = scheduler.add_noise(images, torch.randn_like(images), timesteps)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            model_output = model(
                scheduler.precondition_inputs(noisy_images, sigmas),
                timesteps,
                torch.tensor(labels, device=device),
            ).sample.float()
            loss = loss_function(
                model_output,
                scheduler.training_target(images, noisy_images, sigmas),
                sigmas,
            ).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients), dtype
        assert sum(gradient.abs().sum() for gradient in gradients) > 0


def resident_megabytes() -> float:
    """Memory of this process, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel does not tell")


def assert_flat(megabytes: list[float], what: str) -> None:
    """Asserts that memory, once warm, does not grow; prints where it was."""
    warm = megabytes[len(megabytes) // 10 :]
    third = len(warm) // 3
    places = {
        "the start": 0,
        "a tenth": len(megabytes) // 10,
        "the middle": len(megabytes) // 2,
        "the end": -1,
    }
    print(f"{what}: " + ", ".join(f"{megabytes[index]:.0f} MB at {place}" for place, index in places.items()))
    assert max(warm[-third:]) - max(warm[:third]) < 20, megabytes


def in_fresh_process(function: Callable[[Path], list[float]], folder: Path) -> list[float]:
    """Returns what a function returns in a process where nothing else has taken memory yet."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=send_result, args=(function, folder, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def send_result(function: Callable[[Path], list[float]], folder: Path, sender: Connection) -> None:
    torch.set_num_threads(1)
    sender.send(function(folder))


def generate_5000_images(folder: Path) -> list[float]:
    megabytes = []
    draw = PetDiffusionPipeline.__call__

    def measured_draw(self, *args, **kwargs):
        self.set_progress_bar_config(disable=True)
        megabytes.append(resident_megabytes())
        return draw(self, *args, **kwargs)

    PetDiffusionPipeline.__call__ = measured_draw
    words = ["generate", "--num_samples", "2500", "--model", str(folder / "model")]
    assert main([*words, "--out", str(folder / "out")]) == 0
    return megabytes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_5000_images(tmp_path):
    pipeline = PetDiffusionPipeline(random_model(sample_size=32), AdaptiveEDMScheduler())
    pipeline.save_pretrained(tmp_path / "model")
    megabytes = in_fresh_process(generate_5000_images, tmp_path)
    assert len(list((tmp_path / "out").iterdir())) == 5001
    assert_flat(megabytes, f"5,000 images of 32×32 pixels in {len(megabytes)} batches")


def train_2000_steps(folder: Path) -> list[float]:
    megabytes = []
    step = train_pet.EMAModel.step

    def measured_step(self, parameters):
        step(self, parameters)
        megabytes.append(resident_megabytes())

    train_pet.EMAModel.step = measured_step
    train(
        folder / "images",
        folder / "out",
        model_config=json.dumps(TINY),
        resolution=32,
        train_batch_size=16,
        max_train_steps=2000,
        validation_steps=100,
        preview_images=2,
        preview_steps=200,
        checkpointing_steps=100,
    )
    return megabytes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_2000_training_steps(image_folder, tmp_path):
    (tmp_path / "images").symlink_to(image_folder)
    megabytes = in_fresh_process(train_2000_steps, tmp_path)
    assert_flat(megabytes, f"{len(megabytes):,} training steps with 20 checkpoints and validations")
