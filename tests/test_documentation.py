"""Every snippet of README and of the guides is run, with a tiny model and a data set of its own."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import TINY, random_model
from support.features import Pixels

import train_pet
from pet_pipeline import PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.app import serve
from pet_pipeline.evaluation.images import evaluate
from pet_pipeline.evaluation.metrics import FEATURE_EXTRACTORS
from pet_pipeline.evaluation.reference import load_reference


ROOT = Path(__file__).parent.parent
# Each document, and files that its snippets make.
DOCUMENTS = {
    "README.md": ["samples/grid.png", "cat.png", "why.png", "out/README.md"],
    "docs/sampling.md": [
        "again/dog-3.png",
        "stronger/strip.png",
        "stronger/steps.png",
        "edited/grid.png",
        "guided/guide/config.json",
        "why.png",
    ],
    "docs/training.md": [
        "out/metrics.jsonl",
        "traffic/evaluation.json",
        "photographs/evaluation.json",
        "mine/model_index.json",
        "quick/lora/pytorch_lora_weights.safetensors",
    ],
    "docs/evaluation.md": ["evaluation/evaluation.json", "evaluation/reliability.png"],
    "docs/hub.md": ["pets/model_index.json"],
    "docs/export.md": ["exported/transformer.onnx", "page/index.html"],
}
# `.ci/run` takes the commands that install and test from README; the shell has the others.
ELSEWHERE = ("python3 -m venv", "pip install", "ruff", "mypy", "pytest", "export", "source")


def commands(code: str) -> list[list[str]]:
    """Returns the words of every command of a block; `A && B` is two commands."""
    lines = code.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part and not part.startswith(ELSEWHERE)]


@pytest.fixture
def workspace(pipeline, image_folder, tmp_path, monkeypatch):
    """A working folder in which `out`, `user/pets` and the bundled model are tiny pipelines."""
    monkeypatch.chdir(tmp_path)
    guided = PetDiffusionPipeline.from_pipe(pipeline, guide=random_model(1), autoguidance_scale=1.5)
    guided.save_pretrained("saved")
    for split in ("train", "test"):
        for name, source in {
            "cat": "cat",
            "dog": "dog",
            "ship": "bird",
            "truck": "cat",
            "horse": "dog",
        }.items():
            shutil.copytree(image_folder / source, tmp_path / "data" / split / name)
    from_pretrained = PetDiffusionPipeline.from_pretrained.__func__

    def load(cls, path=None, **kwargs):
        known = {None: "saved", "user/pets": "saved", "user/small-pets": "saved"}
        path = "saved" if path == "out" and not Path("out").exists() else known.get(path, path)
        pipe = from_pretrained(cls, path, **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    monkeypatch.setattr(PetDiffusionPipeline, "from_pretrained", classmethod(load))
    classifier = PetClassificationPipeline.from_pipe
    monkeypatch.setattr(
        PetClassificationPipeline, "from_pretrained", lambda: classifier(load(PetDiffusionPipeline))
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Compiling is tested elsewhere.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **kwargs: None)
    return tmp_path


@pytest.fixture
def pushed(workspace, monkeypatch):
    """What the snippets push, instead of pushing it."""
    names = []
    monkeypatch.setattr(
        "pet_pipeline.publishing.push.push_folder", lambda folder, *args, **kwargs: names.append(folder)
    )
    monkeypatch.setattr(
        "pet_pipeline.publishing.space.push_space", lambda name, *args: names.append(f"spaces/{name}")
    )
    monkeypatch.setattr(train_pet, "push_folder", lambda folder, *args, **kwargs: names.append(str(folder)))
    monkeypatch.setattr(train_pet, "create_repository", lambda name, *args: SimpleNamespace(id=name))
    return names


@pytest.fixture
def pages(workspace, monkeypatch):
    """The pages that the snippets serve: each is looked at once, instead of being served until Ctrl-C."""
    texts = []

    def launch(*args, **kwargs) -> None:
        with serve(*args, **kwargs) as url:
            texts.append(httpx.get(url).text)

    monkeypatch.setattr("pet_pipeline.app.launch", launch)
    monkeypatch.setattr("pet_pipeline.export.web_page.fetch_runtime", lambda folder: None)
    return texts


@pytest.fixture
def small_measurements(workspace, monkeypatch):
    """Evaluations of 8 images with features that need no network."""
    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    monkeypatch.setattr("pet_pipeline.evaluation.metrics.EfficientNetLite0Features", Pixels)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", "assets")

    def evaluate_few(*args, **kwargs):
        return evaluate(*args, **(kwargs | ({"num_images": 8} if "num_images" in kwargs else {})))

    def load_tiny(name, classes, resolution, *args, **kwargs):
        return load_reference("data", classes, 8, *args, **{**kwargs, "cache_dir": "cache"})

    monkeypatch.setattr("pet_pipeline.evaluation.images.evaluate", evaluate_few)
    monkeypatch.setattr("pet_pipeline.evaluation.reference.load_reference", load_tiny)


def smaller(words: list[str]) -> list[str]:
    """Returns the same command for a data set and for lengths that take no time."""
    names = {name: "data" for name in ("uoft-cs/cifar10", "huggan/AFHQ", "my-photos")}
    names["pet_pipeline/pretrained"] = "saved"
    if words[1] == "export":
        names["fast"] = "saved"
        words = [*words, "--autoguidance_scale", "1"]  # the export of a guide takes as long again
    words = [names.get(word, word) for word in words]
    if words[1] in ("calibrate", "push") and not Path("out").exists():
        words = ["saved" if word == "out" else word for word in words]
    for option in ("--num_images", "--max_train_minutes", "--max_train_steps"):
        if option in words:
            index = words.index(option)
            del words[index : index + 2]
    if words[1] == "evaluate":
        words += ["--num_images", "8"]
        words += ["--num_evaluations", "4"] if "--classification" in words else []
    return words + (["--num_evaluations", "16"] if words[1] == "calibrate" else [])


def train(words: list[str]) -> None:
    """Trains as the command says, but a tiny model for one step."""
    config = {name: value for name, value in TINY.items() if name != "sample_size"}
    if "--model_config" in words:
        index = words.index("--model_config")
        config |= json.loads(words[index + 1])
        del words[index : index + 2]
    if "--pretrained_model_name_or_path" not in words:
        words += ["--model_config", json.dumps(config)]
    words += ["--max_train_steps", "2" if "--resume_from_checkpoint" in words else "1"]
    words += ["--train_batch_size", "8", "--resolution", "8", "--preview_images", "0", "--cache_dir", "cache"]
    words += ["--mixed_precision", "no"]  # a process can set the precision only once
    AcceleratorState._reset_state(reset_partial_state=True)
    train_pet.main(train_pet.parse_args(words), train_pet.TrainingState())


def run(words: list[str]) -> None:
    """Runs one command of a document."""
    words = smaller(words)
    if "train_pet.py" in words:
        train(words[words.index("train_pet.py") + 1 :])
    elif words[0] == "pet-pipeline":
        assert main(words[1:]) == 0, words
    else:
        raise AssertionError(f"no test runs the command {words}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_snippets(document, workspace, pushed, pages, small_measurements):
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    namespace: dict = {}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, document, "exec"), namespace)
        else:
            for words in commands(code):
                run(words)
    for path in DOCUMENTS[document]:
        assert Path(path).exists(), path
    assert len(pages) == text.count("pet-pipeline app")
    assert len(pushed) == text.count("pet-pipeline push") + text.count("--push_to_hub") + text.count(
        "--space"
    )


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (path.parent / link).exists(), (path.name, link)
