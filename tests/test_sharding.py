"""Trainings whose parameters FSDP2 shards over two processes, on CPUs (gloo)."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from support.training_process import (
    TINY,
    arguments,
    assert_close,
    assert_equal,
    log_of_losses,
    metrics,
    start_processes,
    train,
)

import train_pet
from pet_pipeline.training import hardware


# What `accelerate launch --use_fsdp --fsdp_version 2` sets.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "PetTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def run(image_folder: Path, output_dir: Path, number: int, environment=None, predictable=False, **options):
    """Trains in a number of processes to the end, and returns the output of the first one."""
    words = arguments(image_folder, output_dir, **options)
    ended = [training.end() for training in start_processes(words, number, environment, predictable)]
    assert not any(e.exit_code for e in ended), ended
    return ended[0].output


def saved_weights(output_dir: Path) -> list[dict]:
    return [
        load_file(output_dir / folder / "transformer" / "diffusion_pytorch_model.safetensors")
        for folder in (".", "best")
    ]


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_sharding_processes_train_the_same_model_as_one_process(optimizer, image_folder, tmp_path):
    # The third optimizer step has a loss that is not finite, on one of the processes.
    options = {
        "optimizer": optimizer,
        "adam_epsilon": 1e-3,  # Adam's step is the sign of the gradient where it is tiny, rounding included
        "gradient_accumulation_steps": 2,
        "label_dropout": 0,
        "max_grad_norm": 0.1,
        "no-random_flip": True,
    }
    one, two = tmp_path / "1", tmp_path / "2"
    run(image_folder, one, 1, train_batch_size=8, predictable=True, **options)
    output = run(image_folder, two, 2, FSDP, train_batch_size=4, predictable=True, **options)
    assert output.count("step 3 is skipped: 1 of 16 losses are not finite") == 1
    # Each process has written its share of the weights and of the state of the optimizer.
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert len(list((two / "checkpoint-6" / part).glob("*.distcp"))) == 2
    assert_close(saved_weights(one), saved_weights(two), "weights")
    for records in zip(*(metrics(folder) for folder in (one, two)), strict=True):
        assert_close(*({k: v for k, v in r.items() if "second" not in k} for r in records), "metrics")


@pytest.mark.parametrize(
    "state_dict_type",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("SHARDED_STATE_DICT", "FULL_STATE_DICT")],
)
def test_a_resumed_sharded_run_equals_an_uninterrupted_one(state_dict_type, image_folder, tmp_path):
    environment = {**FSDP, "FSDP_STATE_DICT_TYPE": state_dict_type}
    options = {"train_batch_size": 4, "model_config": json.dumps({**TINY, "dropout": 0.2})}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(image_folder, whole, 2, environment, **options)
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    shutil.copytree(whole / "best", parts / "best")
    shutil.copy(whole / "metrics.jsonl", parts)
    output = run(image_folder, parts, 2, environment, resume_from_checkpoint="latest", **options)
    assert "Resumed at step 3" in output
    assert_equal(saved_weights(whole), saved_weights(parts))
    assert log_of_losses(whole) == log_of_losses(parts) and len(log_of_losses(parts)) == 6
    with pytest.raises(
        ValueError, match="checkpoint-6' was written with FSDP and cannot be continued without"
    ):
        train(image_folder, parts, resume_from_checkpoint="latest", **options)


def test_a_checkpoint_without_fsdp_and_fsdp_of_version_1_are_refused(image_folder, tmp_path, finished_run):
    environments = {"cannot be continued with it": FSDP, "--fsdp_version 2": {**FSDP, "FSDP_VERSION": "1"}}
    words = arguments(image_folder, tmp_path / "out", resume_from_checkpoint=finished_run / "checkpoint-6")
    for message, environment in environments.items():
        (training,) = start_processes(words, 1, environment)
        ended = training.end()
        assert ended.exit_code == 1 and message in ended.output and "Traceback" not in ended.output
    assert not (tmp_path / "out").exists()


def test_deepspeed_is_refused(monkeypatch):
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, num_processes=1)
    monkeypatch.setattr(hardware, "Accelerator", lambda **kwargs: accelerator)
    with pytest.raises(ValueError, match="DeepSpeed takes the steps of the optimizer by itself"):
        hardware.create_accelerator(
            train_pet.parse_args(["--max_train_steps", "1", "--mixed_precision", "no"])
        )
