"""Model cards and the evaluations that they show."""

import json
import re
import shutil
from importlib.metadata import Distribution, PackageNotFoundError

import pytest
import torch
import yaml
from conftest import random_model
from huggingface_hub import ModelCard
from setuptools import build_meta
from support.loading import ROOT
from support.publishing import RECORD, rendered
from support.training_process import train

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.publishing import card
from pet_pipeline.publishing.card import CARD_OPTIONS, TEMPLATE, project_url
from pet_pipeline.publishing.client import hub_id
from pet_pipeline.publishing.push import push_folder


def test_the_card_has_every_option_that_its_template_names():
    template = TEMPLATE.read_text(encoding="utf-8")
    assert set(re.findall(r"options\.(\w+)", template)) == set(CARD_OPTIONS)


def test_the_card_of_a_cifar10_model(saved, pipeline):
    (saved / "samples.png").write_bytes(b"picture")
    text = rendered(saved, pipeline, "uoft-cs/cifar10", validation_loss=0.3271519)
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "diffusers" and data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["datasets"] == ["uoft-cs/cifar10"] and "linear-attention" in data["tags"]
    (model,) = data["model-index"]
    (result,) = model["results"]
    assert result["dataset"] == {"name": "uoft-cs/cifar10", "type": "uoft-cs/cifar10", "split": "train"}
    (metric,) = result["metrics"]
    assert metric == {"type": "validation_loss", "value": 0.327152, "name": "validation loss"}
    assert "# Images of cat and dog, 8×8\n" in text and "(samples.png)" in text
    assert 'from_pretrained("model")' in text and 'from_pretrained("model", trust_remote_code=True)' in text
    assert "9,000 images" in text and "1,000 more were held out" in text and "Krizhevsky" in text
    assert "| length | 3,616 steps, 231,424 images seen, 25.7 passes |" in text
    assert "| noise levels | adaptive draw; ln σ proposed with mean -1.6 and standard deviation 1.4 |" in text
    assert "| duration | 70.0 minutes on 1 × cpu (2 threads) |" in text
    assert "512 unseen images, mean over 16 noise levels | 0.3272 |" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "Memorisation" not in text and "started from" not in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    expected = ["Use", "Training data", "Recipe", "Results", "Intended use", "Limitations", "Citation"]
    assert headings == expected


def test_a_bundled_model_is_no_base_model_of_the_hub(saved, pipeline):
    text = rendered(saved, pipeline, "uoft-cs/cifar10", base_model="fast")
    assert "base_model" not in ModelCard(text).data.to_dict() and "huggingface.co/fast" not in text
    assert "| started from | a pipeline trained before |" in text


def test_the_card_names_the_split(saved, pipeline):
    options = {"train_split": "train[:50%]"}
    text = rendered(saved, pipeline, "uoft-cs/cifar10", options=options, validation_loss=0.3)
    (result,) = ModelCard(text).data.to_dict()["model-index"][0]["results"]
    assert result["dataset"]["split"] == "train[:50%]" and "of the split `train[:50%]` of" in text


def test_the_card_of_a_local_data_set_claims_and_leaks_nothing(image_folder, tmp_path):
    output_dir = tmp_path / "birds"
    train(image_folder, output_dir, classes=["all"], max_train_steps=1)
    text = (output_dir / "README.md").read_text()
    data = ModelCard.load(output_dir / "README.md").data.to_dict()
    assert "datasets" not in data and data["model-index"][0]["results"][0]["dataset"]["type"] == "local"
    for path in (str(tmp_path), str(image_folder), image_folder.name):
        assert path not in text
    assert "CIFAR" not in text and "cifar" not in text and "Krizhevsky" not in text
    assert "`bird`, `cat`, `dog`" in text and "local data set" in text and "float32" in text
    assert "54 images" in text and "6 more were held out" in text
    loss = json.loads((output_dir / "metrics.jsonl").read_text().splitlines()[-1])["validation/loss"]
    assert f"| {loss:.4f} |" in text


def test_what_was_not_measured_is_absent(saved, pipeline):
    text = rendered(saved, pipeline, "uoft-cs/cifar10", base_model="/home/someone/model")
    assert "## Results" not in text and "samples.png" not in text and "validation loss" not in text
    assert not {"model-index", "model_name", "base_model"} & set(ModelCard(text).data.to_dict())
    assert "| started from | a pipeline trained before |" in text and "someone" not in text
    text = rendered(saved, pipeline, "uoft-cs/cifar10", base_model="user/cats")
    assert ModelCard(text).data.base_model == "user/cats" and "https://huggingface.co/user/cats" in text


