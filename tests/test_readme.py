"""Every snippet of README is run, with a tiny model and a data set of its own."""

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
from conftest import TINY
from test_evaluation import Pixels

import train_pet
from pet_pipeline import PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.app import serve
from pet_pipeline.evaluation import evaluate, load_reference
from pet_pipeline.metrics import FEATURE_EXTRACTORS


README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
# What is installed and tested by `.ci/run`, which takes it from README itself, or is a setting of the shell.
ELSEWHERE = ("python3 -m venv", "pip install", "ruff", "pytest", "export", "source")


def commands() -> list[list[str]]:
    """The words of every command of README, `A && B` taken apart."""
    lines = "".join(code.replace("\\\n", " ") for language, code in BLOCKS if language == "bash").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if part and not part.startswith(ELSEWHERE)]


@pytest.fixture
def readme_folder(pipeline, image_folder, tmp_path, monkeypatch):
    """A folder to run README in: `out` and the bundled model are tiny pipelines."""
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("out")
    from_pretrained = PetDiffusionPipeline.from_pretrained.__func__

    def load(cls, path=None, **kwargs):
        known = {None: "out", "user/pets": "out"}
        pipe = from_pretrained(cls, known.get(path, path), **kwargs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    monkeypatch.setattr(PetDiffusionPipeline, "from_pretrained", classmethod(load))
    classifier = PetClassificationPipeline.from_pipe
    monkeypatch.setattr(
        PetClassificationPipeline, "from_pretrained", lambda: classifier(load(PetDiffusionPipeline))
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def test_python_snippets(readme_folder, data_folder, monkeypatch):
    monkeypatch.setattr("pet_pipeline.metrics.EfficientNetLite0Features", Pixels)
    monkeypatch.setattr(
        "pet_pipeline.evaluation.evaluate",
        lambda *args, **kwargs: evaluate(*args, **{**kwargs, "num_images": 8}),
    )
    monkeypatch.setattr(
        "pet_pipeline.evaluation.load_reference",
        lambda name, classes, resolution: load_reference(data_folder, classes, 8, cache_dir="cache"),
    )
    # Compiling is tested elsewhere.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **kwargs: None)
    main(["generate", "--num_samples", "1", "--steps", "1", "--out", "samples"])
    namespace = {}
    snippets = [code for language, code in BLOCKS if language == "python"]
    assert len(snippets) >= 6
    for code in snippets:
        exec(compile(code, str(README), "exec"), namespace)
    assert len(namespace["images"]) == 8 and Path("cat.png").exists()
    assert namespace["record"]["measures"]["num_images"] == 8
    assert namespace["output"].num_evaluations and "Classification" in type(namespace["classify"]).__name__


@pytest.fixture
def data_folder(image_folder, tmp_path):
    """An image folder of the classes that README names, with a training and a test split."""
    for split in ("train", "test"):
        for name, source in zip(
            ("cat", "dog", "ship", "truck", "horse"), ("cat", "dog", "bird", "cat", "dog")
        ):
            shutil.copytree(image_folder / source, tmp_path / "data" / split / name)
    return str(tmp_path / "data")


def test_commands(readme_folder, data_folder, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr("pet_pipeline.hub.push_folder", lambda folder, *args, **kwargs: pushed.append(folder))
    monkeypatch.setattr("pet_pipeline.hub.push_space", lambda name, *args: pushed.append(f"spaces/{name}"))
    pages = []

    def launch(*args, **kwargs) -> None:
        """Serves a page and looks at it once, instead of serving it until Ctrl-C."""
        with serve(*args, **kwargs) as url:
            pages.append(httpx.get(url).text)

    monkeypatch.setattr("pet_pipeline.app.launch", launch)
    monkeypatch.setattr(train_pet, "push_folder", lambda folder, *args, **kwargs: pushed.append(str(folder)))
    monkeypatch.setattr(train_pet, "create_repository", lambda name, *args: SimpleNamespace(id=name))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **kwargs: None)
    monkeypatch.setitem(FEATURE_EXTRACTORS, "efficientnet", Pixels)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", "assets")
    trained = []

    def smaller(words: list[str]) -> list[str]:
        """The same command for a data set and lengths that take no time."""
        names = {"uoft-cs/cifar10": data_folder, "my-photos": data_folder, "pet_pipeline/pretrained": "out"}
        words = [names.get(word, word) for word in words]
        for option, value in (
            ("--num_images", "8"),
            ("--max_train_minutes", None),
            ("--max_train_steps", None),
        ):
            if option in words:
                index = words.index(option)
                words[index : index + 2] = [option, value] if value else []
        return words

    def train(words: list[str]) -> None:
        config = {name: value for name, value in TINY.items() if name != "sample_size"}
        if "--model_config" in words:
            index = words.index("--model_config")
            config |= json.loads(words[index + 1])
            del words[index : index + 2]
        steps = "2" if "--resume_from_checkpoint" in words else "1"
        if "--pretrained_model_name_or_path" not in words:
            words += ["--model_config", json.dumps(config)]
        words += ["--max_train_steps", steps, "--train_batch_size", "4"]
        words += ["--resolution", "8", "--preview_images", "1", "--cache_dir", "cache"]
        words += ["--mixed_precision", "no"]  # which a process can set only once
        AcceleratorState._reset_state(reset_partial_state=True)
        train_pet.main(train_pet.parse_args(words), train_pet.TrainingState())
        trained.append(words)

    for words in commands():
        words = smaller(words)
        if "train_pet.py" in words:
            train(words[words.index("train_pet.py") + 1 :])
        elif words[0] == "pet-pipeline":
            if words[1] == "evaluate":
                words += ["--num_images", "8"]
                words += ["--num_evaluations", "4"] if "--classification" in words else []
            elif words[1] == "calibrate":
                words += ["--num_evaluations", "16"]
            assert main(words[1:]) == 0, (words, capsys.readouterr().err)
        else:
            raise AssertionError(f"README has a command that no test runs: {words}")
    for path in ("stronger/strip.png", "why.png", "traffic/evaluation.json", "evaluation/reliability.png"):
        assert Path(path).exists(), path
    assert len(trained) == 9 and pushed == ["out", "pets", "out", "spaces/user/pets"]
    assert len(pages) == 2 and all("pet_pipeline" in page for page in pages)
