import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from support.oracles import GaussianDenoiser

from pet_pipeline import AdaptiveEDMScheduler


def sample(scheduler, num_steps, model, x=None, labels=None, generator=None):
    """The loop of a diffusers pipeline."""
    scheduler.set_timesteps(num_steps)
    labels = torch.zeros(1, dtype=torch.long) if labels is None else labels
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, timestep)
        output = model(model_input, timestep.expand(len(x)), labels).sample
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("solver", "other_class"), [("euler", EDMEulerScheduler), ("multistep", EDMDPMSolverMultistepScheduler)]
)
def test_equals_the_edm_schedulers_of_diffusers(solver, other_class, sigma_schedule, prediction_type):
    config = {"sigma_schedule": sigma_schedule, "prediction_type": prediction_type}
    ours, other = AdaptiveEDMScheduler(solver=solver, **config), other_class(**config)
    for num_steps in (8, 20):
        ours.set_timesteps(num_steps)
        other.set_timesteps(num_steps)
        torch.testing.assert_close(ours.sigmas, other.sigmas, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours.timesteps, other.timesteps, rtol=1e-4, atol=1e-5)
        generator = torch.Generator().manual_seed(0)
        x = y = torch.randn(2, 3, 8, 8, generator=generator) * 80
        for timestep, other_timestep in zip(ours.timesteps, other.timesteps):
            output = torch.randn(x.shape, generator=generator)
            inputs = ours.scale_model_input(x, timestep), other.scale_model_input(y, other_timestep)
            torch.testing.assert_close(*inputs, rtol=1e-3, atol=1e-4)
            x = ours.step(output, timestep, x).prev_sample
            y = other.step(output, other_timestep, y).prev_sample
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("other_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_from_config_both_ways(other_class):
    ours = AdaptiveEDMScheduler(sigma_max=50.0, rho=5.0)
    other = other_class.from_config(ours.config)
    assert (other.config.sigma_max, other.config.rho) == (50.0, 5.0)
    back = AdaptiveEDMScheduler.from_config(other.config)
    assert (back.config.sigma_max, back.config.rho, back.config.solver) == (50.0, 5.0, "multistep")
    assert {cls.__name__ for cls in ours.compatibles} == {
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    }


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("multistep", 2), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
    model = GaussianDenoiser(std=0.3)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    errors = []
    for num_steps in (20, 40, 80):
        scheduler = AdaptiveEDMScheduler(
            solver=solver,
            sigma_max=10.0,
            sigma_min=0.05,
            final_sigmas_type="sigma_min",
            sigma_schedule="exponential",
        )
        exact = model.solve(x, 10.0, 0.05, torch.tensor([0]))
        errors.append((sample(scheduler, num_steps, model, x) - exact).abs().max().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    print(f"{solver}: errors {errors}, orders {slopes}")
    assert slopes[-1] > order - 0.25


def test_heun_evaluates_twice_a_step_but_the_last():
    scheduler, model = AdaptiveEDMScheduler(solver="heun"), GaussianDenoiser()
    sample(scheduler, 18, model, torch.randn(1, 3, 8, 8) * 80)
    assert model.calls == 35 == len(scheduler.timesteps)
    assert scheduler.order == 2


@pytest.mark.parametrize(("solver", "num_steps"), [("euler", 400), ("heun", 60)])
def test_churn_leaves_the_marginal_right(solver, num_steps):
    # On data whose standard deviation is 0.3, samples have that deviation with and without churn.
    model = GaussianDenoiser(std=0.3)
    for s_churn in (0.0, 40.0):
        generator = torch.Generator().manual_seed(0)
        scheduler = AdaptiveEDMScheduler(solver=solver, s_churn=s_churn)
        scheduler.set_timesteps(num_steps)
        x = torch.randn(20, 3, 8, 8, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
        x = sample(scheduler, num_steps, model, x, torch.zeros(20, dtype=torch.long), generator)
        assert abs(x.std().item() - 0.3) < 0.015
        assert abs(x.mean().item() + 0.5) < 0.03
    other = torch.Generator().manual_seed(1)
    start = torch.randn(1, 3, 8, 8)
    a, b = (sample(scheduler, 10, model, start * 80, generator=g) for g in (None, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_explicit_sigmas_are_used_as_given(as_tensor):
    levels = [40.0, 7.0, 1.0, 0.1]
    scheduler = AdaptiveEDMScheduler()
    scheduler.set_timesteps(sigmas=torch.tensor(levels) if as_tensor else levels)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*levels, 0.0]))
    torch.testing.assert_close((4 * scheduler.timesteps).exp(), torch.tensor(levels))
    assert scheduler.num_inference_steps == 4
    assert scheduler.init_noise_sigma == pytest.approx(math.hypot(40, 0.5))
    scheduler.set_timesteps(sigmas=[*levels, 0.0])
    assert len(scheduler.timesteps) == 4
    for bad in ([1.0, 2.0], [1.0, 1.0], [], [2.0, -1.0], [float("nan")], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="`sigmas`"):
            scheduler.set_timesteps(sigmas=bad)


def test_bad_arguments_are_refused():
    for config in (
        {"sigma_min": 0.0},
        {"sigma_min": 2.0, "sigma_max": 1.0},
        {"sigma_data": -1.0},
        {"solver": "magic"},
        {"prediction_type": "sample"},
        {"s_churn": 1.0},  # with the multistep solver
        {"s_churn": -1.0, "solver": "euler"},
        {"num_bins": 0},
        {"num_bins": 10**12},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": 1000.0},
        {"sigma_max": "80"},
        {"sigma_max": float("inf")},
        {"p_mean": float("nan")},
        {"rho": 1e-300},
        {"adaptive": 1},
        {"adaptive_decay": 1.0},
    ):
        with pytest.raises(ValueError, match=f"`({'|'.join(config)})`"):
            AdaptiveEDMScheduler(**config)
    for steps in (0, -3, None, 2.5):
        with pytest.raises(ValueError, match="`num_inference_steps`"):
            AdaptiveEDMScheduler().set_timesteps(steps)


def test_preconditioning_has_unit_variance_and_inverts():
    scheduler = AdaptiveEDMScheduler(sigma_data=0.5)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(400, 3, 8, 8, generator=generator) * 0.5
    for sigma in (0.002, 0.1, 0.5, 3.0, 80.0):
        sigmas = torch.full((400,), sigma)
        noise = torch.randn(images.shape, generator=generator)
        noisy = scheduler.add_noise(images, noise, scheduler.precondition_noise(sigmas))
        torch.testing.assert_close(noisy, images + sigma * noise, rtol=1e-4, atol=1e-4)
        target = scheduler.training_target(images, noisy, sigmas)
        assert scheduler.precondition_inputs(noisy, sigmas).std().item() == pytest.approx(1, abs=0.01)
        assert target.std().item() == pytest.approx(1, abs=0.01)
        tolerance = 1e-4 * max(1, sigma)
        torch.testing.assert_close(
            scheduler.precondition_outputs(noisy, target, sigmas), images, rtol=0, atol=tolerance
        )


def test_a_timestep_off_the_grid_takes_the_nearest_step():
    scheduler = AdaptiveEDMScheduler(solver="heun")
    scheduler.set_timesteps(10)
    scheduler.scale_model_input(torch.randn(1, 3, 8, 8), scheduler.timesteps[4] + 1e-3)
    assert scheduler.step_index == 4
    assert scheduler.index_for_timestep(100.0) == 0


def test_fixed_draw_follows_the_truncated_log_normal():
    scheduler = AdaptiveEDMScheduler(adaptive=False, p_mean=-1.2, p_std=1.2)
    draw = scheduler.sample_training_sigmas(100_000, torch.Generator().manual_seed(0))
    logs = draw.sigmas.log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert logs.std().item() == pytest.approx(1.2, abs=0.01)
    assert torch.equal(draw.weights, torch.ones(100_000))
    assert draw.sigmas.min() >= 0.002 and draw.sigmas.max() <= 80
    # Truncated, not clamped: what lies outside is not heaped up at the ends.
    scheduler = AdaptiveEDMScheduler(adaptive=False, sigma_min=0.1, sigma_max=1.0)
    sigmas = scheduler.sample_training_sigmas(10_000, torch.Generator().manual_seed(0)).sigmas
    proposal = torch.distributions.Normal(-1.6, 1.4)
    median = proposal.icdf(proposal.cdf(torch.tensor([0.1, 1.0]).log()).mean()).exp()
    assert len(sigmas.unique()) > 9000
    assert sigmas.median().item() == pytest.approx(median.item(), rel=1e-3)


@pytest.mark.parametrize(("p_mean", "p_std"), [(-8.0, 0.3), (7.0, 0.5)])
def test_a_draw_outside_the_range_is_refused(p_mean, p_std):
    scheduler = AdaptiveEDMScheduler(p_mean=p_mean, p_std=p_std)
    with pytest.raises(ValueError, match="Hardly any noise level of the training"):
        scheduler.sample_training_sigmas(4)


def test_each_level_of_a_batch_is_drawn_in_a_stratum_of_its_own():
    scheduler = AdaptiveEDMScheduler(adaptive=False)
    proposal = torch.distributions.Normal(torch.tensor(-1.6).double(), 1.4)
    low, high = proposal.cdf(torch.tensor([0.002, 80.0]).double().log())
    sigmas = scheduler.sample_training_sigmas(1000, torch.Generator().manual_seed(0)).sigmas.double()
    probabilities = (proposal.cdf(sigmas.log()) - low) / (high - low)
    inside = 1000 * probabilities - torch.arange(1000)
    assert inside.min() > -0.01 and inside.max() < 1.01
    # Each is uniform in its stratum and independent of the others.
    assert inside.mean().item() == pytest.approx(0.5, abs=0.03)
    assert inside.std().item() == pytest.approx(12**-0.5, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([inside[1:], inside[:-1]]))[0, 1].item()) < 0.1


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_draws_stay_between_the_smallest_and_largest_level(uniform, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.full((size,), uniform))
    for sigma_max in (1.0, 80.0, 1e6):
        scheduler = AdaptiveEDMScheduler(adaptive=False, sigma_min=1e-6, sigma_max=sigma_max, p_std=0.5)
        sigmas = scheduler.sample_training_sigmas(1).sigmas
        assert 1e-6 * (1 - 1e-6) <= sigmas.item() <= sigma_max * (1 + 1e-6)


def adapted_scheduler(loss, adaptive=True):
    scheduler = AdaptiveEDMScheduler(adaptive=adaptive)
    for step in range(50):
        sigmas = scheduler.sample_training_sigmas(256, torch.Generator().manual_seed(step)).sigmas
        scheduler.update_training_losses(sigmas, loss(sigmas))
    return scheduler


def test_adaptive_draw_is_unbiased_and_lowers_the_variance():
    def loss(sigmas):  # large at low noise alone
        return 0.05 + 5 * torch.exp(-((sigmas.log() + 3.5) ** 2) / 0.1)

    means, deviations = {}, {}
    for adaptive in (False, True):
        scheduler = adapted_scheduler(loss, adaptive)
        estimates = []
        for seed in range(4000):
            # One sample a batch: no stratification, so that the variance is the importance sampling's own.
            draw = scheduler.sample_training_sigmas(1, torch.Generator().manual_seed(seed))
            estimates.append(draw.weights * loss(draw.sigmas))
        estimates = torch.cat(estimates)
        means[adaptive], deviations[adaptive] = estimates.mean().item(), estimates.std().item()
    error = math.hypot(*deviations.values()) / 4000**0.5
    print(
        f"means {means}, standard error {error:.4f}, "
        f"variance ratio {(deviations[True] / deviations[False]) ** 2:.3f}"
    )
    assert abs(means[True] - means[False]) < 3 * error
    assert deviations[True] ** 2 < 0.5 * deviations[False] ** 2

    # A batch is stratified: each bin has its share of it, but for the strata that its ends cut.
    draw = scheduler.sample_training_sigmas(1000, torch.Generator().manual_seed(0))
    proposal = torch.distributions.Normal(-1.6, 1.4)
    low, high = proposal.cdf(torch.tensor([0.002, 80.0]).log())
    bins = ((proposal.cdf(draw.sigmas.log()) - low) / (high - low) * 32).long()
    probabilities = scheduler.bin_probabilities
    assert probabilities.max() > 1.5 * probabilities.min()
    assert (bins.bincount(minlength=32) - 1000 * probabilities).abs().max() < 2
    torch.testing.assert_close(draw.weights, 1 / (32 * probabilities[bins]))


def test_adaptive_probabilities_have_their_formula():
    # p ∝ q/2 + q/2·√E[L²]/mean, with the mean of the others where nothing was seen.
    scheduler = AdaptiveEDMScheduler(num_bins=4)
    scheduler.load_state_dict(
        {
            "bin_square_sums": torch.tensor([18.0, 4.0, 0.0, 2.0]),
            "bin_counts": torch.tensor([2.0, 1.0, 0, 2.0]),
        }
    )
    roots = torch.tensor([3.0, 2.0, 2.0, 1.0])  # of mean squares 9, 4 and 1
    torch.testing.assert_close(scheduler.bin_probabilities, (1 + roots / 2) / 8)

    # Both running sums forget at the same rate.
    scheduler = AdaptiveEDMScheduler(num_bins=1, adaptive_decay=0.5)
    for loss in (4.0, 2.0):
        scheduler.update_training_losses(torch.ones(1), torch.tensor([loss]))
    state = scheduler.state_dict()
    assert state["bin_square_sums"].tolist() == [0.5 * 4**2 + 2**2] and state["bin_counts"].tolist() == [1.5]

    scheduler = adapted_scheduler(lambda sigmas: torch.where(sigmas < 0.3, 3.0, 1.0))
    probabilities = scheduler.bin_probabilities
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert (probabilities[0] / probabilities[-1]).item() > 1.3
    state = scheduler.state_dict()
    restored = AdaptiveEDMScheduler()
    restored.load_state_dict(state)
    assert torch.equal(restored.bin_probabilities, probabilities)
    with pytest.raises(ValueError, match="num_bins"):
        AdaptiveEDMScheduler(num_bins=8).load_state_dict(state)


def test_churn_acts_between_its_bounds():
    plain = AdaptiveEDMScheduler(solver="euler")
    plain.set_timesteps(18)
    inside = (plain.sigmas >= 0.05) & (plain.sigmas <= 5)
    assert 3 < inside.sum() < 15
    for s_churn, factor in ((4.5, 1.25), (1e3, 2**0.5)):  # 1 + s_churn / 18, at most √2
        churned = AdaptiveEDMScheduler(solver="euler", s_churn=s_churn, s_tmin=0.05, s_tmax=5.0)
        churned.set_timesteps(18)
        torch.testing.assert_close(churned.sigmas, torch.where(inside, plain.sigmas * factor, plain.sigmas))


def test_churn_noise_has_its_scale():
    sample, output = torch.randn(2, 1, 3, 8, 8).unbind()
    steps = []
    for s_noise in (0.5, 1.0, 1.5):
        scheduler = AdaptiveEDMScheduler(solver="euler", s_churn=5.0, s_noise=s_noise)
        scheduler.set_timesteps(18)
        scheduler.set_begin_index(5)
        generator = torch.Generator().manual_seed(0)
        steps.append(scheduler.step(output, scheduler.timesteps[5], sample, generator=generator).prev_sample)
    torch.testing.assert_close(steps[1] - steps[0], steps[2] - steps[1])
    assert (steps[1] - steps[0]).std() > 0.1


def test_config_round_trip(tmp_path):
    scheduler = AdaptiveEDMScheduler(solver="heun", s_churn=10.0, p_mean=-0.8)
    scheduler.save_pretrained(tmp_path)
    loaded = AdaptiveEDMScheduler.from_pretrained(tmp_path)
    for name in ("solver", "s_churn", "p_mean", "rho", "num_bins"):
        assert loaded.config[name] == scheduler.config[name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_keep_their_dtype(dtype):
    scheduler = AdaptiveEDMScheduler()
    scheduler.set_timesteps(4)
    x, noise = torch.randn(2, 2, 3, 8, 8).to(dtype).unbind(0)
    for timestep in (scheduler.timesteps[1], scheduler.timesteps[:2]):
        assert scheduler.add_noise(x, noise, timestep).dtype == dtype
    assert scheduler.precondition_inputs(x, torch.tensor([1.0, 2.0])).dtype == dtype
    for timestep in scheduler.timesteps:
        output = scheduler.step(scheduler.scale_model_input(x, timestep), timestep, x)
        assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert not scheduler._previous  # nothing is kept after the last step


def test_extreme_losses_do_not_spoil_the_draw():
    scheduler = AdaptiveEDMScheduler()
    sigmas = scheduler.sample_training_sigmas(6).sigmas
    extreme = [float("nan"), float("inf"), -float("inf"), 1e30, 1.8e19, 1e19]
    for _ in range(1000):
        scheduler.update_training_losses(sigmas, torch.tensor(extreme))
        scheduler.update_training_losses(sigmas, torch.ones(6))
    assert scheduler._bin_square_sums.isfinite().all()
    torch.testing.assert_close(scheduler.bin_probabilities, torch.full((32,), 1 / 32))
