"""Tuning to few steps: the boundary, the solver, the objective against exact solutions, and the training."""

import json
import shutil

import pytest
import torch
from conftest import FLAT, random_model
from diffusers import ClassifierFreeGuidance, EDMEulerScheduler
from safetensors.torch import load_file
from support.features import Pixels
from support.oracles import EmpiricalDenoiser, GaussianDenoiser, generators
from support.training_process import metrics, train

from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.evaluation.metrics import FEATURE_EXTRACTORS
from pet_pipeline.training import results
from pet_pipeline.training.consistency import ConsistencyTeacher
from pet_pipeline.training.options import parse_args


class ExactSolution(GaussianDenoiser):
    """The student that has learned everything: the exact solution of the ODE from any noise level to 0."""

    def denoise(self, x, sigma, class_labels):
        return self.solve(x, sigma, 0.0, class_labels)


LORA_FILE = "pytorch_lora_weights.safetensors"


# The boundary and the solver


@pytest.mark.parametrize("kind", [{}, FLAT, {"frequency_variances": [0.3] * 12}])
def test_the_denoised_image_is_the_image_where_there_is_no_noise(kind):
    model, scheduler = random_model(**kind), AdaptiveEDMScheduler()
    images, labels = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([0, 1])

    def denoise(sigma):
        timesteps = scheduler.precondition_noise(torch.full((2,), sigma))
        output = model(scheduler.precondition_inputs(images, sigma), timesteps, labels).sample
        return scheduler.precondition_outputs(images, output, sigma)

    with torch.no_grad():
        assert torch.equal(denoise(1e-12), images)
        assert not torch.equal(denoise(1e-2), images)


def test_the_steps_take_the_most_important_levels():
    scheduler = AdaptiveEDMScheduler(solver="consistency", consistency_sigmas=[0.8, 0.1, 10])
    for num_steps, levels in {
        1: [80, 0],
        2: [80, 0.8, 0],
        3: [80, 0.8, 0.1, 0],
        4: [80, 10, 0.8, 0.1, 0],
    }.items():
        scheduler.set_timesteps(num_steps)
        torch.testing.assert_close(scheduler.sigmas, torch.tensor(levels, dtype=torch.float32))
    with pytest.raises(ValueError, match="at most 4 steps, not 5"):
        scheduler.set_timesteps(5)


def test_the_solver_denoises_completely_and_adds_fresh_noise():
    scheduler = AdaptiveEDMScheduler(solver="consistency")
    scheduler.set_timesteps(sigmas=[50.0, 3.0])
    sample, output = torch.randn(2, 3, 8, 8) * 50, torch.randn(2, 3, 8, 8)
    first = scheduler.step(output, scheduler.timesteps[0], sample, generators(1, 2))
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=each) for each in generators(1, 2)])
    torch.testing.assert_close(first.prev_sample, first.pred_original_sample + 3 * noise)
    last = scheduler.step(output, scheduler.timesteps[1], first.prev_sample)
    torch.testing.assert_close(last.prev_sample, last.pred_original_sample)


def test_an_edit_takes_all_levels_below_the_one_where_another_solver_begins(model):
    image = torch.zeros(3, 8, 8)
    tuned = PetDiffusionPipeline(model, AdaptiveEDMScheduler(solver="consistency"), guidance_scale=1.0)
    other = PetDiffusionPipeline(model, AdaptiveEDMScheduler(), guidance_scale=1.0)
    for strength in (0.3, 0.5, 0.75):
        other.prepare_timesteps(1001, image=image, strength=strength)
        start = other.scheduler.sigmas[1001 - int(1001 * strength)].item()
        timesteps, first = tuned.prepare_timesteps(3, image=image, strength=strength)
        sigmas = tuned.scheduler.sigmas.tolist()
        assert first == 0 and len(timesteps) == len(sigmas) - 1
        assert sigmas[0] == pytest.approx(start, rel=0.03)
        assert sigmas[1:-1] == pytest.approx([level for level in (0.8, 0.14) if level < start])
    tuned(0, 3, image=image, strength=0.01)  # less noise than the last level has
    assert tuned.num_timesteps == 1
    tuned(0, image=image, strength=0.5, sigmas=[80.0, 0.8, 0.2, 0.1])
    assert tuned.num_timesteps == 2


