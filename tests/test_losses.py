import pytest
import torch

from pet_pipeline import BalancedAdaptiveLoss
from pet_pipeline.training.losses import (
    PRESETS,
    image_derivatives,
    output_terms,
)


def random_batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    output, target = torch.randn(2, size, 3, 16, 16, generator=generator).unbind(0)
    return {"model_output": output, "target": target, "sigmas": torch.logspace(-2, 1.5, size)}


def test_every_quadratic_term_is_one_on_white_noise():
    batch = random_batch(400)
    batch["model_output"] = batch["target"] + torch.randn(
        400, 3, 16, 16, generator=torch.Generator().manual_seed(9)
    )
    terms = BalancedAdaptiveLoss()(**batch).terms
    print({name: round(term.item(), 3) for name, term in terms.items()})
    assert terms["mse"].item() == pytest.approx(1, abs=0.01)
    # The kernels' energies are 20 and 24; reflected borders see some pixels twice, which at 16×16 makes them
    # 20.5 and 21.875.
    assert terms["high_frequency"].item() == pytest.approx(20.5 / 20, abs=0.02)
    assert terms["edge"].item() == pytest.approx(21.875 / 24, abs=0.02)


def test_terms_of_known_errors():
    target = random_batch()["target"]
    terms = output_terms(-target, target, 0.1)
    torch.testing.assert_close(terms["cosine"], torch.full((6,), 2.0))
    torch.testing.assert_close(terms["mse"], 4 * target.square().mean((1, 2, 3)))
    torch.testing.assert_close(terms["l1"], ((4 * target.square() + 0.01).sqrt() - 0.1).mean((1, 2, 3)))
    # An error of a checkerboard of ±0.3 has Laplacians of ±8·0.3. One of a ramp of 0.1 a column has a Sobel
    # derivative of 0.8, except at its two reflected borders.
    columns = torch.arange(16)
    grey, ramp = torch.zeros(1, 3, 16, 16), (0.1 * columns).expand(1, 3, 16, 16)
    board = (0.3 - 0.6 * ((columns + columns[:, None]) % 2)).expand(1, 3, 16, 16)
    assert output_terms(board, grey, 0.1)["high_frequency"].item() == pytest.approx(2.4**2 / 20, rel=1e-5)
    assert output_terms(ramp, grey, 0.1)["edge"].item() == pytest.approx(0.8**2 * 14 / 16 / 24, rel=1e-5)


