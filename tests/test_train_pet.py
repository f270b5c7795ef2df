"""The training script at toy size: once launched as by a user, otherwise in this process for speed."""

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import random_model
from PIL import Image
from safetensors.torch import load_file
from support.features import Pixels
from support.training_process import (
    SCRIPT,
    arguments,
    assert_equal,
    checkpoint_content,
    denoiser_weights,
    metrics,
    train,
)

import pet_pipeline.scheduling_adaptive_edm as train_pet_scheduler
import train_pet
from pet_pipeline import (
    AdaptiveEDMScheduler,
    BalancedAdaptiveLoss,
    PetDiffusionPipeline,
    PetTransformer2DModel,
)
from pet_pipeline.__main__ import main
from pet_pipeline.evaluation.images import generate_images
from pet_pipeline.evaluation.metrics import (
    FEATURE_EXTRACTORS,
    image_features,
    kernel_distance,
    validation_loss,
)
from pet_pipeline.training import results
from pet_pipeline.training.checkpointing import list_checkpoints
from pet_pipeline.training.data import open_image_dataset, stratified_split, to_model_range
from pet_pipeline.training.denoiser import adapt_model, frequency_variances
from pet_pipeline.training.hardware import automatic_precision
from pet_pipeline.training.optimization import learning_rate_factor