@pytest.mark.parametrize(
    "config",
    [
        {"s_churn": 1.0},
        {"final_sigmas_type": "sigma_min"},
        {"consistency_sigmas": [0.8, 80.0]},
        {"consistency_sigmas": 0.8},
        {"consistency_sigmas": [0.8, "x"]},
    ],
)
def test_what_the_solver_cannot_use_is_refused(config):
    with pytest.raises(ValueError, match=f"`{next(iter(config))}`"):
        AdaptiveEDMScheduler(solver="consistency", **config)


def test_a_tuned_pipeline_takes_its_own_steps_and_no_guidance(model):
    scheduler = AdaptiveEDMScheduler(solver="consistency")
    tuned = PetDiffusionPipeline(model, scheduler, guidance_scale=1.0, num_inference_steps=2)
    images = [tuned([0, 1], generator=generators(5, 6), output_type="pt").images for _ in range(2)]
    assert tuned.num_timesteps == 2 and torch.equal(*images)
    alone = tuned(1, generator=generators(6), output_type="pt").images
    torch.testing.assert_close(alone[0], images[0][1])
    guided = PetDiffusionPipeline.from_pipe(tuned, guide=random_model(1))
    for pipe, guidance in (
        (tuned, {"guidance_scale": 2.0}),
        (tuned, {"pag_scale": 1.0}),
        (guided, {"autoguidance_scale": 2.0}),
        (PetDiffusionPipeline.from_pipe(tuned, guider=ClassifierFreeGuidance()), {}),
    ):
        with pytest.raises(ValueError, match="draws without guidance"):
            pipe(0, **guidance)
    # Another solver may be guided, although its scheduler keeps the settings of the first.
    euler = EDMEulerScheduler.from_config(scheduler.config)
    PetDiffusionPipeline.from_pipe(tuned, scheduler=euler)(0, guidance_scale=2.0)
    for number, message in ((0, "a positive integer"), (2.5, "a positive integer"), (10**12, "at most 1000")):
        with pytest.raises(ValueError, match=f"`num_inference_steps` must be {message}"):
            PetDiffusionPipeline(model, scheduler, num_inference_steps=number)
    with pytest.raises(ValueError, match="no longer tell classes apart"):
        PetClassificationPipeline.from_pipe(tuned)(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="was not tuned"):
        ConsistencyTeacher(tuned)


# The objective


def oracle_teacher(model) -> ConsistencyTeacher:
    return ConsistencyTeacher(PetDiffusionPipeline(model, AdaptiveEDMScheduler(), guidance_scale=1.0))


def test_the_exact_solution_for_a_gaussian_is_what_is_learned():
    model = GaussianDenoiser(std=0.3)
    images, labels = torch.zeros(32, 3, 8, 8), torch.arange(32) % 2
    noisy_images, labels, sigmas, targets = oracle_teacher(model).trajectories(images, labels)
    assert labels.tolist() == [0, 1, 0, 1] * 8 and len(noisy_images) == len(targets) == 32
    levels = sigmas.reshape(8, 4)
    assert (levels == levels[:, :1]).all() and (levels[:, 0].diff() < 0).all() and levels[0, 0] == 80
    assert torch.equal(targets[:4], targets[28:])
    exact = model.solve(noisy_images.double(), sigmas.double().reshape(-1, 1, 1, 1), 0.0, labels)
    error = (exact.clamp(-1, 1) - targets).square().mean().sqrt().item()
    print(f"error of the teacher's 13 steps {error:.4f}, deviation of the data {targets.std():.4f}")
    assert error < 0.06
    other = model.denoise(noisy_images.double(), sigmas.double().reshape(-1, 1, 1, 1), labels)
    assert (other - targets).square().mean().sqrt().item() > 3 * error  # the denoiser is another function