@pytest.mark.parametrize("url", [None, "https://example.org/pets"])
def test_the_card_links_to_the_home_page_that_the_publisher_set(url, saved, pipeline, tmp_path, monkeypatch):
    # The metadata are made from setup.cfg in which the placeholder has been filled in, or has not.
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pet_pipeline").mkdir()
    shutil.copy(ROOT / "pet_pipeline" / "__init__.py", tmp_path / "pet_pipeline")
    if url is not None:
        settings = (ROOT / "setup.cfg").read_text(encoding="utf-8")
        placeholder = "# url = https://…\n"
        assert settings.count(placeholder) == 1
        (tmp_path / "setup.cfg").write_text(settings.replace(placeholder, f"url = {url}\n"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    build_meta.get_requires_for_build_wheel()  # which writes the metadata, without a package `wheel`
    distribution = Distribution.at(tmp_path / "pet_pipeline.egg-info")
    monkeypatch.setattr(card, "metadata", lambda name: distribution.metadata)
    assert project_url() == url
    text = rendered(saved, pipeline, "uoft-cs/cifar10")
    assert (f"`train_pet.py` of [pet_pipeline]({url})" in text) == (url is not None)
    assert ("`train_pet.py` of pet_pipeline." in text) == (url is None)


def test_a_card_is_written_where_the_package_is_not_installed(saved, pipeline, monkeypatch):
    def metadata(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(card, "metadata", metadata)
    assert "`train_pet.py` of pet_pipeline." in rendered(saved, pipeline, "uoft-cs/cifar10")


def test_the_card_links_to_the_papers_whose_methods_are_used(saved, pipeline):
    def papers(pipeline: PetDiffusionPipeline) -> set[str]:
        return set(re.findall(r"https://arxiv\.org/abs/(\d{4}\.\d{5})\)", rendered(saved, pipeline, "pets")))

    # EDM, linear attention, adaLN-zero, gated convolutions, learned weighting
    always = {"2206.00364", "2006.16236", "2212.09748", "2311.17132", "2312.02696"}
    hourglass, solver, guidance, classifier = "2401.11605", "2211.01095", "2207.12598", "2303.16203"
    assert papers(pipeline) == always | {hourglass, solver, guidance, classifier}
    guide = {"guide": random_model(1), "autoguidance_scale": 1.5, "pag_scale": 0.5, "guidance_scale": 1.0}
    guided = PetDiffusionPipeline.from_pipe(pipeline, **guide)
    assert papers(guided) == always | {hourglass, solver, "2406.02507", "2403.17377", classifier}
    pipeline.scheduler = AdaptiveEDMScheduler(solver="consistency")
    pipeline.register_to_config(guidance_scale=1.0)
    assert papers(pipeline) == always | {hourglass, "2303.01469"}
    flat = PetDiffusionPipeline(
        random_model(num_classes=1, outer_layers=0), AdaptiveEDMScheduler(solver="heun"), guidance_scale=1.0
    )
    assert papers(flat) == always


def test_an_evaluation_is_in_the_card_when_it_is_rendered_and_when_it_is_pushed(hub, saved, pipeline):
    (saved / "README.md").write_text(rendered(saved, pipeline, "uoft-cs/cifar10", validation_loss=0.3))
    (saved / "evaluation.json").write_text(json.dumps(RECORD))
    push_folder(saved, "pets")
    pushed = hub.repositories["user/pets"].files["README.md"].decode()
    texts = [rendered(saved, pipeline, "uoft-cs/cifar10", validation_loss=0.3), pushed]
    for text in texts:
        (result,) = ModelCard(text).data.to_dict()["model-index"][0]["results"]
        values = {metric["type"]: metric["value"] for metric in result["metrics"]}
        assert values["fd_efflite0"] == 12.5 and values["kid_efflite0"] == 0.00625
        assert values["validation_loss"] == 0.25  # of the evaluation
        assert "| FD-EffLite0 | KID-EffLite0 ×10³ |" in text and "| 12.5 | 6.25 |" in text
        assert "## Memorisation\n\n0.10% of these images copy a training image" in text
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "diffusers"
    assert 'from_pretrained("user/pets")' in pushed
    assert 'from_pretrained("model")' in (saved / "README.md").read_text()
    commit = hub.repositories["user/pets"].hashes[1]
    pinned = texts[0].replace('"model", trust', f'"model", revision="{commit}", trust')
    assert pinned.replace('"model"', '"user/pets"') == pushed
    (saved / "README.md").write_text(texts[0].replace("license: apache-2.0", "license: ["))
    with pytest.raises(ValueError, match="The metadata of .* are not valid"):
        push_folder(saved, "pets")


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True)
    assert hub_id("uoft-cs/cifar100") == "uoft-cs/cifar100"
    for name in (None, "uoft-cs/cifar10", "/data/pets", "../pets", "data/pets/all", "~/pets", "C:\\pets"):
        assert hub_id(name) is None
