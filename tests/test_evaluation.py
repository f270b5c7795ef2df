import json
from types import SimpleNamespace

import pytest
import torch
from support.features import Pixels
from support.oracles import EmpiricalDenoiser, GaussianDenoiser

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.evaluation.classifier import PetClassifier
from pet_pipeline.evaluation.images import (
    class_accuracy,
    evaluate,
    floors,
    generate_images,
    load_classifier,
    measure_images,
    neighbor_grid,
)
from pet_pipeline.evaluation.metrics import FEATURE_EXTRACTORS, validation_loss
from pet_pipeline.evaluation.reference import Reference, balanced_subset, load_reference
from pet_pipeline.evaluation.tables import markdown_table
from pet_pipeline.training.data import ImageDataset, StoredImages, open_image_dataset, stratified_split


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))


def images_of(mean, num_images, seed):
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor(mean)[torch.arange(num_images) % len(mean)].view(-1, 1, 1, 1)
    images = means + 0.3 * torch.randn(num_images, 3, 8, 8, generator=generator)
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().byte()


def gaussian_reference(num_images=200):
    def dataset(seed):
        labels = torch.arange(num_images) % 2
        return ImageDataset(images_of([-0.5, 0.5], num_images, seed), labels, ["dark", "bright"])

    return Reference(dataset(1), dataset(2), dataset(1))


