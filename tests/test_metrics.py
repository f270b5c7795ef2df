import pytest
import torch
from conftest import random_model
from support.oracles import EmpiricalDenoiser, GaussianDenoiser

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.evaluation.metrics import (
    VALIDATION_SIGMAS,
    EfficientNetLite0Features,
    NearestNeighbors,
    frechet_distance,
    image_features,
    kernel_distance,
    nearest_neighbors,
    precision_recall,
    validation_loss,
)
from pet_pipeline.training.data import ImageDataset


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


def test_validation_loss_in_the_precision_of_the_model():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    dataset = ImageDataset(images, torch.tensor([0, 1, 0]), ["cat", "dog"])
    full = validation_loss(random_model(), AdaptiveEDMScheduler(), dataset)
    half = validation_loss(random_model().bfloat16(), AdaptiveEDMScheduler(), dataset)
    assert half == pytest.approx(full, rel=0.1)


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
    neighbors = nearest_neighbors(samples, images, chunk_size=3)
    assert neighbors.indices[:2].tolist() == [0, 5]
    assert neighbors.distances[:2].tolist() == pytest.approx([0, 0.02], abs=1e-3)
    assert (neighbors.second_distances > 0.4).all()
    assert neighbors.memorization_ratio() == pytest.approx(2 / 3)
    # Without duplicates, the near-duplicate is the second nearest image, and never the nearest image itself.
    strict = nearest_neighbors(samples, images, duplicate_distance=0.0)
    assert strict.second_distances[0].item() == pytest.approx(0.01, abs=1e-3)
    assert strict.second_distances[1] > 0.4
    # Under a third of the second distance.
    near = NearestNeighbors(torch.arange(2), torch.tensor([0.32, 0.35]), torch.ones(2))
    assert near.memorization_ratio() == 0.5


def test_an_empirical_denoiser_memorizes_and_new_images_do_not():
    model = EmpiricalDenoiser(num_images=20)
    pipe = PetDiffusionPipeline(model, AdaptiveEDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(
        num_images_per_prompt=8, num_inference_steps=30, guidance_scale=1.0, output_type="latent"
    ).images
    known = model.data.float()
    assert nearest_neighbors(samples, known).memorization_ratio() == 1.0
    new = torch.rand(16, 3, 8, 8) * 2 - 1
    assert nearest_neighbors(new, known).memorization_ratio() == 0.0


def gaussian(num_images: int, mean: float, std: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(num_images, 8, generator=generator, dtype=torch.float64)


def test_frechet_distance_of_gaussians():
    # |difference of means|² + (difference of standard deviations)², in each of 8 dimensions.
    distance = frechet_distance(gaussian(20_000, 0.0, 1.0, seed=0), gaussian(20_000, 0.5, 2.0, seed=1))
    assert distance == pytest.approx(8 * (0.5**2 + 1.0**2), rel=0.03)


def test_kernel_distance_is_unbiased_and_repeatable():
    reference = gaussian(400, 0.0, 1.0, seed=0)
    same, _ = kernel_distance(reference, gaussian(400, 0.0, 1.0, seed=1))
    other, _ = kernel_distance(reference, gaussian(400, 0.5, 1.0, seed=1))
    assert abs(same) < 0.05 * other
    state = torch.random.get_rng_state()
    assert kernel_distance(reference, gaussian(400, 0.5, 1.0, seed=1))[0] == other
    torch.testing.assert_close(torch.random.get_rng_state(), state)


def test_kernel_distance_by_its_formula():
    x, y = gaussian(30, 0.0, 1.0, seed=0), gaussian(30, 0.5, 1.0, seed=1)
    kernels = [(a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = sum(kernel.sum() - kernel.trace() for kernel in kernels[:2]) / (30 * 29)
    expected = (within - 2 * kernels[2].mean()).item()
    assert kernel_distance(x, y, subset_size=30) == (pytest.approx(expected, rel=1e-10), None)


def test_the_deviation_of_the_kernel_distance_needs_different_subsets():
    first, second = torch.randn(2, 60, 4).unbind()
    assert kernel_distance(first, second, subset_size=60)[1] is None
    assert kernel_distance(first, second, subset_size=30)[1] > 0
    assert kernel_distance(first, torch.cat([second, first]))[1] > 0  # of the larger set a part is drawn


def test_precision_sees_outliers_and_recall_missing_modes():
    both = torch.cat([gaussian(100, 0.0, 0.1, seed=0), gaussian(100, 5.0, 0.1, seed=1)])
    one = gaussian(200, 0.0, 0.1, seed=2)
    precision, recall = precision_recall(both, one)
    assert precision > 0.8 and recall == pytest.approx(0.5, abs=0.1)
    precision, recall = precision_recall(one, both)
    assert precision == pytest.approx(0.5, abs=0.1) and recall > 0.8
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(both[:3], one)


def test_efficientnet_sees_images_as_in_its_training(monkeypatch):
    extractor, seen = EfficientNetLite0Features(), []
    extract = extractor.network.extract_features
    monkeypatch.setattr(extractor.network, "extract_features", lambda x: seen.append(x) or extract(x))
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert image_features(images, extractor).shape == (2, 1280)
    assert seen[0].shape == (2, 3, 224, 224)
    expected = torch.tensor([-127 / 128, 1.0]).view(2, 1, 1, 1).expand_as(seen[0])
    torch.testing.assert_close(seen[0], expected)
    assert not any(module.training for module in extractor.modules())


def test_features_are_cached_by_pixels(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))

    class MeanColor(torch.nn.Module):
        name = "MeanColor"
        calls = 0

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images):
            self.calls += 1
            return self.weight * images.float().mean((2, 3))

    extractor = MeanColor()
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    first = image_features(images, extractor, batch_size=2, cache=True)
    assert first.shape == (5, 3) and extractor.calls == 3
    torch.testing.assert_close(image_features(images, extractor, batch_size=5, cache=True), first)
    assert extractor.calls == 3
    image_features(images.flip(0), extractor, batch_size=5, cache=True)
    assert extractor.calls == 4