def test_levels_vary_and_stay_in_order():
    teacher = oracle_teacher(GaussianDenoiser())
    teacher.pipeline.scheduler = AdaptiveEDMScheduler(sigma_min=0.5, sigma_max=2.0, rho=1.0)
    drawn = {
        tuple(teacher.trajectories(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))[2].tolist())
        for _ in range(20)
    }
    assert len(drawn) == 20 and {levels[0] for levels in drawn} == {
        2.0
    }  # the starting point is always learned
    assert all(list(levels) == sorted(levels, reverse=True) for levels in drawn)


def test_the_teacher_is_guided(pipeline):
    images, labels = torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)
    ends = []
    for guidance_scale in (1.0, 4.0):
        teacher = ConsistencyTeacher(PetDiffusionPipeline.from_pipe(pipeline, guidance_scale=guidance_scale))
        torch.manual_seed(0)
        ends.append(teacher.trajectories(images, labels)[3])
    assert (ends[0] - ends[1]).abs().mean() > 1e-3


def test_a_pipeline_that_solves_the_ode_draws_from_the_data_in_any_number_of_steps():
    tuned = PetDiffusionPipeline(
        ExactSolution(std=0.3),
        AdaptiveEDMScheduler(solver="consistency"),
        guidance_scale=1.0,
        num_inference_steps=2,
    )
    tuned.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for num_steps in (1, 2, 4):
        images = tuned([0] * 50, num_steps, generator=generator, output_type="latent").images
        assert images.mean().item() == pytest.approx(-0.5, abs=0.01)
        assert images.std().item() == pytest.approx(0.3, abs=0.01)
    # A single step is the teacher's image of the same noise, as far as its solver is exact.
    assert oracle_teacher(GaussianDenoiser(std=0.3)).distance(tuned) < 0.03


