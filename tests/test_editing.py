"""Editing images: how much is left of them, which pixels stay, and what is refused."""

import pytest
import torch
from PIL import Image
from support.oracles import EmpiricalDenoiser, generators, oracle_pipeline

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.__main__ import main


SOLVERS = ["multistep", "euler", "heun"]


def to_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def noises(number: int) -> torch.Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_edit_is_an_image_of_the_other_class_that_is_like_the_original(solver):
    model = EmpiricalDenoiser(num_images=20)  # of which every second one is a dog
    pipe = oracle_pipeline(model, solver=solver)
    cats, dogs = model.data[0::2].float(), model.data[1::2].float()
    cat = (dogs[3] + 0.3 * cats[0]).clamp(-1, 1)  # most like the fourth dog
    images = pipe(
        "dog",
        image=to_image(cat),
        strength=0.5,
        num_images_per_prompt=8,
        guidance_scale=1.0,
        latents=noises(8),
        output_type="latent",
        num_inference_steps=30,
    ).images
    nearest = torch.cdist(images.flatten(1), dogs.flatten(1)).min(1)
    assert nearest.values.max() < 0.5
    assert (nearest.indices == 3).float().mean() > 0.7


def test_the_strength_is_the_share_of_the_steps(pipeline):
    image, counts = to_image(torch.zeros(3, 8, 8)), []
    pipeline.transformer.register_forward_hook(lambda *_: counts.append(1))
    for solver, evaluations in (("multistep", (1, 5, 10)), ("heun", (1, 9, 19))):
        pipeline.scheduler = AdaptiveEDMScheduler(solver=solver)
        for strength, expected in zip((0.01, 0.5, 1.0), evaluations):
            counts.clear()
            pipeline(0, 10, image=image, strength=strength, guidance_scale=1.0)
            assert len(counts) == expected == pipeline.num_timesteps
    # At the full strength, noise alone would be almost the same start.
    pipeline.scheduler = AdaptiveEDMScheduler()
    latents = noises(1)
    edited = pipeline(0, 10, image=image, strength=1.0, latents=latents, output_type="pt").images
    drawn = pipeline(0, 10, latents=latents, output_type="pt").images
    torch.testing.assert_close(edited, drawn, atol=0.02, rtol=0)
    for mask, expected in ((None, 5), (Image.new("L", (8, 8), 255), 10)):  # the default strengths
        pipeline(0, 10, image=image, mask_image=mask)
        assert pipeline.num_timesteps == expected


@pytest.mark.parametrize("solver", [*SOLVERS, "consistency"])
def test_pixels_outside_the_mask_stay_and_the_others_change(model, solver):
    pipe = PetDiffusionPipeline(model, AdaptiveEDMScheduler(solver=solver), guidance_scale=1.0)
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    images = pipe(
        [0, 1], 4, image=image, mask_image=mask, generator=generators(1, 2), output_type="latent"
    ).images
    torch.testing.assert_close(
        images[:, :, 4:], (2 * image - 1)[None, :, 4:].expand(2, -1, -1, -1), atol=1e-4, rtol=0
    )
    assert (images[:, :, :4] - (2 * image - 1)[None, :, :4]).abs().mean() > 0.1
    assert (images[0] - images[1])[:, :4].abs().mean() > 0.01


def test_a_mask_is_filled_with_what_fits_the_rest():
    model = EmpiricalDenoiser(num_images=20)
    pipe = oracle_pipeline(model)
    dog = model.data[7].float()  # of which one half is enough to know it
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 8, 4))
    images = pipe(
        "dog", image=to_image(dog), mask_image=mask, guidance_scale=1.0, output_type="latent"
    ).images
    assert (images[0] - dog).abs().max() < 0.05


def test_one_image_each_or_one_for_all(pipeline):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    each = pipeline([0, 1], 4, image=images, strength=0.25, output_type="pt", latents=noises(2)).images
    assert each[0, 0].mean() > each[1, 0].mean()
    assert len(pipeline(None, 2, image=images[0]).images) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "need an `image`"),
        ({"mask_image": Image.new("L", (8, 8))}, "need an `image`"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 1.5}, r"`strength` must be in \(0, 1\]"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0}, r"`strength` must be in \(0, 1\]"),
        ({"image": [Image.new("RGB", (8, 8))] * 3}, "one image or one for each of the 2 images"),
        ({"image": "nowhere.png"}, "'nowhere.png' cannot be read"),
        (
            {"image": Image.new("RGB", (8, 8)), "latents": torch.zeros(2, 3, 16, 16)},
            "of the size of the image",
        ),
    ],
)
def test_what_cannot_be_edited_is_one_error(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline([0, 1], 2, **options)


def test_the_command(saved, tmp_path, capsys):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    words = ["edit", str(tmp_path / "red.png"), "--model", str(saved), "--class", "cat", "--num_samples", "2"]
    words += ["--steps", "2", "--seed", "5", "--out", str(tmp_path / "out")]
    assert main([*words, "--strength", "0.5", "--mask", str(tmp_path / "mask.png")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cat-5.png", "cat-6.png", "grid.png"}
    assert main([*words, "--strength", "2", "--out", str(tmp_path / "bad")]) == 1
    assert "`strength` must be in (0, 1]" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()
