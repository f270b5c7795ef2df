"""Images of 64×64 pixels from end to end: training, evaluation, classification and the page."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from support.features import Pixels
from support.training_process import train

from pet_pipeline import PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.evaluation.metrics import FEATURE_EXTRACTORS


def photograph(name: str, rng: np.random.Generator) -> Image.Image:
    """A picture of 72×64 to 96×80 pixels: a reddish disc (cat) or a bluish square (dog) on grey noise."""
    width, height = (int(rng.integers(*bounds)) for bounds in ((72, 97), (64, 81)))
    image = Image.fromarray(rng.integers(60, 120, (height, width, 3), dtype=np.uint8))
    left, top, side = (int(rng.integers(*bounds)) for bounds in ((16, 32), (8, 24), (24, 40)))
    colour = [200, 60, 40] if name == "cat" else [40, 60, 200]
    shape = ImageDraw.Draw(image).ellipse if name == "cat" else ImageDraw.Draw(image).rectangle
    shape((left, top, left + side, top + side), fill=tuple(value + int(rng.integers(40)) for value in colour))
    return image


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """An image folder of 40 cats and 40 dogs."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for index in range(40):
            photograph(name, rng).save(folder / name / f"{index:02}.png")
    return folder


def train_at_64(photographs: Path, output_dir: Path, **options) -> None:
    config = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 32, "patch_size": 4}
    options = {"resolution": 64, "model_config": json.dumps(config), "train_batch_size": 16, **options}
    train(photographs, output_dir, **options)


def test_from_training_to_the_page(photographs, tmp_path, monkeypatch, capsys):
    from pet_pipeline.app import serve

    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    out = tmp_path / "out"
    train_at_64(photographs, out, max_train_steps=2, preview_images=1)
    assert "# Images of cat and dog, 64×64\n" in (out / "README.md").read_text(encoding="utf-8")
    words = ["evaluate", str(out), "--reference", str(photographs), "--num_images", "8", "--steps", "2"]
    assert main([*words, "--cache_dir", str(tmp_path / "cache"), "--out", str(tmp_path / "measured")]) == 0
    record = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert record["measures"]["fd_pixels"] > 0 and "class_accuracy" not in record["measures"]
    capsys.readouterr()
    words = ["classify", str(photographs / "cat" / "00.png"), "--model", str(out), "--num_evaluations", "4"]
    assert main([*words, "--evidence", str(tmp_path / "why.png")]) == 0
    assert "00.png: " in capsys.readouterr().out and (tmp_path / "why.png").exists()
    with serve(PetDiffusionPipeline.from_pretrained(out)) as url:
        assert "Images of 64×64 pixels" in httpx.get(f"{url}config").text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_learned(photographs, tmp_path):
    train_at_64(photographs, tmp_path / "out", max_train_steps=400, validation_steps=400, logging_steps=100)
    pipeline = PetDiffusionPipeline.from_pretrained(tmp_path / "out")
    images = pipeline(["cat", "dog"], num_images_per_prompt=4, output_type="np").images
    redness = (images[..., 0] - images[..., 2]).max(axis=(1, 2))
    blueness = (images[..., 2] - images[..., 0]).max(axis=(1, 2))
    assert images.shape == (8, 64, 64, 3)
    assert (redness > blueness).tolist() == 4 * [True] + 4 * [False]
    classifier, rng = PetClassificationPipeline.from_pipe(pipeline), np.random.default_rng(1)
    names = 8 * ["cat", "dog"]
    labels = classifier([photograph(name, rng) for name in names], num_evaluations=8).labels
    assert sum(label == name for label, name in zip(labels, names)) >= 14
