"""Interpolation: mixtures of classes, the way between two images, and the animation."""

import pytest
import torch
from conftest import random_model
from PIL import Image

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.visualization import interpolation


def test_weights_of_classes_mix_their_embeddings(model):
    image, level = torch.randn(3, 3, 8, 8), torch.zeros(3)
    ids = torch.tensor([0, 1, 2])
    for weights in (torch.eye(3), torch.eye(3).double()):
        torch.testing.assert_close(model(image, level, weights).sample, model(image, level, ids).sample)
    mixed = model(image, level, torch.tensor([[0.25, 0.75, 0.0]]).expand(3, 3)).sample
    with torch.no_grad():
        rows = model.class_embedding.weight
        rows[0] = 0.25 * rows[0] + 0.75 * rows[1]
    torch.testing.assert_close(model(image, level, torch.tensor(0)).sample, mixed)


def test_a_pipeline_with_weights_of_one_class_draws_this_class(pipeline):
    for guidance in ({"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {"negative_class_labels": "cat"}):
        images = [
            pipeline(
                labels,
                num_inference_steps=3,
                num_images_per_prompt=2,
                generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
                output_type="pt",
                **guidance,
            ).images
            for labels in (["dog", "cat"], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        ]
        torch.testing.assert_close(*images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weights", [[[1.0]], [[1.0, 0.0, 0.0]], [[float("nan"), 1.0]], [1.0, 0.0]])
def test_weights_that_fit_no_class_are_refused(pipeline, weights):
    with pytest.raises(ValueError, match="must be finite and of shape \\(batch, 2\\)"):
        pipeline(torch.tensor(weights), num_inference_steps=1)


def test_the_way_passes_through_its_points_with_noise_of_the_same_size(pipeline):
    inputs = []
    pipeline.transformer.register_forward_pre_hook(lambda _, args: inputs.append(args))
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0}
    frames = interpolation(pipeline, [(0, 5), (1, 5), (1, 9)], num_frames=4, batch_size=5, **settings)
    starts = torch.cat([image for image, level, _ in inputs if level[0] == inputs[0][1][0]])
    weights = torch.cat([labels for _, level, labels in inputs if level[0] == inputs[0][1][0]])
    assert len(frames) == len(starts) == 12
    assert weights[:, 1].tolist() == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    torch.testing.assert_close(starts[:5], starts[:1].expand(5, -1, -1, -1))  # the seed is the same
    norms = starts.flatten(1).norm(dim=1)
    assert norms.max() / norms.min() < 1.15  # two draws differ by as much, while their mean is at 0.71
    changes = (starts[5:] - starts[4:-1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(changes, changes.mean().expand_as(changes), rtol=0.1, atol=0)
    for index, label, seed in ((0, 0, 5), (4, 1, 5), (8, 1, 9)):
        generator = torch.Generator().manual_seed(seed)
        image = pipeline(label, generator=generator, **settings).images[0]
        assert frames[index].tobytes() == image.tobytes()


def test_the_noise_of_the_steps_is_that_of_the_first_point(pipeline):
    pipeline.scheduler = AdaptiveEDMScheduler(solver="consistency")
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0}
    frames = interpolation(pipeline, [(1, 5), (0, 5), (0, 6)], num_frames=2, **settings)
    for index, label in ((0, 1), (2, 0)):
        generator = torch.Generator().manual_seed(5)
        image = pipeline(label, generator=generator, **settings).images[0]
        assert frames[index].tobytes() == image.tobytes()


@pytest.mark.parametrize("name", ["transformer", "guide"])
def test_models_that_take_labels_only_are_refused(pipeline, name):
    pipe = PetDiffusionPipeline.from_pipe(pipeline, guide=random_model(1))
    getattr(pipe, name).takes_class_weights = False  # as in any other class
    with pytest.raises(ValueError, match="Weights of classes need models that take them"):
        pipe(torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("name", ["way.gif", "way.webp", "way.png"])
def test_the_command_saves_an_endless_animation(saved, tmp_path, name):
    options = ["--model", str(saved), "--steps", "2", "--frames", "3", "--scale", "2", "--duration", "40"]
    assert main(["interpolate", "cat:0", "dog:1", *options, "--out", str(tmp_path / "new" / name)]) == 0
    with Image.open(tmp_path / "new" / name) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (6, 0)
        animation.load()
        assert animation.info["duration"] == 40
        assert min(animation.size) >= 16


@pytest.mark.parametrize(
    "words, message",
    [
        (["cat"], "must be CLASS:SEED, such as cat:0, but is 'cat'"),
        (["cat:x"], "must be CLASS:SEED"),
        (["cat:0", "--out", "way.jpg"], "must end in .webp, .png or .gif, but is 'way.jpg'"),
    ],
)
def test_a_way_that_cannot_be_drawn_is_one_error(capsys, words, message):
    with pytest.raises(SystemExit):
        main(["interpolate", *words])
    assert message in capsys.readouterr().err


def test_a_way_of_one_image_or_to_a_folder_is_one_error(saved, capsys, tmp_path):
    assert main(["interpolate", "cat:0", "--model", str(saved)]) == 1
    assert "needs two images at the least" in capsys.readouterr().err
    (tmp_path / "way.gif").mkdir()
    words = ["interpolate", "cat:0", "dog:0", "--model", str(saved), "--out", str(tmp_path / "way.gif")]
    assert main(words) == 1
    assert "is a folder" in capsys.readouterr().err


def test_an_unknown_class_is_one_error(saved, capsys, tmp_path):
    out = tmp_path / "way.gif"
    assert main(["interpolate", "bird:0", "cat:0", "--model", str(saved), "--out", str(out)]) == 1
    assert "There is no class 'bird'" in capsys.readouterr().err
    assert not out.exists()
