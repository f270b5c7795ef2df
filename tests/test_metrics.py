import pytest
import torch
from conftest import random_model
from oracles import EmpiricalDenoiser, GaussianDenoiser

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.data import ImageDataset
from pet_pipeline.metrics import VALIDATION_SIGMAS, memorization_ratio, nearest_neighbors, validation_loss


def test_levels_are_even_in_the_logarithm():
    logs = torch.tensor(VALIDATION_SIGMAS).log()
    assert (logs[0].item(), logs[-1].item()) == pytest.approx((-4.5, 3.0), abs=1e-5)
    torch.testing.assert_close(logs.diff(), torch.full((15,), 0.5))


def test_validation_loss_does_not_depend_on_the_batch_size():
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    dataset = ImageDataset(images, torch.arange(10) % 2, ["cat", "dog"])
    model, scheduler = random_model(), AdaptiveEDMScheduler()
    first, second = (validation_loss(model, scheduler, dataset, batch_size=b) for b in (3, 10))
    assert list(first.values()) == pytest.approx(list(second.values()), rel=1e-4)
    assert list(first) == list(VALIDATION_SIGMAS)


def test_validation_loss_of_a_known_denoiser():
    # For N(mean, s²) data the posterior variance is s²σ²/(s²+σ²); in output space it is divided by c_out².
    std = 0.1
    generator = torch.Generator().manual_seed(1)  # another seed than the validation noise
    images = ((0.5 + std * torch.randn(200, 3, 8, 8, generator=generator)) * 127.5 + 127.5).round().byte()
    dataset = ImageDataset(images, torch.ones(200, dtype=torch.long), ["cat", "dog"])
    for sigma, error in validation_loss(GaussianDenoiser(std=std), AdaptiveEDMScheduler(), dataset).items():
        if sigma > 0.05:  # below, the rounding to 8 bits shows
            c_out_squared = sigma**2 * 0.25 / (sigma**2 + 0.25)
            expected = std**2 * sigma**2 / (std**2 + sigma**2) / c_out_squared
            assert error == pytest.approx(expected, rel=0.03)


def test_nearest_neighbors_see_mirrored_copies_and_merge_duplicates():
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[1] = images[0] + 0.01  # a near-duplicate
    samples = torch.stack([images[0], images[5].flip(-1) + 0.02, torch.zeros(3, 8, 8)])
    neighbors = nearest_neighbors(samples, images, chunk_size=2)
    assert neighbors.indices[:2].tolist() == [0, 5]
    assert neighbors.distances[:2].tolist() == pytest.approx([0, 0.02], abs=1e-3)
    assert (neighbors.second_distances > 0.4).all()
    assert memorization_ratio(samples, images) == pytest.approx(2 / 3)


def test_an_empirical_denoiser_memorizes_and_new_images_do_not():
    model = EmpiricalDenoiser(num_images=20)
    pipe = PetDiffusionPipeline(model, AdaptiveEDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(
        num_images_per_prompt=8, num_inference_steps=30, guidance_scale=1.0, output_type="latent"
    ).images
    known = model.data.float()
    assert memorization_ratio(samples, known) == 1.0
    assert memorization_ratio(torch.rand(16, 3, 8, 8) * 2 - 1, known) == 0.0
