"""Resuming a training at toy size: what a checkpoint keeps, and which checkpoints are refused."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.training_process import (
    TINY,
    assert_equal,
    checkpoint_content,
    denoiser_weights,
    log_of_losses,
    metrics,
    train,
)

from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.evaluation.metrics import validation_loss
from pet_pipeline.training import results
from pet_pipeline.training.checkpointing import find_checkpoint, list_checkpoints, trim_log


def with_further_images(image_folder: Path, folder: Path, per_class: int = 5) -> Path:
    """A copy of an image folder with more images of each class, sorted before and between the others."""
    shutil.copytree(image_folder, folder)
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        for index in range(per_class):
            image = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
            image.save(folder / name / f"{4 * index:02}-new.png")
    return folder


def held_out_images(monkeypatch) -> list[torch.Tensor]:
    """The images of every validation from now on."""
    seen = []

    def watched(transformer, scheduler, dataset, *args):
        seen.append(dataset.images)
        return validation_loss(transformer, scheduler, dataset, *args)

    monkeypatch.setattr(results, "validation_loss", watched)
    return seen


STREAM = {"streaming": True, "validation_images": 4}


@pytest.mark.parametrize(
    ("source", "step"),
    [
        pytest.param({}, 3, id="in memory, first pass"),
        pytest.param({"augmentation_probability": 0.5}, 6, id="in memory, augmented, second pass"),
        pytest.param({"max_memory_gb": 1e-9}, 3, id="on the fly, first pass", marks=pytest.mark.slow),
        pytest.param({"max_memory_gb": 1e-9}, 6, id="on the fly, second pass"),
        pytest.param(STREAM, 3, id="stream, first pass", marks=pytest.mark.slow),
        pytest.param(STREAM, 6, id="stream, second pass"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    source, step, image_folder, shuffled_files, tmp_path, capsys
):
    # 8 steps cross the ends of epochs (36 images, 4 batches each).
    options = {"max_train_steps": 8, "checkpointing_steps": 3, "dataloader_num_workers": 2, **source}
    options["model_config"] = json.dumps({**TINY, "dropout": 0.2})
    data = shuffled_files if "streaming" in source else image_folder
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(data, whole, checkpoints_total_limit=5, **options)
    parts.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", parts / f"checkpoint-{step}")
    shutil.copy(whole / "metrics.jsonl", parts)  # reaches further than the checkpoint
    train(data, parts, resume_from_checkpoint="latest", **options)
    assert f"Resumed at step {step}" in capsys.readouterr().out
    weights = [
        load_file(run / "transformer" / "diffusion_pytorch_model.safetensors") for run in (whole, parts)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [[r["train/loss"] for r in metrics(run) if "train/loss" in r] for run in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_run_is_the_same_wherever_its_images_are(image_folder, tmp_path):
    for name, source in (("memory", {}), ("files", {"max_memory_gb": 1e-9, "dataloader_num_workers": 2})):
        train(image_folder, tmp_path / name, **source)
    checkpoints = [checkpoint_content(tmp_path / name / "checkpoint-6") for name in ("memory", "files")]
    assert_equal(*checkpoints)
    losses = [log_of_losses(tmp_path / name) for name in ("memory", "files")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_checkpoints_are_rotated_and_found(finished_run, tmp_path):
    assert [path.name for path in list_checkpoints(finished_run)] == ["checkpoint-3", "checkpoint-6"]
    assert find_checkpoint(finished_run, "latest").name == "checkpoint-6"
    assert find_checkpoint(finished_run, "checkpoint-3").name == "checkpoint-3"
    with pytest.raises(ValueError, match="no checkpoint"):
        find_checkpoint(tmp_path, "latest")
    with pytest.raises(ValueError, match="no checkpoint 'checkpoint-99'"):
        find_checkpoint(finished_run, "checkpoint-99")


def test_the_log_loses_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1, "validation/loss": 3.0}', '{"step": 2, "train/loss": 1.0}']
    again = ['{"step": 2, "validation/loss": 2.0}', '{"step": 3, "train/loss": 0.5}', '{"step": 1, "train']
    path.write_text("\n".join(kept + again))
    trim_log(path, 2)
    assert path.read_text().splitlines() == kept


def test_options_of_the_command_count_after_resuming(finished_run, image_folder, tmp_path):
    # Into another folder, which has no `best` yet; the loss need not fall below that of the first run.
    options = {
        "resume_from_checkpoint": finished_run / "checkpoint-3",
        "learning_rate": 0,
        "max_train_steps": 4,
    }
    options |= {"muon_learning_rate": 0, "ema_max_decay": 0.0, "adam_beta1": 0.5, "validation_steps": 100}
    train(image_folder, tmp_path / "out", **options)
    assert (tmp_path / "out" / "best" / "model_index.json").exists()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    assert state["param_groups"][1]["betas"][0] == 0.5
    # Averaged over nothing, the weights are those of the last step.
    averaged = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    last = denoiser_weights(checkpoint)
    for name in averaged:
        torch.testing.assert_close(averaged[name], last[name])


def test_a_longer_run_keeps_what_was_measured_at_the_end_before(image_folder, tmp_path):
    options = {"validation_steps": 4, "checkpointing_steps": 10, "learning_rate": 0, "muon_learning_rate": 0}
    train(image_folder, tmp_path / "out", max_train_steps=2, **options)
    (before,) = [record for record in metrics(tmp_path / "out") if "validation/loss" in record]
    best = load_file(tmp_path / "out" / "best" / "transformer" / "diffusion_pytorch_model.safetensors")
    options |= {"learning_rate": 10, "muon_learning_rate": 10}  # which makes the loss worse
    train(image_folder, tmp_path / "out", max_train_steps=5, resume_from_checkpoint="latest", **options)
    measured = [record for record in metrics(tmp_path / "out") if "validation/loss" in record]
    assert [record["step"] for record in measured] == [2, 4, 5]
    assert measured[0]["validation/loss"] == before["validation/loss"] < measured[1]["validation/loss"]
    kept = load_file(tmp_path / "out" / "best" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_equal(kept, best)


def test_a_finished_run_is_not_overwritten(finished_run, image_folder):
    before = metrics(finished_run)
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        train(image_folder, finished_run)
    assert metrics(finished_run) == before


def test_resuming_before_other_checkpoints_is_refused(finished_run, image_folder, tmp_path):
    with pytest.raises(ValueError, match="holds later checkpoints than the one to resume from: checkpoint-6"):
        train(image_folder, finished_run, resume_from_checkpoint="checkpoint-3")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="holds the checkpoints of another run than"):
        train(image_folder, tmp_path, resume_from_checkpoint=finished_run / "checkpoint-6")
    assert [path.name for path in list_checkpoints(finished_run)] == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw"}, "`optimizer` 'muon', and so it cannot be continued with 'adamw'.$"),
        ({"no-learned_weighting": True}, "`learned_weighting` True, .* with False.$"),
        ({"model_config": json.dumps({**TINY, "num_attention_heads": 2})}, "`num_attention_heads` 1, "),
        ({"prediction_type": "v_prediction"}, "`prediction_type` 'epsilon', .* with 'v_prediction'.$"),
        ({"resolution": 16}, "`sample_size` 8, and so it cannot be continued with 16.$"),
        ({"no-frequency_preconditioning": True}, r"`frequency_variances` \[.*, \.\.\.\], .* with None.$"),
    ],
)
@pytest.mark.filterwarnings("ignore:The data set or the validation fraction has changed")
def test_a_checkpoint_of_another_training_is_refused(options, message, finished_run, image_folder, tmp_path):
    resume = {"resume_from_checkpoint": finished_run / "checkpoint-3", "max_train_steps": 6}
    with pytest.raises(ValueError, match=f"The checkpoint was trained with {message}"):
        train(image_folder, tmp_path / "out", **{**resume, **options})
    assert not (tmp_path / "out").exists()


def test_steps_have_the_accumulation_of_the_command_after_resuming(finished_run, image_folder, tmp_path):
    options = {"resume_from_checkpoint": finished_run / "checkpoint-3", "gradient_accumulation_steps": 2}
    train(image_folder, tmp_path / "out", max_train_steps=5, **options)
    losses = [record for record in metrics(tmp_path / "out") if "train/loss" in record]
    assert [(record["step"], record["images"]) for record in losses] == [(4, 40), (5, 56)]


def test_a_run_resumed_in_another_precision_says_so(finished_run, image_folder, tmp_path):
    shutil.copytree(finished_run / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    resume = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    with pytest.warns(UserWarning, match="trained with --mixed_precision no: with bf16"):
        train(image_folder, tmp_path / "out", mixed_precision="bf16", **resume)
    # The next checkpoint is of that precision.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained with --mixed_precision")
        train(image_folder, tmp_path / "out", mixed_precision="bf16", **{**resume, "max_train_steps": 5})


def test_a_run_resumed_with_a_grown_data_set_holds_the_same_images_out(image_folder, tmp_path, monkeypatch):
    seen = held_out_images(monkeypatch)
    options = {"max_train_steps": 3, "validation_fraction": 0.2}
    train(image_folder, tmp_path / "out", **options)
    config = PetDiffusionPipeline.from_pretrained(tmp_path / "out").transformer.config
    grown = with_further_images(image_folder, tmp_path / "grown")
    options |= {"resume_from_checkpoint": "latest", "validation_steps": 100}
    with pytest.warns(UserWarning, match="data set .* has changed .* 8 of the 8 images .* held out again.$"):
        train(grown, tmp_path / "out", **{**options, "max_train_steps": 5})
    assert torch.equal(seen[0], seen[-1]) and len(seen[0]) == 8
    # The model is preconditioned as before: its weights were trained so.
    resumed = PetDiffusionPipeline.from_pretrained(tmp_path / "out").transformer.config
    assert resumed.frequency_variances == config.frequency_variances
    assert "42 images of a local data set" in (tmp_path / "out" / "README.md").read_text()
    # The checkpoint is now of the grown data set.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The data set")
        train(grown, tmp_path / "out", **{**options, "max_train_steps": 6})
    assert torch.equal(seen[0], seen[-1])
    # A smaller data set keeps what there is of them, and says what it means.
    options |= {"max_train_samples": 20}
    with pytest.warns(UserWarning, match="[1-7] of the 8 images .* compare different images.$"):
        train(grown, tmp_path / "out", **{**options, "max_train_steps": 7})


def test_a_run_resumed_with_another_data_set_says_so(image_folder, tmp_path):
    train(image_folder, tmp_path / "out", max_train_steps=3)
    resume = {"resume_from_checkpoint": "latest"}
    for name in ("cat", "dog"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for index in range(10):
            Image.effect_noise((8, 8), 50).save(tmp_path / "other" / name / f"{index}.png")
    with pytest.warns(UserWarning, match="some that were trained on are held out now, and `best` compares"):
        train(tmp_path / "other", tmp_path / "out", max_train_steps=4, **resume)
    with pytest.raises(ValueError, match="trained on the classes cat, dog, but the classes are now dog, cat"):
        train(tmp_path / "other", tmp_path / "out", max_train_steps=5, classes=["dog", "cat"], **resume)


@pytest.mark.parametrize("has_description", [True, False])
def test_a_checkpoint_of_an_earlier_version_is_refused(has_description, finished_run, image_folder, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-3"
    shutil.copytree(finished_run / "checkpoint-3", checkpoint)
    path = checkpoint / "training.json"
    description = json.loads(path.read_text())
    del description["format"]
    path.write_text(json.dumps(description))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["training.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if not has_description:
        path.unlink()
        del manifest["sha256"]["training.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="of an earlier version .* --pretrained_model_name_or_path"):
        train(image_folder, tmp_path / "out", resume_from_checkpoint="latest")
