import json

import numpy as np
import pytest
import torch
from PIL import Image

from pet_pipeline import AdaptiveEDMScheduler
from pet_pipeline.pipeline_pet_classification import ClassificationEvidence
from pet_pipeline.visualization import (
    array_image,
    denoising_strip,
    error_figure,
    evidence_map,
    guidance_figure,
    image_grid,
    loss_curves,
    sample_grid,
    step_comparison,
)


def test_grid_places_every_image_without_blur():
    colors = [["red", "green"], ["blue", "yellow"]]
    rows = [[Image.new("RGB", (4, 4), color) for color in row] for row in colors]
    plain = np.asarray(image_grid(rows, scale=3))
    labelled = image_grid(rows, ["first", "second"], ["a", "b"], scale=3)
    assert labelled.width > plain.shape[1] and labelled.height > plain.shape[0]
    for color in ("red", "green", "blue", "yellow"):
        expected = np.asarray(Image.new("RGB", (1, 1), color))[0, 0]
        assert (plain == expected).all(-1).sum() == 12 * 12


def test_transparent_images_are_on_white():
    assert np.asarray(image_grid([[Image.new("RGBA", (4, 4), (255, 0, 0, 0))]])).min() == 255


def test_labels_of_columns_stay_apart():
    grid = np.asarray(image_grid([[Image.new("RGB", (32, 32))] * 3], column_labels=["0.0075"] * 3, scale=1))
    header = (grid[:16] < 128).any((0, 2))  # where there is ink
    assert header.any() and not header[-2:].any()
    assert not header[[36 * column + 1 for column in range(3)]].any()  # between the columns


def test_pictures_of_a_pipeline(pipeline):
    grid = sample_grid(pipeline, num_images=3, seed=4, num_inference_steps=2)
    strip = denoising_strip(pipeline, num_inference_steps=5)
    comparison = step_comparison(pipeline, steps=(2, 3), num_images=2)
    # 5 columns and 4 rows of images, at least.
    assert strip.width > 5 * 16 and strip.height > 4 * 16
    assert grid.height < strip.height and comparison.width > 4 * 16


def test_rows_of_a_comparison_have_their_steps(pipeline):
    comparison = np.asarray(step_comparison(pipeline, steps=(1, 6), num_images=1, class_labels=[1]))
    for steps, top in ((1, -2), (6, -1)):
        grid = np.asarray(sample_grid(pipeline, num_images=1, num_inference_steps=steps))  # cat over dog
        image = grid[-20:-4, -20:-4].astype(int)
        part = comparison[len(comparison) + 20 * top :][:16, -20:-4].astype(int)
        assert np.abs(image - part).max() <= 1, steps


@pytest.mark.parametrize("options", [{}, {"solver": "euler", "s_churn": 40.0}], ids=["default", "churn"])
def test_columns_of_a_strip_belong_together(pipeline, options):
    # The last prediction is the sample, so a sample of the same noise shows in the last column.
    pipeline.scheduler = AdaptiveEDMScheduler(**options)
    strip = np.asarray(denoising_strip(pipeline, seed=3, num_inference_steps=4))
    grid = np.asarray(sample_grid(pipeline, num_images=1, seed=3, num_inference_steps=4))
    image = grid[4:20, -20:-4]
    last = strip[4 + 16 + 20 : 4 + 16 + 36, -20:-4]
    assert np.abs(image.astype(int) - last.astype(int)).max() <= 1


def test_curves_of_a_run(tmp_path):
    records = [{"step": i, "images": 8 * i, "train/loss": 1 / i, "train/term_mse": 1 / i} for i in (1, 2, 3)]
    records.append({"step": 3, "images": 24, "validation/loss": 0.5, "validation/sigma_0.01": 0.4})
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert loss_curves(path).size == (1100, 400)


def test_evidence_is_red_for_the_best_class_and_blue_for_the_second():
    difference = torch.tensor([[2.0, 0.0], [-2.0, 1.0]])
    evidence = ClassificationEvidence(
        torch.tensor([0.1, 1.0]), torch.tensor([[0.2, 0.3], [0.25, torch.nan]]), difference, ("cat", "dog")
    )
    (red, neutral), (blue, pink) = np.asarray(evidence_map(evidence)).astype(int)
    assert red[0] > red[2] and blue[2] > blue[0] and neutral.min() > 240
    assert red[1] < pink[1] < neutral[1]  # the stronger, the darker
    assert error_figure(evidence, ["cat", "dog"]).width > 400


def test_guidance_is_drawn_from_the_first_step_on():
    columns = []
    for weights in ([3.0, 1.0, 1.0], [1.0, 1.0, 3.0]):
        picture = np.asarray(guidance_figure([80.0, 1.0, 0.01], weights)).astype(int)
        line = picture[..., 2] - picture[..., 0] > 100  # it is blue
        columns.append(np.flatnonzero(line[: len(line) // 3].any(0)).mean())
    assert columns[0] < columns[1]


def test_images_of_one_channel_and_of_three():
    tensor = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert np.array_equal(np.asarray(array_image(tensor)), tensor.permute(1, 2, 0))
    grey = array_image(tensor[:1])
    assert grey.mode == "L" and np.array_equal(np.asarray(grey), tensor[0])