def test_a_student_learns_the_images_of_its_teacher():
    # Four images, two of each class: the student learns which noise leads to which.
    teacher, scheduler = oracle_teacher(EmpiricalDenoiser(num_images=4)), AdaptiveEDMScheduler()
    student = random_model()
    solver = AdaptiveEDMScheduler(solver="consistency")
    tuned = PetDiffusionPipeline(student, solver, guidance_scale=1.0)
    tuned.set_progress_bar_config(disable=True)
    before = teacher.distance(tuned)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(150):
        batch = teacher.trajectories(torch.zeros(64, 3, 8, 8), torch.arange(64) % 2)
        noisy_images, labels, sigmas, images = batch
        target = scheduler.training_target(images, noisy_images, sigmas)
        model_input = scheduler.precondition_inputs(noisy_images, sigmas)
        output = student(model_input, scheduler.precondition_noise(sigmas), labels).sample
        (output - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = teacher.distance(tuned)
    print(f"distance to the teacher {before:.3f} before and {after:.3f} after")
    assert after < 0.8 * before


# The training


def tuning(**options):
    defaults = {"objective": "consistency", "model_config": None, "max_train_steps": 2, "validation_steps": 2}
    return {**defaults, "checkpointing_steps": 1, **options}


def test_tuning_a_saved_pipeline(finished_run, image_folder, tmp_path, monkeypatch):
    before = load_file(finished_run / "transformer" / "diffusion_pytorch_model.safetensors")
    options = tuning(pretrained_model_name_or_path=finished_run)
    train(image_folder, tmp_path / "whole", checkpoints_total_limit=5, preview_images=1, **options)
    tuned = PetDiffusionPipeline.from_pretrained(tmp_path / "whole")
    tuned.set_progress_bar_config(disable=True)
    assert tuned.scheduler.config.solver == "consistency" and tuned.config.guidance_scale == 1
    tuned("cat")
    assert tuned.num_timesteps == 2
    after = tuned.transformer.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    teacher = ConsistencyTeacher(PetDiffusionPipeline.from_pretrained(finished_run))
    records = [record for record in metrics(tmp_path / "whole") if "validation/teacher_distance" in record]
    assert records[-1]["validation/teacher_distance"] == pytest.approx(teacher.distance(tuned), rel=1e-5)
    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    words = ["evaluate", str(tmp_path / "whole"), "--reference", str(image_folder), "--num_images", "8"]
    assert main([*words, "--out", str(tmp_path / "measured")]) == 0
    record = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert record["settings"]["num_inference_steps"] == 2 and record["evaluations_per_image"] == 2
    assert "validation_loss" not in record["measures"]  # which is that of a denoiser
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| objective | consistency tuning" in card and "RMS distance" in card

    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    monkeypatch.setattr(results, "NUM_EVALUATED", 4)
    train(image_folder, tmp_path / "parts", resume_from_checkpoint="latest", evaluation_steps=1, **options)
    assert [record["step"] for record in metrics(tmp_path / "parts") if "validation/kid" in record] == [1, 2]
    resumed = load_file(tmp_path / "parts" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(resumed[name], after[name]) for name in after)


def test_what_tuning_cannot_do_is_one_error(finished_run, image_folder, tmp_path, capsys):
    for words, message in (
        ([], "requires --pretrained_model_name_or_path"),
        (["--pretrained_model_name_or_path", "x", "--label_dropout", "0.1"], "--label_dropout must be 0"),
        (["--pretrained_model_name_or_path", "x", "--train_batch_size", "12"], "must be a multiple of 8"),
        (["--pretrained_model_name_or_path", "x", "--p_mean", "-1"], "--p_mean has no effect"),
    ):
        with pytest.raises(SystemExit):
            parse_args(["--max_train_steps", "1", "--objective", "consistency", *words])
        assert message in capsys.readouterr().err
    options = tuning(pretrained_model_name_or_path=finished_run, classes=["dog", "cat"])
    with pytest.raises(ValueError, match="must be those of its teacher"):
        train(image_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_churn_augmentation_and_a_low_sigma_max_on_few_images(image_folder, tmp_path):
    teacher = PetDiffusionPipeline(
        random_model(0, augment_dim=6),
        AdaptiveEDMScheduler(
            solver="heun",
            s_churn=10.0,
            final_sigmas_type="sigma_min",
            sigma_max=8.0,
            consistency_sigmas=[0.7, 0.2, 10.0],
        ),
        id2label={0: "cat", 1: "dog"},
    )
    teacher.save_pretrained(tmp_path / "teacher")
    options = tuning(pretrained_model_name_or_path=tmp_path / "teacher", train_batch_size=64)
    train(image_folder, tmp_path / "out", **options)  # a batch is all 36 images, and 32 of its trajectories
    config = PetDiffusionPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert (config.solver, config.s_churn, config.final_sigmas_type) == ("consistency", 0.0, "zero")
    assert tuple(config.consistency_sigmas) == (0.7, 0.2)


def test_low_rank_updates(finished_run, image_folder, tmp_path):
    before = load_file(finished_run / "transformer" / "diffusion_pytorch_model.safetensors")
    options = tuning(pretrained_model_name_or_path=finished_run, lora_rank=2)
    train(image_folder, tmp_path / "out", **options)
    tuned = PetDiffusionPipeline.from_pretrained(tmp_path / "out")  # with the updates in its weights
    after, updates = tuned.transformer.state_dict(), load_file(tmp_path / "out" / "lora" / LORA_FILE)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name.replace("lora_A.", "") for name in updates if "lora_A" in name}
    for name in changed:
        up, down = (updates[name.replace("weight", f"lora_{letter}.weight")] for letter in "BA")
        torch.testing.assert_close(after[name], before[name] + up @ down)

    # A tuned pipeline can learn something else, and then draws in many steps again.
    options = {"pretrained_model_name_or_path": tmp_path / "out", "model_config": None, "max_train_steps": 1}
    train(image_folder, tmp_path / "more", lora_rank=1, **options)
    more = PetDiffusionPipeline.from_pretrained(tmp_path / "more")
    assert not more.is_tuned and more.config.num_inference_steps == 18

    # They change no embedding, which a new class needs.
    other = PetDiffusionPipeline.from_pretrained(tmp_path / "more", id2label={0: "cat", 1: "bird"})
    other.save_pretrained(tmp_path / "bird")
    options["pretrained_model_name_or_path"] = tmp_path / "bird"
    with pytest.raises(ValueError, match="cannot learn the new class dog"):
        train(image_folder, tmp_path / "none", lora_rank=1, **options)
    assert not (tmp_path / "none").exists()
