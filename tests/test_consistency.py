"""Tuning to few steps: the boundary, the solver, the objective against exact solutions, and the training."""

import shutil

import pytest
import torch
from conftest import FLAT, random_model
from safetensors.torch import load_file
from support.oracles import EmpiricalDenoiser, GaussianDenoiser, generators, oracle_pipeline
from support.training_process import metrics, train

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.training.consistency import ConsistencyTeacher, consistency_weights, lower_levels
from pet_pipeline.training.options import parse_args


class ExactSolution(GaussianDenoiser):
    """The student that has learned everything: the exact solution of the ODE from any noise level to 0."""

    def denoise(self, x, sigma, class_labels):
        return self.solve(x, sigma, 0.0, class_labels)


def tune(student, teacher, num_steps, batch_size=64, learning_rate=3e-3):
    """Tunes a student as the training script does, on images that the teacher draws from its own data."""
    scheduler = AdaptiveEDMScheduler(solver="consistency", adaptive=False, p_mean=-1.1, p_std=2.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(0)
    model = teacher.pipeline.transformer
    for _ in range(num_steps):
        labels = torch.randint(0, 2, (batch_size,), generator=generator)
        images = model.draw(labels, generator)
        sigmas = scheduler.sample_training_sigmas(batch_size, generator).sigmas
        noise = torch.randn(images.shape, generator=generator)
        noisy_images = images + sigmas.reshape(-1, 1, 1, 1) * noise
        found = teacher.target(student, scheduler, noisy_images, labels, sigmas)
        target = scheduler.training_target(found, noisy_images, sigmas)
        model_input = scheduler.precondition_inputs(noisy_images, sigmas)
        output = student(model_input, scheduler.precondition_noise(sigmas), labels, return_dict=False)[0]
        errors = (output - target).square().mean((1, 2, 3))
        (errors * consistency_weights(sigmas, 0.5)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    tuned = PetDiffusionPipeline(student, scheduler, guidance_scale=1.0, num_inference_steps=2)
    tuned.set_progress_bar_config(disable=True)
    return tuned


class DrawnImages(EmpiricalDenoiser):
    def draw(self, labels, generator):
        number = len(self.data) // 2
        chosen = torch.randint(0, number, (len(labels),), generator=generator)
        return self.data[2 * chosen + labels].float()


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


def test_the_solver_denoises_completely_and_adds_fresh_noise():
    scheduler = AdaptiveEDMScheduler(solver="consistency")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[0] == 80 and scheduler.sigmas[-1] == 0
    torch.testing.assert_close(scheduler.sigmas[3], torch.tensor(0.8))
    scheduler.set_timesteps(sigmas=[50.0, 3.0])
    sample, output = torch.randn(2, 3, 8, 8) * 50, torch.randn(2, 3, 8, 8)
    first = scheduler.step(output, scheduler.timesteps[0], sample, generators(1, 2))
    noise = torch.cat([torch.randn(1, 3, 8, 8, generator=each) for each in generators(1, 2)])
    torch.testing.assert_close(first.prev_sample, first.pred_original_sample + 3 * noise)
    last = scheduler.step(output, scheduler.timesteps[1], first.prev_sample)
    torch.testing.assert_close(last.prev_sample, last.pred_original_sample)


@pytest.mark.parametrize(
    "config",
    [{"s_churn": 1.0}, {"final_sigmas_type": "sigma_min"}, {"consistency_sigma_min": 80.0}],
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
    for guidance in ({"guidance_scale": 2.0}, {"pag_scale": 1.0}):
        with pytest.raises(ValueError, match="draws without guidance"):
            tuned(0, **guidance)
    for number in (0, 2.5):
        with pytest.raises(ValueError, match="`num_inference_steps` must be a positive integer"):
            PetDiffusionPipeline(model, scheduler, num_inference_steps=number)


# The objective


def test_levels_are_close_where_the_noise_is_high():
    sigmas = torch.tensor([1e-3, 0.5, 80.0])
    lower = lower_levels(sigmas)
    torch.testing.assert_close(1 - lower / sigmas, torch.tensor([5.0, 4.0203, 1.0]) / 256, rtol=1e-3, atol=0)


def test_weights_are_those_of_the_error_of_the_image():
    scheduler, sigmas = AdaptiveEDMScheduler(), torch.tensor([0.1, 0.5, 20.0])
    noisy_images, output, error = torch.randn(3, 3, 3, 8, 8).unbind()
    images = scheduler.precondition_outputs(noisy_images, output, sigmas)
    other = scheduler.precondition_outputs(noisy_images, output + error, sigmas)
    of_images = (other - images).square().mean((1, 2, 3)) / (sigmas - lower_levels(sigmas))
    of_outputs = error.square().mean((1, 2, 3)) * consistency_weights(sigmas, 0.5)
    torch.testing.assert_close(of_images, of_outputs, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 2.5}, {"autoguidance_scale": 1.5}, {"pag_scale": 1.0}]
)
def test_guidance_of_images_at_several_noise_levels_is_that_of_each(pipeline, options):
    pipeline = PetDiffusionPipeline(
        pipeline.transformer, pipeline.scheduler, guide=random_model(1), **{"guidance_scale": 1.0, **options}
    )
    pipeline.set_guidance()
    sigmas = [20.0, 1.0, 0.1, 0.01]
    model_input, timesteps = torch.randn(4, 3, 8, 8), torch.tensor(sigmas).log() / 4
    labels, null_labels = torch.tensor([0, 1, 0, 1]), torch.full((4,), 2)
    inputs = (model_input, timesteps, labels, null_labels)
    with torch.no_grad():
        together = pipeline.guided_output(*inputs, sigmas)
        for row, sigma in enumerate(sigmas):
            alone = pipeline.guided_output(*(each[row : row + 1] for each in inputs), [sigma])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        plain = pipeline.transformer(model_input, timesteps, labels).sample
    is_guided = [(together[row] - plain[row]).abs().max() > 1e-4 for row in range(4)]
    assert is_guided == [False, True, True, False]


def test_the_exact_solution_for_a_gaussian_is_where_tuning_ends():
    model, solution = GaussianDenoiser(std=0.3), ExactSolution(std=0.3)
    teacher, scheduler = ConsistencyTeacher(oracle_pipeline(model)), AdaptiveEDMScheduler()
    teacher.pipeline.set_guidance(guidance_scale=1.0)
    generator = torch.Generator().manual_seed(0)
    sigmas, labels = torch.tensor([0.01, 0.1, 0.3, 1.0, 10.0, 80.0]), torch.arange(6) % 2
    noise = torch.randn(6, 3, 8, 8, generator=generator)
    noisy_images = model.mean(labels).float() + sigmas.reshape(-1, 1, 1, 1) * noise

    def error(student):
        target = teacher.target(student, scheduler, noisy_images, labels, sigmas)
        model_input = scheduler.precondition_inputs(noisy_images, sigmas)
        output = student(model_input, scheduler.precondition_noise(sigmas), labels).sample
        images = scheduler.precondition_outputs(noisy_images, output, sigmas)
        return (images - target).square().mean((1, 2, 3)).sqrt()

    of_solution, of_teacher = error(solution), error(model)
    print(f"error of the solution {of_solution}, of the teacher {of_teacher}")
    assert (of_solution[1:5] < of_teacher[1:5] / 50).all()

    tuned = PetDiffusionPipeline(
        solution, AdaptiveEDMScheduler(solver="consistency"), guidance_scale=1.0, num_inference_steps=2
    )
    tuned.set_progress_bar_config(disable=True)
    for num_steps in (1, 2, 4):  # every number of steps draws from the Gaussian
        images = tuned([0] * 50, num_steps, generator=generator, output_type="latent").images
        assert images.mean().item() == pytest.approx(-0.5, abs=0.01)
        assert images.std().item() == pytest.approx(0.3, abs=0.01)


def test_a_student_agrees_with_the_long_solver_on_a_few_images():
    model = DrawnImages(num_images=4)
    teacher = ConsistencyTeacher(oracle_pipeline(model))
    teacher.pipeline.set_guidance(guidance_scale=1.0)
    tuned = tune(random_model(), teacher, num_steps=400)
    distance = teacher.distance(tuned)
    print(f"distance {distance:.4f}")
    assert distance < 0.25


# The training


def tuning(**options):
    defaults = {"objective": "consistency", "model_config": None, "max_train_steps": 2, "validation_steps": 2}
    return {**defaults, "checkpointing_steps": 1, **options}


def test_tuning_a_saved_pipeline(finished_run, image_folder, tmp_path):
    before = load_file(finished_run / "transformer" / "diffusion_pytorch_model.safetensors")
    options = tuning(pretrained_model_name_or_path=finished_run)
    train(image_folder, tmp_path / "whole", checkpoints_total_limit=5, **options)
    tuned = PetDiffusionPipeline.from_pretrained(tmp_path / "whole")
    tuned.set_progress_bar_config(disable=True)
    assert tuned.scheduler.config.solver == "consistency" and tuned.config.guidance_scale == 1
    tuned("cat")
    assert tuned.num_timesteps == 2
    after = tuned.transformer.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    teacher = ConsistencyTeacher(PetDiffusionPipeline.from_pretrained(finished_run))
    records = [record for record in metrics(tmp_path / "whole") if "validation/loss" in record]
    assert records[-1]["validation/loss"] == pytest.approx(teacher.distance(tuned), rel=1e-5)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| objective | consistency tuning" in card and "RMS distance" in card

    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    train(image_folder, tmp_path / "parts", resume_from_checkpoint="latest", **options)
    resumed = load_file(tmp_path / "parts" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(resumed[name], after[name]) for name in after)


def test_what_tuning_cannot_do_is_one_error(finished_run, image_folder, tmp_path, capsys):
    for words, message in (
        ([], "requires --pretrained_model_name_or_path"),
        (["--pretrained_model_name_or_path", "x", "--label_dropout", "0.1"], "--label_dropout must be 0"),
    ):
        with pytest.raises(SystemExit):
            parse_args(["--max_train_steps", "1", "--objective", "consistency", *words])
        assert message in capsys.readouterr().err
    options = tuning(pretrained_model_name_or_path=finished_run, classes=["dog", "cat"])
    with pytest.raises(ValueError, match="must be those of its teacher"):
        train(image_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
