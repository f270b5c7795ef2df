"""The bundled checkpoint: that the code still is the model which was trained."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from pet_pipeline import PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.evaluation.classifier import BUNDLED_CLASSIFIER
from pet_pipeline.evaluation.images import class_accuracy, load_classifier
from pet_pipeline.evaluation.metrics import validation_loss
from pet_pipeline.publishing.papers import papers_of
from pet_pipeline.training.data import ImageDataset
from pet_pipeline.visualization import MARGIN


@pytest.fixture(scope="module")
def bundled() -> PetDiffusionPipeline:
    pipeline = PetDiffusionPipeline.from_pretrained()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def samples() -> ImageDataset:
    return read_samples("pretrained")


def read_samples(folder: str) -> ImageDataset:
    """The images of a card's picture: a row of 8 cats and a row of 8 dogs."""
    with Image.open(BUNDLED_CLASSIFIER.parent / folder / "samples.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    side = 32 * 4 + MARGIN  # pixels are drawn as 4×4
    left = pixels.shape[1] - 8 * side
    images = [
        pixels[MARGIN + row * side :, left + column * side :][:128:4, :128:4]
        for row in range(2)
        for column in range(8)
    ]
    labels = torch.arange(2).repeat_interleave(8)
    return ImageDataset(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels, class_names=["cat", "dog"]
    )


def test_it_knows_its_own_samples(bundled, samples):
    right = validation_loss(bundled.transformer, bundled.scheduler, samples, sigmas=(0.05, 0.5, 4.0))
    print({sigma: round(loss, 4) for sigma, loss in right.items()})
    # Of real images these errors are 0.2, 0.11 and 0.37; of another network than was trained, towards 1.
    assert right[0.05] < 0.25 and right[0.5] < 0.15 and right[4.0] < 0.45


def test_the_judge_knows_the_samples(samples):
    judge = load_classifier(["cat", "dog"], 32)
    assert class_accuracy(samples.images, samples.labels, judge) >= 0.75


def test_it_draws_what_it_drew(bundled, samples):
    # The third cat and its dog of the picture.
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    images = bundled(["cat", "dog"], generator=generators, output_type="pt").images
    expected = samples.images[[2, 10]].float() / 255
    assert (images - expected).abs().mean() < 0.02


def test_its_cards_link_to_the_papers_that_it_uses(bundled):
    for folder, pipeline, options in (
        ("pretrained", bundled, {"learned_weighting": True, "lora_rank": None}),
        (
            "pretrained/fast",
            PetDiffusionPipeline.from_pretrained("fast"),
            {"learned_weighting": False, "lora_rank": 32},
        ),
    ):
        card = (BUNDLED_CLASSIFIER.parent / folder / "README.md").read_text(encoding="utf-8")
        links = re.findall(r"https://arxiv\.org/abs/([\d.]+)\)", card)
        assert links == [paper.arxiv_id for paper in papers_of(pipeline, options)]


def test_it_classifies_its_samples(bundled, samples):
    classifier = PetClassificationPipeline.from_pipe(bundled)
    classifier.set_progress_bar_config(disable=True)
    chosen = samples.images[[0, 1, 8, 9]]
    labels = classifier(chosen, num_evaluations=8, generator=torch.Generator().manual_seed(0)).labels
    assert sum(label == name for label, name in zip(labels, ["cat", "cat", "dog", "dog"])) >= 3


def test_the_fast_model_draws_what_it_drew_and_can_be_saved(tmp_path):
    fast, drawn = PetDiffusionPipeline.from_pretrained("fast"), read_samples("pretrained/fast")
    fast.save_pretrained(tmp_path)
    assert fast.is_tuned and fast.guide is None and fast.probe is None and fast.config.calibration is None
    for pipeline in (fast, PetDiffusionPipeline.from_pretrained(tmp_path)):
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(2) for _ in range(2)]
        images = pipeline(["cat", "dog"], generator=generators, output_type="pt").images
        assert pipeline.num_timesteps <= 4
        assert (images - drawn.images[[2, 10]].float() / 255).abs().mean() < 0.02
    judge = load_classifier(["cat", "dog"], 32)
    assert class_accuracy(drawn.images, drawn.labels, judge) >= 0.75


def test_a_folder_called_fast_is_that_folder(tmp_path, monkeypatch, pipeline):
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("fast")
    assert not PetDiffusionPipeline.from_pretrained("fast").is_tuned
