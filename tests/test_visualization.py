import json

import numpy as np
from PIL import Image

from pet_pipeline.visualization import denoising_strip, image_grid, loss_curves, sample_grid, step_comparison


def test_grid_places_every_image_without_blur():
    colors = [["red", "green"], ["blue", "yellow"]]
    rows = [[Image.new("RGB", (4, 4), color) for color in row] for row in colors]
    plain = np.asarray(image_grid(rows, scale=3))
    labelled = image_grid(rows, ["first", "second"], ["a", "b"], scale=3)
    assert labelled.width > plain.shape[1] and labelled.height > plain.shape[0]
    for color in ("red", "green", "blue", "yellow"):
        expected = np.asarray(Image.new("RGB", (1, 1), color))[0, 0]
        assert (plain == expected).all(-1).sum() == 12 * 12


def test_pictures_of_a_pipeline(pipeline):
    grid = sample_grid(pipeline, num_images=3, seed=4, num_inference_steps=2)
    strip = denoising_strip(pipeline, num_inference_steps=5)
    comparison = step_comparison(pipeline, steps=(2, 3), num_images=2)
    # 5 columns and 4 rows of images, at least.
    assert strip.width > 5 * 16 and strip.height > 4 * 16
    assert grid.height < strip.height and comparison.width > 4 * 16


def test_columns_of_a_strip_belong_together(pipeline):
    # The last prediction is the sample, so a sample of the same noise shows in the last column.
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