@pytest.mark.parametrize(
    "options",
    [["--num_processes", "1"], ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]],
    ids=["one process", "two processes"],
)
def test_a_launched_run_says_where_it_saved_the_pipeline(options, image_folder, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", *options]
    result = subprocess.run(
        [*command, str(SCRIPT), *arguments(image_folder, tmp_path / "out", max_train_steps=1)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(SCRIPT.parent),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        },
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"Saved the pipeline in {tmp_path / 'out'}.") == 1
    PetDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert metrics(tmp_path / "out")[0]["images"] == 8 * int(options[options.index("--num_processes") + 1])


def test_a_run_leaves_a_pipeline_that_loads_and_draws(finished_run):
    pipe = PetDiffusionPipeline.from_pretrained(finished_run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.id2label == {0: "cat", 1: "dog"}
    assert pipe("dog", num_inference_steps=3).images[0].size == (8, 8)
    assert (finished_run / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert (finished_run / "best" / "model_index.json").exists()


def test_a_run_measures_the_frequencies_of_its_images(finished_run, image_folder, tmp_path):
    config = PetDiffusionPipeline.from_pretrained(finished_run).transformer.config
    images = stratified_split(open_image_dataset(str(image_folder), ["cat", "dog"], 8).load(), 0.1)[0].images
    assert config.frequency_variances == frequency_variances(images, 2)
    train(image_folder, tmp_path / "out", max_train_steps=1, **{"no-frequency_preconditioning": True})
    plain = PetDiffusionPipeline.from_pretrained(tmp_path / "out").transformer
    assert plain.config.frequency_variances is None


def test_a_run_leaves_pictures_and_numbers(finished_run):
    names = {path.name for path in (finished_run / "samples").iterdir()}
    assert {"samples-000004.png", "denoising-000004.png", "samples-000006.png"} <= names
    assert {"step-comparison.png", "curves.png"} <= names
    for name in names:
        with Image.open(finished_run / "samples" / name) as image:
            assert image.getextrema() != ((255, 255),) * 3
    records = metrics(finished_run)
    losses = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4, 5, 6]
    assert all(
        f"train/term_{name}" in losses[0] for name in ("mse", "l1", "cosine", "high_frequency", "edge")
    )
    assert losses[-1]["train/learning_rate"] == 0  # exactly zero at the last step
    assert losses[0]["images"] == 8 and losses[-1]["images"] == 48
    validations = [record for record in records if "validation/loss" in record]
    assert [record["step"] for record in validations] == [3, 6]
    bands = [value for key, value in validations[-1].items() if key.startswith("validation/sigma_")]
    assert len(bands) == 16 and validations[-1]["validation/loss"] == pytest.approx(sum(bands) / 16)
    assert list((finished_run / "logs").rglob("events.*"))


def test_a_run_validates_the_weights_that_it_saves_on_images_held_out(finished_run, image_folder):
    pipeline = PetDiffusionPipeline.from_pretrained(finished_run)  # without dropout, which training has
    held_out = stratified_split(open_image_dataset(str(image_folder), ["cat", "dog"], 8).load(), 0.1)[1]
    assert len(held_out) == 4 and pipeline.transformer.config.dropout == 0.5
    errors = validation_loss(pipeline.transformer, pipeline.scheduler, held_out.subset(torch.arange(3)))
    expected = sum(errors.values()) / len(errors)
    assert metrics(finished_run)[-1]["validation/loss"] == pytest.approx(expected, rel=1e-5)


def test_kid_is_measured_on_the_weights_that_are_saved_and_changes_no_training(
    image_folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    monkeypatch.setattr(results, "NUM_EVALUATED", 6)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    for name, options in (("plain", {}), ("measured", {"evaluation_steps": 4})):
        train(image_folder, tmp_path / name, **options)
    plain, measured = (checkpoint_content(tmp_path / name / "checkpoint-6") for name in ("plain", "measured"))
    assert_equal(plain, measured)
    records = [record for record in metrics(tmp_path / "measured") if "validation/kid" in record]
    assert [record["step"] for record in records] == [4, 6]
    held_out = stratified_split(open_image_dataset(str(image_folder), ["cat", "dog"], 8).load(), 0.1)[1]
    pipeline = PetDiffusionPipeline.from_pretrained(tmp_path / "measured")
    drawn = generate_images(pipeline, 6).images
    expected, _ = kernel_distance(*(image_features(images, Pixels()) for images in (held_out.images, drawn)))
    assert records[-1]["validation/kid"] == pytest.approx(expected, rel=1e-4)


def test_kid_without_its_packages_is_one_error_before_the_training(image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"--evaluation_steps requires .*pet-pipeline\[eval\]"):
        train(image_folder, tmp_path / "out", evaluation_steps=4)
    assert not (tmp_path / "out").exists()


def test_the_clock_ends_a_run(image_folder, tmp_path):
    train(
        image_folder, tmp_path / "out", max_train_steps=None, max_train_minutes=0.02, validation_steps=10000
    )
    last = [record for record in metrics(tmp_path / "out") if "train/loss" in record][-1]
    assert last["seconds"] >= 1.2 and last["train/learning_rate"] == 0


def test_other_classes_losses_and_optimizers(image_folder, tmp_path):
    train(
        image_folder,
        tmp_path / "out",
        classes=["all"],
        max_train_steps=None,
        num_train_epochs=1,
        optimizer="adamw",
        loss="mse",
        noise_schedule="fixed",
        max_train_samples=40,
        checkpoints_total_limit=1,
    )
    pipe = PetDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert not pipe.scheduler.config.adaptive
    assert list(pipe.id2label.values()) == ["bird", "cat", "dog"]
    assert metrics(tmp_path / "out")[-1]["step"] == 3 * 12 // 8  # 13 of each class, of which 1 is held out
    assert len(list_checkpoints(tmp_path / "out")) == 1
    # Of `--preview_images 0`, the picture of the card is all that is left.
    assert not list((tmp_path / "out" / "samples").iterdir()) and (tmp_path / "out" / "samples.png").exists()


def test_grey_images_without_labels(image_folder, tmp_path, monkeypatch):
    (tmp_path / "grey").mkdir()
    for path in image_folder.glob("*/*.png"):
        with Image.open(path) as image:
            image.convert("L").save(tmp_path / "grey" / f"{path.parent.name}-{path.name}")
    out = tmp_path / "out"
    options = {"image_mode": "L", "max_train_steps": 2, "validation_steps": 9, "preview_images": 1}
    train(tmp_path / "grey", out, classes=["all"], **options)
    pipe = PetDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    (image,) = pipe(num_inference_steps=2).images
    assert image.mode == "L" and pipe.class_names == ["image"] and pipe.config.guidance_scale == 1
    assert not pipe.transformer.class_embedding.weight[1].any()  # no label was dropped
    card = (out / "README.md").read_text()
    assert "# Images, 8×8" in card and "An unconditional diffusion model" in card
    assert "like those of its training data" in card and "pipeline().images" in card
    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    words = ["--reference", str(tmp_path / "grey"), "--num_images", "8", "--steps", "1"]
    assert main(["evaluate", str(out), *words, "--out", str(out)]) == 0
    # The channels of a saved model are kept.
    options = {"pretrained_model_name_or_path": out, "model_config": None, "resolution": None}
    train(tmp_path / "grey", tmp_path / "more", classes=["all"], max_train_steps=1, **options)
    assert PetDiffusionPipeline.from_pretrained(tmp_path / "more").transformer.config.in_channels == 1


def test_fine_tuning_starts_from_saved_weights(finished_run, image_folder, tmp_path, monkeypatch):
    modes = []
    forward = PetTransformer2DModel.forward

    def watched_forward(self, *args, **kwargs):
        modes.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PetTransformer2DModel, "forward", watched_forward)
    options = {"pretrained_model_name_or_path": finished_run, "max_train_steps": 1, "learning_rate": 0}
    options["model_config"] = None
    train(image_folder, tmp_path / "out", muon_learning_rate=0, **options)
    name = Path("transformer") / "diffusion_pytorch_model.safetensors"
    before, after = load_file(finished_run / name), load_file(tmp_path / "out" / name)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert modes[0] and not any(modes[1:])  # a loaded model trains with its dropout, and is measured without


def test_fine_tuning_matches_classes_by_name(finished_run):
    pipeline = PetDiffusionPipeline.from_pretrained(finished_run)  # cat, dog
    cat, dog, null = pipeline.transformer.class_embedding.weight.detach()
    matched = adapt_model(pipeline, ["dog", "bird", "cat"], resolution=8)
    rows = matched.class_embedding.weight
    assert matched.config.num_classes == 3
    assert torch.equal(rows[[0, 2, 3]], torch.stack([dog, cat, null]))
    assert not any(torch.equal(rows[1], row) for row in (cat, dog, null))
    inputs = torch.randn(2, 3, 8, 8), torch.zeros(2)
    expected = pipeline.transformer(*inputs, torch.tensor([1, 2])).sample
    assert torch.equal(matched.eval()(*inputs, torch.tensor([0, 3])).sample, expected)


def test_fine_tuning_a_model_without_class_names(finished_run):
    pipeline = PetDiffusionPipeline.from_pretrained(finished_run)
    pipeline.id2label.clear()
    assert adapt_model(pipeline, ["bird", "dog"], resolution=8) is pipeline.transformer
    with pytest.raises(ValueError, match="2 classes without names, but --classes names 3"):
        adapt_model(pipeline, ["bird", "cat", "dog"], resolution=8)
    grey = PetDiffusionPipeline(random_model(in_channels=1), AdaptiveEDMScheduler())
    with pytest.raises(ValueError, match="has 1 channels, but the images have 3"):
        adapt_model(grey, ["cat", "dog"], resolution=8)


def test_fine_tuning_at_another_size(finished_run, image_folder, tmp_path):
    options = {"pretrained_model_name_or_path": finished_run, "max_train_steps": 1, "learning_rate": 0}
    options |= {"model_config": None, "muon_learning_rate": 0}
    train(image_folder, tmp_path / "larger", resolution=16, **options)
    before = PetDiffusionPipeline.from_pretrained(finished_run)
    after = PetDiffusionPipeline.from_pretrained(tmp_path / "larger")
    assert after("cat", num_inference_steps=1).images[0].size == (16, 16)
    # The positions are those that the model knows, so that before it trains it is the same function.
    inputs = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 1])
    assert torch.equal(after.transformer(*inputs).sample, before.transformer(*inputs).sample)

    options |= {"pretrained_model_name_or_path": tmp_path / "larger", "resolution": None}
    PetDiffusionPipeline.from_pretrained(tmp_path / "larger", pag_scale=0.5).save_pretrained(
        tmp_path / "larger"
    )
    train(image_folder, tmp_path / "same", **options)  # the size is the model's
    same = PetDiffusionPipeline.from_pretrained(tmp_path / "same")
    config = same.transformer.config
    assert config.sample_size == 16 and config.interpolation_scale == 2 and same.config.pag_scale == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["cat", "unicorn"]}, "no class 'unicorn'"),
        ({"dataset_name": "/nowhere/at-all"}, "cannot be loaded"),
        ({"resolution": 10}, "twice the patch size, must divide `sample_size`, but `patch_size` is 2 and"),
        ({"resolution": 9}, "`patch_size` must divide the height and width of the images, but 2 does not"),
        ({"resume_from_checkpoint": "latest"}, "no checkpoint"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(image_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(image_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_class_name_that_cannot_be_saved_ends_the_run_before_it_starts(image_folder, tmp_path):
    shutil.copytree(image_folder / "cat", tmp_path / "pets" / "cat")
    shutil.copytree(image_folder / "dog", tmp_path / "pets" / "dog\u00a0two")
    with pytest.raises(ValueError, match="printable characters"):
        train(tmp_path / "pets", tmp_path / "out", classes=["all"])
    assert not (tmp_path / "out").exists()


def test_the_loop_uses_its_options(image_folder, tmp_path, monkeypatch):
    drawn, seeds, evaluated, losses, norms, prepared = [], [], [], [], [], []
    draw, forward = AdaptiveEDMScheduler.sample_training_sigmas, PetTransformer2DModel.forward
    loss, clip, prepare = BalancedAdaptiveLoss.forward, Accelerator.clip_grad_norm_, Accelerator.prepare

    def watched_draw(*args, **kwargs):
        seeds.append(torch.initial_seed())
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    def watched_forward(self, hidden_states, timestep, class_labels=None, **kwargs):
        output = forward(self, hidden_states, timestep, class_labels, **kwargs)
        if self.training:
            assert self.gradient_checkpointing
            evaluated.append((hidden_states, timestep, class_labels, output[0].detach()))
        return output

    def watched_loss(self, model_output, target, sigmas, **kwargs):
        assert self.preset == "mse" and self.logvar is None
        losses.append({"output": model_output.detach(), "target": target, "sigmas": sigmas, **kwargs})
        return loss(self, model_output, target, sigmas, **kwargs)

    def watched_prepare(self, *objects):
        result = prepare(self, *objects)
        prepared.append(self)
        return result

    def watched_clip(self, parameters, max_norm, *args):
        norms.append(max_norm)
        return clip(self, parameters, max_norm, *args)

    monkeypatch.setattr(AdaptiveEDMScheduler, "sample_training_sigmas", watched_draw)
    monkeypatch.setattr(PetTransformer2DModel, "forward", watched_forward)
    monkeypatch.setattr(BalancedAdaptiveLoss, "forward", watched_loss)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", watched_clip)
    monkeypatch.setattr(Accelerator, "prepare", watched_prepare)
    options = {"lr_scheduler": "linear", "lr_warmup_steps": 1, "loss": "mse", "max_grad_norm": 0.5}
    options |= {"prediction_type": "v_prediction", "noise_schedule": "adaptive", "p_mean": -1.0, "p_std": 1.0}
    options |= {"no-learned_weighting": True, "weight_decay": 0.25, "adam_beta2": 0.75, "no-use_ema": True}
    options |= {"gradient_checkpointing": True, "seed": 7}
    train(image_folder, tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=9, **options)
    assert norms == [0.5] * 6 and seeds == [7] * 6
    (accelerator,) = prepared
    # FSDP takes one model only.
    assert len(accelerator._models) == 1
    # While the main process validates, draws samples or pushes, the others wait for it in a collective call.
    assert accelerator.init_handler.timeout >= timedelta(hours=12)

    # What the model and the loss were given, back to the images they stand for.
    scheduler = AdaptiveEDMScheduler(prediction_type="v_prediction")
    data = stratified_split(open_image_dataset(str(image_folder), ["cat", "dog"], 8).load(), 0.1)[0]
    known = to_model_range(data.images)
    noise, mirrored = [], []
    for levels, inputs, given in zip(drawn, evaluated, losses, strict=True):
        hidden_states, timestep, labels, output = inputs
        sigmas = levels.sigmas
        assert given["sigmas"] is sigmas and given["weights"] is levels.weights
        assert torch.equal(given["output"], output)
        torch.testing.assert_close(timestep, sigmas.log() / 4)
        noisy_images = hidden_states * (sigmas**2 + 0.25).sqrt().view(-1, 1, 1, 1)
        images = scheduler.precondition_outputs(noisy_images, given["target"], sigmas)
        noise.append((noisy_images - images) / sigmas.view(-1, 1, 1, 1))
        for image, label in zip(images, labels):
            # One of 255 grey levels is 0.0078.
            same, flipped = (
                ((known - other).abs() < 1e-3).all(3).all(2).all(1) for other in (image, image.flip(-1))
            )
            ((row,),) = (same | flipped).nonzero()
            mirrored.append(flipped[row].item())
            assert label in (data.labels[row], 2)  # or the null class
    noise = torch.cat(noise)
    assert (noise.mean().item(), noise.std().item()) == pytest.approx((0, 1), abs=0.05)
    assert 12 < sum(mirrored) < 36 and len(mirrored) == 48

    for step in range(1, 7):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        muon, adamw = torch.load(folder / "optimizer.bin", weights_only=True)["param_groups"]
        factor = learning_rate_factor("linear", (step - 1) / 6, step - 1, 1)
        assert muon["lr"] == pytest.approx(0.02 * factor)
        assert adamw["lr"] == pytest.approx(3e-3 * factor)
        assert muon["weight_decay"] == adamw["weight_decay"] == 0.25
        assert adamw["betas"] == (0.9, 0.75)
    # Each of six batches of 8 was reported to the draw.
    state = torch.load(folder / "custom_checkpoint_1.pkl", weights_only=True)
    assert state["bin_counts"].sum().item() == pytest.approx(sum(8 * 0.99**k for k in range(6)), rel=1e-4)
    pipeline = PetDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.adaptive
    assert (pipeline.scheduler.config.p_mean, pipeline.scheduler.config.p_std) == (-1.0, 1.0)
    last = denoiser_weights(folder)  # nothing is averaged
    for name, weight in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(weight, last[name])
    for part in (pipeline.scheduler, pipeline.transformer):
        assert part.config.prediction_type == "v_prediction"


def test_automatic_precision_is_what_accelerate_was_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert automatic_precision() == "fp16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_train_steps", "0"], "--max_train_steps: must be at least 1"),
        (["--train_batch_size", "-1", "--max_train_steps", "1"], "--train_batch_size: must be at least 1"),
        (["--optimizer", "sgd", "--max_train_steps", "1"], "--optimizer: invalid choice: 'sgd'"),
        (["--ema_inv_gamma", "0", "--max_train_steps", "1"], "--ema_inv_gamma: must be positive"),
        (["--lr_warmup_steps", "-1", "--max_train_steps", "1"], "--lr_warmup_steps: must be at least 0"),
        (["--label_dropout", "2", "--max_train_steps", "1"], "--label_dropout: must be in [0, 1]"),
        (["--model_config", "{num_layers: 1}"], "--model_config: must be JSON"),
        (["--model_config", "[1]"], "must be a JSON object"),
        (["--model_config", '{"foo": 1}', "--max_train_steps", "1"], "has 'foo', but the model has no such"),
        (["--model_config", '{"sample_size": 64}', "--max_train_steps", "1"], "use --resolution"),
        (
            ["--pretrained_model_name_or_path", "x", "--preset", "base", "--max_train_steps", "1"],
            "--preset describes a new model",
        ),
        ([], "one of --max_train_steps, --num_train_epochs and --max_train_minutes"),
    ],
)
def test_bad_flags_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train_pet.parse_args(words)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_overfitting_eight_images_reproduces_them(tmp_path):
    rng = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(5):
            blocks = torch.randint(0, 256, (3, 4, 4), generator=rng).float()
            pixels = torch.nn.functional.interpolate(blocks[None], size=16, mode="bilinear")[0].byte()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "data" / name / f"{index}.png")
    config = json.dumps({"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32})
    train(
        tmp_path / "data",
        tmp_path / "out",
        resolution=16,
        model_config=config,
        max_train_steps=1500,
        validation_steps=10000,
        checkpointing_steps=10000,
        **{"no-random_flip": True},
    )
    dataset = open_image_dataset(
        str(tmp_path / "data"), resolution=16, cache_dir=str(tmp_path / "cache")
    ).load()
    train_set, _ = stratified_split(dataset, 0.1, seed=0)
    assert len(train_set) == 8
    known = train_pet.to_model_range(train_set.images)
    pipe = PetDiffusionPipeline.from_pretrained(tmp_path / "out")
    samples = pipe(num_images_per_prompt=16, guidance_scale=1.0, output_type="latent").images
    errors = (samples.unsqueeze(1) - known).square().mean((2, 3, 4)).min(1).values.sqrt()
    print(f"root mean square distance to the nearest of 8 training images: {errors.median():.3f} (median)")
    assert errors.median() < 0.1


def test_ema_follows_its_formula(image_folder, tmp_path):
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 10, "ema_power": 0.6}
    train(image_folder, tmp_path / "out", **options)
    expected = None
    for step in range(1, 7):
        weights = denoiser_weights(tmp_path / "out" / f"checkpoint-{step}")
        decay = 0.0 if step == 1 else 1 - step**-0.6
        expected = {
            name: weight if expected is None else decay * expected[name] + (1 - decay) * weight
            for name, weight in weights.items()
        }
    averaged = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, weight in averaged.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_accumulation_equals_a_larger_batch(image_folder, tmp_path, monkeypatch):
    # Without noise, at one level, a run is a function of the order of the images alone.
    def fixed_level(self, batch_size, generator=None, device=None):
        return train_pet_scheduler.TrainingSigmas(
            sigmas=torch.ones(batch_size), weights=torch.ones(batch_size)
        )

    monkeypatch.setattr(train_pet_scheduler.AdaptiveEDMScheduler, "sample_training_sigmas", fixed_level)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    weights = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        output_dir = tmp_path / str(batch_size)
        train(
            image_folder,
            output_dir,
            train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_train_steps=4,
            label_dropout=0,
            optimizer="adamw",
            adam_epsilon=1e-3,  # Adam's step is the sign of the gradient where it is tiny, rounding included
            **{"no-random_flip": True},
        )
        weights.append(denoiser_weights(output_dir / "checkpoint-4"))
        assert metrics(output_dir)[-1]["images"] == 32
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


def test_every_step_has_the_same_number_of_images(image_folder, tmp_path):
    # 4 batches of 8 an epoch, of which a step takes 3: steps cross the ends of epochs.
    train(image_folder, tmp_path / "out", gradient_accumulation_steps=3, max_train_steps=4)
    images = [record["images"] for record in metrics(tmp_path / "out") if "train/loss" in record]
    assert images == [24, 48, 72, 96]


def test_labels_are_dropped_at_the_stated_rate(image_folder, tmp_path, monkeypatch):
    seen = []
    forward = PetTransformer2DModel.forward

    def counting_forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        if self.training:
            seen.append(class_labels)
        return forward(self, hidden_states, timestep, class_labels, return_dict)

    monkeypatch.setattr(PetTransformer2DModel, "forward", counting_forward)
    train(image_folder, tmp_path / "out", label_dropout=0.3, max_train_steps=60)
    labels = torch.cat(seen)
    rate = (labels == 2).float().mean().item()
    print(f"{rate:.3f} of {len(labels)} labels dropped")
    assert len(labels) == 480 and abs(rate - 0.3) < 4 * (0.3 * 0.7 / 480) ** 0.5
    assert {0, 1, 2} == set(labels.tolist())
