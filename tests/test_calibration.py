import json
import math
import warnings

import pytest
import torch
from conftest import random_model
from PIL import Image
from support.oracles import GaussianDenoiser

from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.evaluation.calibration import (
    ClassErrors,
    accuracy_curve,
    calibration_error,
    class_errors,
    draw_order,
    evaluate_classification,
    fit_calibration,
    measure_classification,
    wilson_interval,
)
from pet_pipeline.pipeline_pet_classification import BAND_RANGE, NUM_BANDS
from pet_pipeline.training.data import ImageDataset
from pet_pipeline.visualization import evidence_figure, reliability_diagram


def gaussian_classifier(**kwargs):
    pipe = PetClassificationPipeline(
        GaussianDenoiser(0.3), AdaptiveEDMScheduler(), id2label={0: "dark", 1: "bright"}, **kwargs
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian_dataset(num_images, seed=0):
    """Images whose class is uncertain: the posterior log-odds have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.3 * torch.randn(num_images, 3, 8, 8, generator=generator)
    pixels -= pixels.mean((1, 2, 3), True)
    log_odds = 3 * torch.randn(num_images, generator=generator)
    pixels += (log_odds * 0.3**2 / 192).view(-1, 1, 1, 1)
    labels = (torch.rand(num_images, generator=generator) < log_odds.sigmoid()).long()
    images = (pixels * 127.5 + 127.5).round().clamp(0, 255).byte()
    return ImageDataset(images, labels, ["dark", "bright"])


def test_calibration_finds_the_informative_band_and_true_probabilities():
    generator = torch.Generator().manual_seed(0)
    sigmas = (math.log(BAND_RANGE[0]) + (torch.arange(32) + 0.5) / 32 * math.log(200)).exp()
    labels = torch.arange(4000) % 2
    errors = torch.randn(4000, 2, 32, generator=generator)
    # Only the third band knows the class: its mean differs by as much as its own noise.
    errors[torch.arange(4000), labels, 8:12] -= 0.5
    calibration = fit_calibration(ClassErrors(errors, sigmas), labels)
    weights = torch.tensor(calibration["weights"])
    assert len(weights) == NUM_BANDS and weights.argmax() == 2 and weights.min() >= 0
    assert weights[2] > 10 * weights.sum() / NUM_BANDS / 2
    expanded = weights.repeat_interleave(4)
    measures = measure_classification((-(errors * expanded).mean(-1)).softmax(1), labels, ["a", "b"])
    # Optimal: four draws, each 0.5 apart with unit noise of both classes.
    optimal = 0.5 * (1 + math.erf(0.5 * 2 / math.sqrt(2) / math.sqrt(2)))
    assert measures["accuracy"] == pytest.approx(optimal, abs=0.02)
    assert measures["calibration_error"] < 0.03


def test_calibration_ignores_what_all_classes_share():
    # An image that is hard for every class tells nothing about the class.
    sigmas = (math.log(BAND_RANGE[0]) + (torch.arange(32) + 0.5) / 32 * math.log(200)).exp()
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    errors = torch.randn(400, 2, 32, generator=generator)
    errors[torch.arange(400), labels] -= 0.1
    shared = 10 * torch.randn(400, 1, 32, generator=generator)
    weights = fit_calibration(ClassErrors(errors, sigmas), labels)["weights"]
    other = fit_calibration(ClassErrors(errors + shared, sigmas), labels)["weights"]
    assert other == pytest.approx(weights, rel=1e-2, abs=1e-3)


def test_measures():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    measures = measure_classification(probabilities, torch.tensor([0, 1, 1, 1]), ["a", "b"])
    assert measures["accuracy"] == 0.75 and measures["recall"] == {"a": 1.0, "b": pytest.approx(2 / 3)}
    expected = -(math.log(0.9) + math.log(0.1) + math.log(0.8) + math.log(0.6)) / 4
    assert measures["log_loss"] == pytest.approx(expected, rel=1e-5)
    # A class without images has no recall, and no interval leaves [0, 1].
    alone = measure_classification(probabilities[:1], torch.tensor([1]), ["a", "b"])
    assert alone["recall"] == {"b": 0.0} and alone["accuracy_low"] == 0.0 < alone["accuracy_high"]
    assert wilson_interval(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert measures["accuracy_low"] < 0.75 < measures["accuracy_high"]
    sure = torch.full((100,), 0.9)
    assert calibration_error(sure, torch.arange(100) % 10 > 0) == pytest.approx(0, abs=0.02)
    assert calibration_error(sure, torch.zeros(100, dtype=torch.bool)) == pytest.approx(0.9)
    # Half of them not sure enough, half too sure: that does not cancel.
    confidences = torch.tensor([0.6] * 50 + [0.9] * 50)
    hits = torch.cat([torch.ones(50), torch.arange(50) % 2]).bool()
    assert calibration_error(confidences, hits) == pytest.approx(0.4)


def test_the_classifier_is_measured(monkeypatch):
    dataset = gaussian_dataset(60)
    pipe = gaussian_classifier()
    errors = class_errors(pipe, dataset, 8)
    assert errors.errors.shape == (60, 2, 4) and errors.sigmas.diff().min() > 0
    tail = class_errors(pipe, dataset.subset(torch.arange(50, 60)), 8)  # a batch of its own before, too
    torch.testing.assert_close(tail.errors, errors.errors[50:])
    drawn = pipe.draw_sigmas(16, "calibrated", torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn.sort().values[draw_order(pipe, 16, 3)], drawn)
    seeds, call = [], PetClassificationPipeline.__call__

    def watched_call(self, *args, **kwargs):
        seeds.append(kwargs["generator"].initial_seed())
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PetClassificationPipeline, "__call__", watched_call)
    measures, probabilities = evaluate_classification(pipe, dataset, 8, seed=5)
    assert seeds == [6, 7]  # noise of their own for every 50 images
    assert probabilities.shape == (60, 2) and measures["evaluations_per_image"] == 16
    assert measures["accuracy"] > 0.6
    points = accuracy_curve(pipe, dataset, 16)
    assert points[-1]["accuracy"] > 0.6
    assert {p["num_evaluations"] for p in points} == {2, 4, 8, 16}


def test_a_point_of_the_curve_is_what_the_classifier_finds_with_so_many_evaluations():
    model = random_model(1, attention_head_dim=4)  # it has many different accuracies
    # Grey from black to white: the random model's choice changes with the grey and the noise level.
    images = torch.linspace(0, 255, 40).byte().view(40, 1, 1, 1).repeat(1, 3, 8, 8)
    dataset = ImageDataset(images, (torch.arange(40) < 17).long(), ["0", "1"])
    plain, calibrated = (
        PetClassificationPipeline(model, AdaptiveEDMScheduler(), calibration=calibration)
        for calibration in (None, {"weights": [0.0] * 6 + [1.0] * 2})
    )
    points = accuracy_curve(calibrated, dataset, 8, seed=2)
    assert [point["weighting"] for point in points] == ["calibrated"] * 3 + ["uncalibrated"] * 3
    assert len({point["accuracy"] for point in points}) > 4
    for point in points:
        pipe = calibrated if point["weighting"] == "calibrated" else plain
        generator = torch.Generator().manual_seed(2)
        found = pipe(images, point["num_evaluations"], adaptive=False, generator=generator).labels
        hits = torch.tensor([int(label) for label in found]) == dataset.labels
        assert point["accuracy"] == pytest.approx(hits.float().mean().item())


def test_figures_are_drawn():
    dataset = gaussian_dataset(20)
    output = gaussian_classifier()(dataset.images[:2], 8, return_evidence=True)
    picture = Image.fromarray(dataset.images[0].permute(1, 2, 0).numpy())
    figure = evidence_figure([picture, picture], output.evidence, ["dark", "bright"])
    assert figure.width > 800 and figure.height > 400
    probabilities = torch.rand(20, 2).softmax(1)
    assert reliability_diagram(probabilities, dataset.labels).width > 300


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_classify_names_bad_files_and_classifies_the_others(saved, image_folder, tmp_path, capsys):
    folder = tmp_path / "pictures"
    (folder / "inside").mkdir(parents=True)
    for name in ("a.png", "c.png"):
        Image.new("RGB", (20, 30), "red").save(folder / name)
    (folder / "b.txt").write_text("no image")
    (folder / ".hidden").write_text("no image")
    words = ["classify", str(folder), "--model", saved, "--num_evaluations", "4"]
    assert main([*words, "--json", "--evidence", str(tmp_path / "why.png")]) == 1
    output, error = capsys.readouterr()
    records = [json.loads(line) for line in output.splitlines()]
    assert [record["image"] for record in records] == [str(folder / "a.png"), str(folder / "c.png")]
    assert records[0]["probabilities"] == records[1]["probabilities"] and records[0]["num_evaluations"] == 8
    assert "b.txt' cannot be read as an image" in error and "1 of 3 files" in error and "hidden" not in error
    assert (tmp_path / "why.png").exists()
    assert main([*words, "--evidence", str(tmp_path / "new" / "why.jpg")]) == 1  # again because of one file
    assert (tmp_path / "new" / "why.jpg").exists()
    capsys.readouterr()
    assert main(["classify", str(folder / "a.png"), "--model", saved, "--num_evaluations", "2"]) == 0
    assert f"{folder / 'a.png'}: " in capsys.readouterr().out
    for words, message in (
        ([str(folder / "inside")], "There is no file"),
        ([str(folder / "b.txt")], "None of the files can be classified"),
        ([str(folder / "missing.png")], "None of the files can be classified"),
        ([str(folder / "a.png"), "--num_evaluations", "3"], "even"),
        ([str(folder / "a.png"), "--evidence", "why"], "must end as an image file does"),
    ):
        assert main(["classify", *words, "--model", saved]) == 1
        assert message in capsys.readouterr().err


def test_the_words_reach_the_classifier(saved, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    seen, call = [], PetClassificationPipeline.__call__

    def watched_call(self, *args, **kwargs):
        seen.append((kwargs["num_evaluations"], kwargs["weighting"], kwargs["generator"].initial_seed()))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(PetClassificationPipeline, "__call__", watched_call)
    words = ["classify", str(tmp_path / "a.png"), "--model", saved, "--num_evaluations", "4"]
    assert main([*words, "--weighting", "elbo", "--seed", "5"]) == 0
    assert seen == [(4, "elbo", 5)]


def test_calibrate_keeps_weights_and_evaluate_uses_them(saved, image_folder, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").rglob("*.safetensors")}
    words = [saved, "--reference", str(image_folder), "--cache_dir", str(tmp_path / "cache")]
    other = tmp_path / "model" / "pipeline_pet_classification.py"
    code = other.read_text()
    other.write_text("# of an older version\n")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "This pipeline is not calibrated")  # it is about to be
        assert main(["calibrate", *words, "--num_evaluations", "16"]) == 0
    assert other.read_text() == code
    assert "On the 4 images of the fit, the accuracy of the method denoising is" in capsys.readouterr().out
    folder = tmp_path / "model" / "transformer"
    assert before == {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
    weights = PetDiffusionPipeline.from_pretrained(saved).config.calibration["weights"]
    assert len(weights) == NUM_BANDS and min(weights) >= 0
    words = ["evaluate", *words, "--classification", "--curve", "--num_images", "8", "--num_evaluations", "4"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"classification.json", "reliability.png"}
    record = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert record["measures"]["num_images"] == 8 and len(record["curve"]) == 4
    assert "| accuracy |" in capsys.readouterr().out
    assert main(["calibrate", "nowhere", "--reference", str(image_folder)]) == 1
    assert "'nowhere' is not a folder" in capsys.readouterr().err


def test_a_calibration_needs_every_band(saved, image_folder, tmp_path, capsys):
    before = (tmp_path / "model" / "model_index.json").read_bytes()
    words = ["calibrate", saved, "--reference", str(image_folder), "--cache_dir", str(tmp_path / "cache")]
    assert main([*words, "--num_evaluations", "14"]) == 1
    assert "all 8 bands, but they lie in only 7" in capsys.readouterr().err
    assert (tmp_path / "model" / "model_index.json").read_bytes() == before


def test_a_model_of_one_class_cannot_classify(tmp_path, image_folder, capsys):
    PetDiffusionPipeline(random_model(num_classes=1), AdaptiveEDMScheduler()).save_pretrained(
        tmp_path / "one"
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert main(["classify", str(tmp_path / "a.png"), "--model", str(tmp_path / "one")]) == 1
    assert "at least 2 classes" in capsys.readouterr().err