def gaussian_pipeline(std=0.3):
    pipe = PetDiffusionPipeline(
        GaussianDenoiser(std), AdaptiveEDMScheduler(), id2label={0: "dark", 1: "bright"}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_subsets_are_balanced():
    dataset = ImageDataset(torch.arange(10).view(10, 1, 1, 1).byte(), torch.arange(10) % 2, ["a", "b"])
    assert balanced_subset(dataset, 5).images.flatten().tolist() == [0, 2, 4, 1, 3]
    assert balanced_subset(dataset, 4, start=0.6).images.flatten().tolist() == [6, 8, 7, 9]


def test_generated_images_depend_on_their_seed_alone_and_evaluations_are_counted():
    pipe = gaussian_pipeline()
    whole = generate_images(pipe, 6, batch_size=6, seed=3, num_inference_steps=4, guidance_scale=1.0)
    parts = generate_images(pipe, 6, batch_size=4, seed=3, num_inference_steps=4, guidance_scale=1.0)
    assert whole.images.dtype == torch.uint8 and whole.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert (whole.images.int() - parts.images.int()).abs().max() <= 1
    assert whole.evaluations == 4
    guided = generate_images(pipe, 2, num_inference_steps=4, guidance_scale=2.0, guidance_schedule="constant")
    assert guided.evaluations == 8


def test_a_perfect_denoiser_is_measured_better_than_a_wrong_one():
    reference, extractor = gaussian_reference(), Pixels()
    settings = {"num_images": 200, "num_inference_steps": 40, "guidance_scale": 1.0, "validation_images": 20}
    good, generated = evaluate(gaussian_pipeline(0.3), reference, extractor, with_floors=True, **settings)
    bad, _ = evaluate(gaussian_pipeline(0.05), reference, extractor, **settings)
    good_measures, unseen = good["measures"], good["floors"]["unseen images"]
    assert good_measures["fd_pixels"] < 1.5 * unseen["fd_pixels"] < 0.4 * bad["measures"]["fd_pixels"]

    def constant(sigma):
        return 3.0

    settings |= {"guidance_schedule": constant}
    guided, _ = evaluate(gaussian_pipeline(0.3), reference, extractor, **settings)
    assert json.loads(json.dumps(guided))["settings"]["guidance_schedule"] == "constant"
    assert guided["settings"]["pag_scale"] == 0
    assert abs(good_measures["kid_pixels"]) < 0.1 * guided["measures"]["kid_pixels"]
    for name in ("precision", "recall"):
        assert good_measures[name] > 0.7 * unseen[name] > 0
    assert bad["measures"]["recall"] < 0.1 * unseen["recall"]
    assert good["floors"]["mean colours of images"]["fd_pixels"] > good_measures["fd_pixels"]
    assert good_measures["memorization_ratio"] == 0
    assert good_measures["validation_loss"] < bad["measures"]["validation_loss"]
    held_out = reference.validation.subset(torch.arange(20))
    errors = validation_loss(GaussianDenoiser(0.3), AdaptiveEDMScheduler(), held_out).values()
    assert good_measures["validation_loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert "class_accuracy" not in good_measures  # the bundled classifier does not know these classes
    assert json.loads(json.dumps(good)) == good
    table = markdown_table(good, "perfect").splitlines()
    assert len({line.count("|") for line in table}) == 1 and len(table) == 6
    assert neighbor_grid(generated.images, reference, 3).size[0] > 3 * 16
    with pytest.raises(ValueError, match="must be at most 200, .* but is 201"):
        evaluate(gaussian_pipeline(), reference, extractor, num_images=201)


def test_held_out_images_are_not_compared_with_themselves():
    reference = gaussian_reference(60)
    held_out = Reference(reference.train, reference.validation, reference.validation)
    settings = {"num_images": 20, "num_inference_steps": 2, "validation_images": 0, "with_floors": True}
    record, _ = evaluate(gaussian_pipeline(), held_out, Pixels(), **settings)
    assert set(record["floors"]) == {"other training images", "mean colours of images"}


def test_training_images_are_compared_with_others():
    found = floors(gaussian_reference(60), 20, Pixels())
    # Each is a copy, but not of an image that it is compared with.
    assert found["other training images"]["memorization_ratio"] == 1
    assert found["other training images"]["fd_pixels"] > 0.3 * found["unseen images"]["fd_pixels"] > 0


def test_classes_of_unequal_size_limit_the_number(monkeypatch):
    reference = gaussian_reference(60)
    dark, bright = ((reference.images.labels == label).nonzero().flatten() for label in (0, 1))
    few = reference.images.subset(torch.cat([dark, bright[:2]]))
    skewed = Reference(few, few.subset(torch.arange(len(few))), reference.images)
    counts = []
    monkeypatch.setattr(
        "pet_pipeline.evaluation.images.measure_images",
        lambda images, labels, *args, **kwargs: counts.append(labels.bincount().tolist()),
    )
    floors(skewed, 20, Pixels())
    assert counts == [[1, 1], [2, 2], [1, 1]]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="with equal shares of each class"):
        evaluate(gaussian_pipeline(), Reference(reference.train, reference.validation, few), Pixels(), 10)


def test_copies_are_found():
    reference = gaussian_reference(60)
    model = EmpiricalDenoiser(num_images=20)
    pipe = PetDiffusionPipeline(model, AdaptiveEDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    known = (model.data.float() * 127.5 + 127.5).round().byte()
    reference.train.images = torch.cat([known, reference.train.images])
    reference.train.labels = torch.arange(len(reference.train.images)) % 2
    generated = generate_images(pipe, 16, num_inference_steps=20, guidance_scale=1.0)
    measures = measure_images(generated.images, generated.labels, reference, Pixels())
    assert measures["memorization_ratio"] == 1 and measures["nearest_distance"] < 0.01
    # The most suspicious image is shown first.
    copy = generated.images[:1]
    both = torch.cat([images_of([0.0], 3, seed=3), copy, images_of([0.0], 2, seed=4)])
    first = neighbor_grid(both, reference, num_images=1)
    assert first.tobytes() == neighbor_grid(copy, reference, num_images=1).tobytes()


def test_class_accuracy_counts_hits():
    torch.manual_seed(0)
    classifier = PetClassifier(["dark", "bright"], width=4).eval()
    images = images_of([-0.5, 0.5], 40, seed=0)
    found = classifier(images.float() / 127.5 - 1).argmax(1)
    assert class_accuracy(images, found, classifier) == 1
    assert class_accuracy(images, 1 - found, classifier) == 0


def test_the_bundled_classifier_knows_cats_and_dogs_only():
    classifier = load_classifier(["cat", "dog"], 32)
    assert classifier.num_parameters() < 0.75e6 and not classifier.training
    assert classifier(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    assert load_classifier(["dog", "cat"], 32) is None and load_classifier(["bird"], 32) is None
    assert load_classifier(["cat", "dog"], 64) is None  # it has seen no such images


def test_reference_splits(image_folder):
    train = load_reference(str(image_folder), ["cat", "dog"], 8)
    validation = load_reference(str(image_folder), ["cat", "dog"], 8, "validation")
    assert train.images is train.train and len(train.train) == 36
    assert validation.images is validation.validation and len(validation.validation) == 4
    with pytest.raises(ValueError, match="split 'moon'"):
        load_reference(str(image_folder), ["cat", "dog"], 8, "moon")


def test_images_that_do_not_fit_into_memory_are_measured_the_same(pipeline, image_folder, monkeypatch):
    records, grids = [], []
    for fits in (True, False):
        available = SimpleNamespace(available=16_000 if fits else 15_000)  # the images take 7,680 bytes
        monkeypatch.setattr("psutil.virtual_memory", lambda available=available: available)
        reference = load_reference(str(image_folder), ["cat", "dog"], 8)
        assert isinstance(reference.train, ImageDataset if fits else StoredImages)
        record, generated = evaluate(
            pipeline, reference, Pixels(), 8, with_floors=True, num_inference_steps=1
        )
        records.append((record["measures"], record["floors"]))
        grids.append(neighbor_grid(generated.images, reference).tobytes())
    assert records[0] == records[1] and grids[0] == grids[1]


def test_a_reference_is_split_as_its_training_was(image_folder):
    dataset = open_image_dataset(str(image_folder), ["cat", "dog"], 8, max_samples=24).load()
    train, validation = stratified_split(dataset, 0.25)
    reference = load_reference(
        str(image_folder), ["cat", "dog"], 8, validation_fraction=0.25, max_train_samples=24
    )
    assert torch.equal(reference.train.images, train.images) and len(train) == 18
    assert torch.equal(reference.validation.images, validation.images)


def test_evaluate_writes_its_files(pipeline, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    judge = PetClassifier(width=4).eval()
    monkeypatch.setattr("pet_pipeline.evaluation.images.load_classifier", lambda *args: judge)
    pipeline.save_pretrained(tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--reference", str(image_folder), "--num_images", "16"]
    words += ["--steps", "2", "--floors", "--cache_dir", str(tmp_path / "cache")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "evaluation.json",
        "generated.png",
        "neighbors.png",
    }
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["settings"]["num_inference_steps"] == 2 and record["measures"]["num_images"] == 16
    assert 0 <= record["measures"]["class_accuracy"] <= 1
    output = capsys.readouterr().out
    assert "| model |" in output and "| unseen images |" in output
    assert main([*words, "--num_images", "99", "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "at most 36" in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_evaluate_with_a_scheduler_of_diffusers(pipeline, image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    pipeline.save_pretrained(tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--reference", str(image_folder), "--num_images", "8"]
    words += ["--steps", "2", "--cache_dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    losses = []
    for scheduler in ([], ["--scheduler", "EDMEulerScheduler"]):
        assert main([*words, *scheduler]) == 0
        record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert record["settings"].get("scheduler") == (scheduler[1] if scheduler else None)
        assert "class_accuracy" not in record["measures"]  # the judge knows larger images only
        losses.append(record["measures"]["validation_loss"])
    assert losses[0] == losses[1]  # of the denoiser, whatever samples from it

    assert main([*words, "--validation_images", "0"]) == 0
    assert "validation_loss" not in json.loads((tmp_path / "out" / "evaluation.json").read_text())["measures"]


@pytest.mark.parametrize(
    "words",
    [
        ["--classification", "--steps", "9"],
        ["--classification", "--validation_images", "0"],
        ["--curve"],
        ["--classification", "--scheduler", "heun"],
    ],
)
def test_evaluate_refuses_options_without_a_use(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", "--reference", "any", *words])
    assert exit_info.value.code == 2 and "has no effect with" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r"pet-pipeline\[eval\]"):
        FEATURE_EXTRACTORS["efficientnet"]()