def test_derivatives_of_known_images():
    ramp = torch.arange(8.0).expand(1, 2, 8, 8)
    laplacian, sobel_x, sobel_y = image_derivatives(ramp)
    inside = (..., slice(1, -1), slice(1, -1))
    assert laplacian[inside].abs().max() == 0
    assert (sobel_x[inside] == 8).all() and sobel_y.abs().max() == 0
    assert torch.equal(image_derivatives(ramp.transpose(-1, -2))[2], sobel_x.transpose(-1, -2))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_perfect_prediction_has_no_error_and_gradients_are_finite_at_zero(preset):
    loss_function = BalancedAdaptiveLoss(preset, learned_weighting=False)
    batch = random_batch()
    perfect = {**batch, "model_output": batch["target"]}
    assert loss_function(**perfect).loss.item() == pytest.approx(0, abs=1e-5)
    # The untrained network's output is zero everywhere.
    zero = torch.zeros_like(batch["target"], requires_grad=True)
    loss_function(**{**batch, "model_output": zero}).loss.backward()
    assert zero.grad.isfinite().all() and zero.grad.abs().max() > 0
    assert zero.grad.abs().max() < 1


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_samples_loss_does_not_depend_on_its_batch(preset):
    loss_function = BalancedAdaptiveLoss(preset)
    torch.nn.init.normal_(loss_function.logvar.weight, std=0.1)
    batch = random_batch()
    together = loss_function(**batch).sample_losses
    alone = [loss_function(**{k: v[i : i + 1] for k, v in batch.items()}).sample_losses for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_mse_is_plain_edm_and_balanced_tends_to_it_at_high_noise():
    batch = random_batch()
    expected = (batch["model_output"] - batch["target"]).square().mean((1, 2, 3))
    mse = BalancedAdaptiveLoss("mse", learned_weighting=False)(**batch)
    torch.testing.assert_close(mse.sample_losses, expected)
    torch.testing.assert_close(mse.loss, expected.mean())
    batch["sigmas"] = torch.full((6,), 80.0)
    balanced = BalancedAdaptiveLoss("balanced", learned_weighting=False)(**batch)
    torch.testing.assert_close(balanced.sample_losses, expected, rtol=1e-3, atol=0)
    batch["sigmas"] = torch.full((6,), 0.01)
    low = BalancedAdaptiveLoss("balanced", learned_weighting=False)(**batch)
    assert ((low.sample_losses - expected).abs() > 0.01).all()


def test_the_gate_fades_all_terms_but_the_first():
    batch = random_batch()
    terms = output_terms(batch["model_output"], batch["target"], 0.1)
    gate = 0.25 / (batch["sigmas"] ** 2 + 0.25)
    gated = 0.15 * terms["l1"] + 0.1 * terms["cosine"] + 0.1 * terms["high_frequency"] + 0.15 * terms["edge"]
    expected = (0.5 * terms["mse"] + gate * gated) / (0.5 + gate * 0.5)
    loss_function = BalancedAdaptiveLoss("balanced", learned_weighting=False)
    torch.testing.assert_close(loss_function(**batch).sample_losses, expected)


def test_importance_weights_and_learned_weighting_enter_the_objective():
    loss_function = BalancedAdaptiveLoss("mse")
    torch.nn.init.constant_(loss_function.logvar.bias, 0.7)
    batch, weights = random_batch(), torch.arange(6.0)
    result = loss_function(**batch, weights=weights)
    errors = (batch["model_output"] - batch["target"]).square().mean((1, 2, 3))
    s = torch.tensor(0.7)
    torch.testing.assert_close(result.loss, (weights * (errors * (-s).exp() + s)).mean())
    torch.testing.assert_close(result.sample_losses, errors * (-s).exp())
    result.loss.backward()
    assert loss_function.logvar.weight.grad.abs().max() > 0
    assert set(result.terms) == set(PRESETS["balanced"])
    torch.testing.assert_close(result.terms["mse"], (weights * errors).mean())


def test_learned_weighting_settles_at_the_log_of_the_loss():
    loss_function = BalancedAdaptiveLoss("mse")
    optimizer = torch.optim.Adam(loss_function.parameters(), lr=0.02)
    batch = random_batch()
    scale = torch.linspace(0.2, 2, 6).view(-1, 1, 1, 1)
    batch["model_output"] = batch["target"] + scale * torch.randn_like(batch["target"])
    for _ in range(300):
        optimizer.zero_grad()
        loss_function(**batch).loss.backward()
        optimizer.step()
    torch.testing.assert_close(loss_function(**batch).sample_losses, torch.ones(6), rtol=0.02, atol=0.02)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="balanced, mse"):
        BalancedAdaptiveLoss("perceptual")


def minimizer(preset, targets, sigma):
    """The constant network output that minimises the loss over all targets, by gradient descent."""
    loss_function = BalancedAdaptiveLoss(preset, learned_weighting=False)
    output = targets.mean(0, keepdim=True).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([output], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        repeated = output.expand_as(targets)
        loss = loss_function(repeated, targets, torch.full((len(targets),), sigma)).loss
        loss.backward()
        return loss

    with torch.no_grad():
        output += 0.1  # away from the answer
    optimizer.step(closure)
    return output.detach()


@pytest.mark.parametrize("preset", ["mse", "balanced"])
def test_the_minimizer_is_the_posterior_mean_where_it_has_to_be(preset):
    # A skewed posterior in output space, of variance 0.25: its median and its mean differ by 0.15.
    generator = torch.Generator().manual_seed(0)
    skewed = -torch.rand(400, 3, 8, 8, generator=generator).log()  # exponential, mean 1 and variance 1
    targets = torch.randn(1, 3, 8, 8, generator=generator) + 0.5 * (skewed - 1)
    mean = targets.mean(0, keepdim=True)
    biases = {}
    for sigma in (0.01, 0.1, 0.5, 2.0, 20.0):
        c_out = sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
        biases[sigma] = c_out * (minimizer(preset, targets, sigma) - mean).square().mean().sqrt().item()
    print(f"{preset}: bias of the denoised image, by σ: { {s: round(b, 5) for s, b in biases.items()} }")
    assert biases[20.0] < 1e-3
    # In units of [-1, 1]: one of 255 grey levels is 0.0078.
    assert max(biases.values()) < (1e-3 if preset == "mse" else 0.02)
    assert biases[0.01] < 1e-3
