"""Publishing and model cards, against a stand-in for the Hub on the loopback interface."""

import configparser
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
import torch
import yaml
from diffusers import EDMEulerScheduler
from huggingface_hub import ModelCard, snapshot_download
from packaging.requirements import Requirement
from PIL import Image
from support.hub_server import HubServer
from support.loading import DRAW, GENERIC, INSTALLED, ROOT, image_sum
from support.training_process import train

import train_pet
from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.publishing import push
from pet_pipeline.publishing.card import CARD_OPTIONS, TrainingReport, render_model_card
from pet_pipeline.publishing.client import hub_id
from pet_pipeline.publishing.folder import published_files
from pet_pipeline.publishing.push import published_content, push_folder
from pet_pipeline.publishing.space import GRADIO_VERSION, push_space, space_files, space_requirements


TOKEN = "hf_secretsecretsecret"
RECORD = {
    "date": "2026-11-23",
    "settings": {"num_images": 1000, "seed": 0, "num_inference_steps": 18, "reference": "uoft-cs/cifar10"},
    "evaluations_per_image": 27.0,
    "images_per_second": 9.5,
    "measures": {
        "num_images": 1000,
        "num_reference_images": 1000,
        "fd_efflite0": 12.5,
        "kid_efflite0": 0.00625,
        "memorization_ratio": 0.001,
        "nearest_distance": 0.375,
        "validation_loss": 0.25,
    },
}
PIPELINE_FILES = {
    "model_index.json",
    "pipeline_pet_classification.py",
    "pipeline_pet_diffusion.py",
    "pipeline_pet_loading.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_adaptive_edm.py",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/transformer_pet.py",
}


@pytest.fixture(scope="module")
def hub_factory():
    servers = []

    def start() -> HubServer:
        servers.append(HubServer(TOKEN))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def use(server: HubServer, monkeypatch, token: str | None = TOKEN) -> HubServer:
    """Lets this process use the server, with the token in its environment."""
    # These are read from the environment once, when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    return server


@pytest.fixture
def hub(hub_factory, monkeypatch) -> HubServer:
    return use(hub_factory(), monkeypatch)


@pytest.fixture
def saved(pipeline, tmp_path) -> Path:
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Training


@pytest.fixture(scope="module")
def pushed_run(hub_factory, image_folder, tmp_path_factory):
    """A run that pushed at its checkpoint and at its end: server and output folder."""
    output_dir = tmp_path_factory.mktemp("pushed") / "pets"
    with pytest.MonkeyPatch.context() as monkeypatch:
        server = use(hub_factory(), monkeypatch, token=None)
        train(
            image_folder,
            output_dir,
            max_train_steps=2,
            checkpointing_steps=1,
            validation_steps=100,
            report_to="tensorboard",
            push_to_hub=True,
            hub_private_repo=True,
            hub_token=TOKEN,
            hub_strategy="checkpoint",
        )
    return server, output_dir


def test_training_publishes_a_private_pipeline_and_nothing_else(pushed_run):
    server, output_dir = pushed_run
    assert list(server.repositories) == ["user/pets"]
    repository = server.repositories["user/pets"]
    assert repository.private
    assert repository.messages[1:] == ["Step 1", "End of the training, step 2"]
    assert set(repository.files) == {*PIPELINE_FILES, "README.md", "samples.png", ".gitattributes"}
    assert {"checkpoint-1", "best", "logs", "metrics.jsonl"} <= {path.name for path in output_dir.iterdir()}
    for name in ("transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"):
        assert repository.files[name] == (output_dir / name).read_bytes()
    with Image.open(output_dir / "samples.png") as grid:
        assert grid.size[0] > 8 * 16  # seeds 0 to 7


def test_the_token_is_written_nowhere(pushed_run):
    server, output_dir = pushed_run
    for files in (*server.repositories["user/pets"].commits, contents(output_dir)):
        assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert (output_dir / "logs").is_dir()  # where the tracker keeps the options


def test_a_published_pipeline_loads_by_id(pushed_run, tmp_path):
    # With the package: no trust, and no code of the repository. Without: with trust, the same image.
    server, output_dir = pushed_run
    pipe = PetDiffusionPipeline.from_pretrained(output_dir)
    pipe.set_progress_bar_config(disable=True)
    without = "import sys\nsys.modules['pet_pipeline'] = None\n"
    for code in (INSTALLED, without + GENERIC):
        result = subprocess.run(
            [sys.executable, "-c", code.format("user/pets") + DRAW],
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": server.url,
                "HF_HOME": str(tmp_path / str(len(code))),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
                "HF_TOKEN": TOKEN,
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        modules = result.stdout.split()[:2]
        if code == INSTALLED:
            assert modules == ["pet_pipeline.pipeline_pet_diffusion", "pet_pipeline.transformer_pet"]
            assert not list((tmp_path / str(len(code))).rglob("modules/**/*.py"))
        else:
            assert all(module.startswith("diffusers_modules.") for module in modules)
        assert float(result.stdout.split()[-1]) == pytest.approx(image_sum(pipe), rel=1e-5)
        assert TOKEN not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("token", "options", "message"),
    [
        ("hf_wrong", {}, "refused the token"),
        (None, {}, "needs a token"),
        (TOKEN, {"hub_model_id": "someone/pets"}, "may not write to 'someone/pets'"),
        (TOKEN, {"hub_model_id": "a/b/c"}, "is not the id of a repository"),
    ],
)
def test_what_cannot_be_pushed_fails_before_training(
    hub_factory, monkeypatch, image_folder, tmp_path, token, options, message, capfd
):
    server = use(hub_factory(), monkeypatch, token)
    with pytest.raises((ValueError, OSError), match=message) as error_info:
        train(image_folder, tmp_path / "out", push_to_hub=True, **options)
    assert "\n" not in str(error_info.value) and (token is None or token not in str(error_info.value))
    assert not (tmp_path / "out").exists() and not server.repositories
    output = capfd.readouterr()
    assert token is None or token not in output.out + output.err


def test_a_failed_push_neither_stops_a_training_nor_loses_anything(hub, image_folder, tmp_path, capfd):
    hub.faults["/commit/"] = 0
    output_dir = tmp_path / "out"
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "hub_strategy": "checkpoint"}
    with (
        pytest.warns(UserWarning, match="Step 1 was not pushed to the Hub. The connection to .* failed"),
        pytest.raises(SystemExit) as exit_info,
    ):
        train(image_folder, output_dir, push_to_hub=True, hub_model_id="pets", **options)
    message = exit_info.value.code
    assert f"`pet-pipeline push {output_dir} user/pets`" in message and "\n" not in message
    assert len(hub.repositories["user/pets"].commits) == 1
    assert PetDiffusionPipeline.from_pretrained(output_dir).id2label == {0: "cat", 1: "dog"}
    hub.faults.clear()
    assert main(["push", str(output_dir), "user/pets", "--message", "Later"]) == 0
    assert hub.repositories["user/pets"].messages[-1] == "Later"
    output = capfd.readouterr()
    assert f"{hub.url}/user/pets/commit/" in output.out
    assert TOKEN not in output.out + output.err + message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hub_model_id", "user/pets"], "--hub_model_id requires --push_to_hub"),
        (["--hub_strategy", "checkpoint"], "--hub_strategy requires --push_to_hub"),
        (["--push_to_hub", "--hub_token", TOKEN, "--report_to", "wandb"], "wandb records the command line"),
    ],
)
def test_hub_flags_that_make_no_sense_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train_pet.parse_args(["--max_train_steps", "1", *words])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2 and message in error and TOKEN not in error


# Pushing a folder


def test_a_second_push_updates_the_repository(hub, saved, pipeline):
    (saved / "samples.png").write_bytes(b"picture")
    (saved / "evaluation.json").write_text(json.dumps(RECORD | {"settings": {"reference": "/x/y"}}))
    (saved / "neighbors.png").write_bytes(b"somebody's photographs")
    push_folder(saved, "pets")
    repository = hub.repositories["user/pets"]
    assert not repository.private
    assert set(repository.files) == {*PIPELINE_FILES, "samples.png", "evaluation.json", ".gitattributes"}
    assert b"/x/y" not in repository.files["evaluation.json"]
    push_folder(saved, "user/pets")  # nothing has changed: no commit
    assert len(repository.commits) == 2
    pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(saved)
    (saved / "samples.png").write_bytes(b"another picture")
    (saved / "evaluation.json").unlink()
    before = contents(saved)
    push_folder(saved, "user/pets", commit_message="Euler")
    assert contents(saved) == before
    assert len(repository.commits) == 3 and repository.messages[-1] == "Euler"
    assert set(repository.files) == {
        *(PIPELINE_FILES - {"scheduler/scheduling_adaptive_edm.py"}),
        "samples.png",
        ".gitattributes",
    }
    assert repository.files["samples.png"] == b"another picture"


def test_paths_of_this_machine_stay_here(hub, saved, tmp_path):
    # diffusers notes in the configurations where a pipeline was loaded from.
    PetDiffusionPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert str(tmp_path) in (tmp_path / "again" / "model_index.json").read_text()
    push_folder(tmp_path / "again", "pets")
    for content in hub.repositories["user/pets"].files.values():
        assert str(tmp_path).encode() not in content


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("/commit/", 0, "The connection to http://127.0.0.1:.* failed"),
        ("/commit/", 403, "The token may not write to 'user/pets'"),
        ("/preupload/", 418, "The Hub answered 418 for 'user/pets': made to fail for Bearer …"),
        ("/storage/", 403, "The token may not write"),
        ("/auth-check", 403, "The token may not write to 'user/pets'"),
    ],
)
def test_failures_of_the_hub_are_one_line(hub, saved, fault, status, message, capsys):
    hub.faults[fault] = status
    before = contents(saved)
    assert main(["push", str(saved), "user/pets"]) == 1
    output = capsys.readouterr()
    # The progress bar of what was broken off may stand before it.
    assert re.search(rf"pet-pipeline: {message}[^\n]*\n$", output.err), output.err
    assert "Traceback" not in output.err and TOKEN not in output.out + output.err
    assert contents(saved) == before and len(hub.repositories["user/pets"].commits) == 1
    hub.faults.clear()
    assert main(["push", str(saved), "user/pets"]) == 0


def test_a_hub_that_is_not_there(hub, saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="The connection to http://127.0.0.1:9 failed"):
        push_folder(saved, "pets")


def test_a_token_that_is_none_is_not_quoted(hub, saved):
    with pytest.raises(ValueError, match="must not have spaces") as error_info:
        push_folder(saved, "pets", token="hf_two\nlines")
    assert "hf_two" not in str(error_info.value) and not hub.requests


def test_a_public_repository_is_not_taken_for_a_private_one(hub, saved):
    push_folder(saved, "pets")
    with pytest.raises(ValueError, match="already exists and is public"):
        push_folder(saved, "pets", private=True)
    assert main(["push", str(saved), "hidden", "--private", "--token", TOKEN]) == 0
    assert hub.repositories["user/hidden"].private


def test_folders_that_are_no_complete_pipeline_are_refused(hub, saved, tmp_path, capsys):
    weights = saved / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    assert "transformer/diffusion_pytorch_model.bin" not in published_files(saved)
    content = weights.read_bytes()
    weights.unlink()
    for spoil, message in (
        (lambda: None, "weights of `transformer` only as a pickle"),
        (weights.with_suffix(".bin").unlink, "`transformer` has no safetensors"),
        (lambda: weights.write_bytes(content), None),
        ((saved / "transformer" / "transformer_pet.py").unlink, "transformer/transformer_pet.py is missing"),
        ((saved / "scheduler" / "scheduler_config.json").unlink, "`scheduler` has no configuration"),
        (lambda: (saved / "model_index.json").write_text("{"), "is not JSON"),
        ((saved / "model_index.json").unlink, "is not a saved pipeline"),
    ):
        spoil()
        if message is not None:
            with pytest.raises(ValueError, match=message):
                push_folder(saved, "pets")
    assert main(["push", str(tmp_path / "nowhere"), "pets"]) == 1
    assert "is not a saved pipeline" in capsys.readouterr().err
    assert not hub.requests


# Hostile folders


OUTSIDE: list[Path] = []  # folders that no test below may look into
OPENED: list[str] = []  # what was opened or listed there


def watch(event: str, args: tuple) -> None:
    if OUTSIDE and event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, os.PathLike)):
        path = Path(os.path.realpath(args[0]))
        if any(path.is_relative_to(folder) for folder in OUTSIDE):
            OPENED.append(str(path))


sys.addaudithook(watch)


@pytest.fixture
def outside(saved, tmp_path) -> Iterator[Path]:
    """A folder with everything that a component or a pipeline has, which nothing may read."""
    folder = tmp_path / "outside"
    shutil.copytree(saved / "transformer", folder)
    (folder / "samples.png").write_bytes(b"private")
    OUTSIDE[:], OPENED[:] = [folder], []
    yield folder
    OUTSIDE[:], OPENED[:] = [], []


def push_is_refused(saved: Path, hub: HubServer, capsys, message: str) -> None:
    assert main(["push", str(saved), "pets"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pet-pipeline: ") and error.count("\n") == 1 and len(error) < 1000, error
    assert re.search(message, error), error
    assert not hub.repositories and not hub.storage
    assert not OPENED


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "name",
    ["{outside}", "../outside", "transformer/../../outside", "transformer/.", "..", ".", "", "C:\\x", "a\\b"]
    + ["~", "$HOME", ".git", "a\nb", "nul\0l", "\ud800", "x" * 10_000],
    ids=lambda name: ascii(name[:30]),
)
@pytest.mark.parametrize("place", ["component", "library", "_class_name", "weight_map"])
def test_names_that_are_not_of_the_folder_are_refused(hub, saved, outside, capsys, place, name):
    name = name.format(outside=outside)
    (outside.parent / "outside.py").write_text("secret = 1\n")
    OUTSIDE.append(outside.parent / "outside.py")
    if place == "component":
        edit(saved / "model_index.json", **{name: ["diffusers", "AutoModel"]})
    elif place == "library":
        edit(saved / "model_index.json", transformer=[name, "AutoModel"])
    elif place == "_class_name":
        edit(saved / "model_index.json", _class_name=[name, "PetDiffusionPipeline"])
    else:
        shard = f"{name}{'/diffusion_pytorch_model' if 'outside' in name else ''}.safetensors"
        index = {"weight_map": {"proj_out.weight": shard}}
        (saved / "transformer" / "a.safetensors.index.json").write_text(json.dumps(index))
    # With a suffix, some of these are names of files inside the folder, which are not there.
    push_is_refused(saved, hub, capsys, "is not the name of a file|is missing|is not JSON: 'utf-8'")


@pytest.mark.parametrize(
    "name", ["samples.png", "transformer/config.json", "transformer/extra.json", "transformer", "README.md"]
)
def test_links_that_leave_the_folder_are_refused(hub, saved, outside, capsys, name):
    path = saved / name
    if path.is_dir():
        shutil.rmtree(path)
        path.symlink_to(outside)
    else:
        path.unlink(missing_ok=True)
        path.symlink_to(outside / "samples.png")
    push_is_refused(saved, hub, capsys, "is a link that leads out of the folder")


def test_a_snapshot_of_the_cache_of_the_hub_can_be_pushed(hub, saved, tmp_path):
    push_folder(saved, "pets")
    snapshot = Path(snapshot_download("user/pets", cache_dir=tmp_path / "cache"))
    assert (snapshot / "model_index.json").is_symlink()
    push_folder(snapshot, "copy")
    assert hub.repositories["user/copy"].files == hub.repositories["user/pets"].files
    # Links to another repository of the cache, and into a folder that only has the names of the cache's.
    weights = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    for private in (tmp_path / "cache" / "models--user--private" / "blobs", tmp_path / "blobs"):
        private.mkdir(parents=True)
        (private / "weights").write_bytes(content)
        weights.unlink()
        weights.symlink_to(private / "weights")
        with pytest.raises(ValueError, match="is a link that leads out of the folder"):
            push_folder(snapshot, "copy")


SHAPES = [None, True, -1, 10**400, 0.5, float("nan"), "", "text\n# Title", "\ud800", "x" * 10_000, [], [[]]]
SHAPES += [[1], [None, "a"], ["a", None], [{}, {}], ["a", "b", "c"], {}, {"a": []}, {"a": {"b": [1]}}]


def variants(value: Any) -> Iterator[Any]:
    """All values of JSON that differ from `value` in one place: another shape, or an entry more or less."""
    yield from SHAPES
    if isinstance(value, dict):
        for key, item in value.items():
            yield {other: value[other] for other in value if other != key}
            yield from ({**value, key: variant} for variant in variants(item))
        yield from ({**value, "a": shape} for shape in SHAPES)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from (value[:index] + [variant] + value[index + 1 :] for variant in variants(item))


@pytest.mark.parametrize(
    "name",
    ["model_index.json", "transformer/a.safetensors.index.json", "evaluation.json", "README.md"],
)
def test_every_shape_of_json_is_published_or_refused(saved, pipeline, name):
    weights = "diffusion_pytorch_model.safetensors"
    (saved / "transformer" / "a.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": {"proj_out.weight": weights}})
    )
    record = {**RECORD, "floors": {"unseen images": {"nearest_distance": 0.4, "fd_efflite0": 3.0}}}
    (saved / "evaluation.json").write_text(json.dumps(record))
    card = rendered(saved, pipeline, "uoft-cs/cifar10", validation_loss=0.3)
    (saved / "README.md").write_text(card)
    if name == "README.md":  # its front matter, as JSON is YAML
        value, card = ModelCard(card).data.to_dict(), card.split("---\n", 2)[2]
    else:
        value = json.loads((saved / name).read_text())
    refused = []
    # Reading and writing YAML is slow: of the metadata, every seventh variant is tried.
    for variant in itertools.islice(variants(value), 0, None, 7 if name == "README.md" else 1):
        text = json.dumps(variant)
        (saved / name).write_text(f"---\n{text}\n---\n{card}" if name == "README.md" else text)
        try:
            assert {name, "README.md"} <= set(published_files(saved))
            for file in (name, "README.md"):
                published_content(saved, file, "user/pets")
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000 and saved.name in str(error), text
            refused.append(variant)
    assert refused and len(refused) < len(list(variants(value)))


def test_deeply_nested_json_is_refused(hub, saved, capsys):
    (saved / "model_index.json").write_text("[" * 100_000)
    push_is_refused(saved, hub, capsys, "is not JSON")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", json.dumps({**RECORD, "settings": [1]}), "'settings' is \\[1\\]"),
        ("evaluation.json", '{"measures": {}}', "is not a record of `pet-pipeline evaluate`"),
        ("transformer/config.json", "[]", "must hold a JSON object"),
        ("README.md", "---\nlicense: [\n---\n", "The metadata of .* are not valid"),
        ("README.md", "---\nlicense: ''\n---\n", "not metadata"),  # known to the Hub alone
        ("README.md", "---\nlicense:\n---\n", "not metadata"),
        ("README.md", "---\na: " + 5000 * "[" + 5000 * "]" + "\n---\n", "The metadata of .* are not valid"),
        ("README.md", b"\xff", "must be UTF-8"),
    ],
)
def test_a_push_that_is_refused_creates_no_repository(hub, saved, capsys, name, content, message):
    (saved / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    push_is_refused(saved, hub, capsys, message)


def test_a_push_without_a_message_is_refused(hub, saved):
    with pytest.raises(ValueError, match="`commit_message` must not be empty"):
        push_folder(saved, "pets", commit_message=" ")
    assert not hub.requests


def test_a_card_of_many_marks_takes_no_time(saved):
    (saved / "evaluation.json").write_text(json.dumps(RECORD))
    (saved / "README.md").write_text(100_000 * "<!-- evaluation -->\n")
    began = time.monotonic()
    published_content(saved, "README.md", "user/pets")
    assert time.monotonic() - began < 20


def test_a_folder_is_read_where_its_path_leads(hub, saved, tmp_path, monkeypatch):
    # huggingface_hub takes `~` for the home of the user, and `link/..` for the folder of the link.
    (saved / "samples.png").write_bytes(b"of the folder")
    home, folder = tmp_path / "home", tmp_path / "place"
    for path in (home / "model", folder / "model"):
        shutil.copytree(saved, path)
        (path / "samples.png").write_bytes(b"of another folder")
    shutil.copytree(saved, folder / "~" / "model")
    (saved / "sub").mkdir()
    (folder / "link").symlink_to(saved / "sub")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    for number, name in enumerate(("~/model", "./~/model", "link/../../model")):
        push_folder(name, f"pets{number}")
        assert hub.repositories[f"user/pets{number}"].files["samples.png"] == b"of the folder", name


def test_what_was_checked_is_what_is_published(hub, saved, outside, monkeypatch):
    expected = (saved / "transformer" / "config.json").read_bytes()
    create = push.create_repository

    def create_and_replace(*args: Any) -> Any:
        for name in ("transformer/config.json", "pipeline_pet_loading.py", "samples.png"):
            (saved / name).unlink(missing_ok=True)
            (saved / name).symlink_to(outside / "samples.png")
        return create(*args)

    monkeypatch.setattr(push, "create_repository", create_and_replace)
    push_folder(saved, "pets")
    assert hub.repositories["user/pets"].files["transformer/config.json"] == expected
    assert not OPENED


@pytest.mark.parametrize("name", ["config.json", "transformer_pet.py", "weights.bin"])
def test_shards_are_safetensors(hub, saved, capsys, name):
    (saved / "transformer" / "weights.bin").write_bytes(b"pickle")
    index = {"weight_map": {"proj_out.weight": name}}
    (saved / "transformer" / "a.safetensors.index.json").write_text(json.dumps(index))
    push_is_refused(
        saved, hub, capsys, "`weight_map` in .* must map the names of tensors to safetensors files"
    )


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"half", b"more"])
def test_damaged_weights_are_refused(hub, saved, capsys, content):
    path = saved / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = path.read_bytes()
    damaged = {b"half": weights[: len(weights) // 2], b"more": weights + b"more"}
    path.write_bytes(damaged.get(content, content))
    push_is_refused(saved, hub, capsys, "is not safetensors, or is incomplete")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_index.json", "is not a saved pipeline"),
        ("transformer/config.json", "`transformer` has no configuration"),
        ("transformer/diffusion_pytorch_model.safetensors", "`transformer` has no safetensors"),
        ("transformer/transformer_pet.py", "transformer_pet.py is missing"),
        ("samples.png", None),
        ("README.md", None),
    ],
)
def test_pipes_are_not_read(hub, saved, capsys, name, message):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    if message is not None:
        push_is_refused(saved, hub, capsys, message)
    else:
        push_folder(saved, "pets")
        assert name not in hub.repositories["user/pets"].files


def test_files_that_cannot_be_read_are_refused(hub, saved, capsys, monkeypatch):
    def refuse(*args: Any) -> None:  # as the system does, but not to the superuser
        raise PermissionError(13, "Permission denied", "weights")

    monkeypatch.setattr("huggingface_hub._commit_api.UploadInfo.from_path", refuse)
    push_is_refused(saved, hub, capsys, "Permission denied")


def test_a_space_of_a_model_that_is_not_there_creates_nothing(hub):
    with pytest.raises(OSError, match="404 for 'user/pets'"):
        push_space("user/pets")
    assert not hub.repositories


# The Space


def installed_closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that `pip install` of the requirements brings."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        try:
            needed = [Requirement(text) for text in requires(requirement.name) or []]
        except PackageNotFoundError:  # for another system
            continue
        found.add(name)
        extras = requirement.extras or {""}
        waiting += [
            item
            for item in needed
            if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return found


START = """
import runpy, sys
from importlib.machinery import PathFinder


class RequirementsFinder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {refused!r} else super().find_spec(name, path, target)


sys.meta_path = [RequirementsFinder if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, "")
sys.argv = ["app.py"]
import pet_pipeline
assert pet_pipeline.__file__.startswith({tree!r}), pet_pipeline.__file__
runpy.run_path("app.py", run_name="__main__")
"""


def test_a_space_starts_from_what_was_uploaded(hub, saved, tmp_path, capsys):
    pytest.importorskip("gradio")
    assert main(["push", str(saved), "pets", "--private", "--space"]) == 0
    assert f"{hub.url}/spaces/user/pets" in capsys.readouterr().out
    space = hub.repositories["spaces/user/pets"]
    assert space.private and len(space.commits) == 2
    tree = tmp_path / "tree"
    for name, content in space.files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    declared = (tree / "requirements.txt").read_text().split() + [f"gradio=={GRADIO_VERSION}"]
    allowed = installed_closure(declared)
    assert "gradio" in allowed and "torch" in allowed and "datasets" not in allowed
    refused = {
        module
        for module, names in packages_distributions().items()
        if module != "pet_pipeline"
        and not any(re.sub(r"[-_.]+", "-", name).lower() in allowed for name in names)
    }
    assert {"datasets", "peft"} <= refused
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for part in ("app", "commands", "evaluation", "publishing"):
        assert f"pet_pipeline/{part}.py" in space.files or f"pet_pipeline/{part}/__init__.py" in space.files
    (tmp_path / "start.py").write_text(START.format(refused=refused, tree=str(tree)))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "start.py")],
        cwd=tree,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "GRADIO_SERVER_PORT": str(port),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "TMPDIR": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    page = None
    for _ in range(120):
        try:
            page = httpx.get(f"http://127.0.0.1:{port}/config").json()
            break
        except httpx.HTTPError:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    process.terminate()
    output, errors = process.communicate(timeout=30)
    assert page is not None, errors
    assert page["title"] == "pet_pipeline" and page["analytics_enabled"] is False
    assert "Traceback" not in errors and TOKEN not in output + errors
    assert not list(tmp_path.glob("pet-pipeline-*"))  # its temporary folder


def test_the_card_of_a_space(hub, saved):
    card = space_files("user/pets")["README.md"].decode()
    data = ModelCard(card).data.to_dict()
    assert data["sdk"] == "gradio" and data["sdk_version"] == GRADIO_VERSION
    assert data["models"] == ["user/pets"] and data["app_file"] in space_files("user/pets")
    assert "HF_TOKEN" not in card and "HF_TOKEN" in space_files("user/pets", True)["README.md"].decode()
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    gradio, *others = options["options.extras_require"]["app"].split()
    assert Requirement(gradio).specifier.contains(GRADIO_VERSION)
    assert set(space_requirements().split()) == {*options["options"]["install_requires"].split(), *others}
    assert data["python_version"] in options["options"]["python_requires"]
    for pattern in options["options.package_data"]["pet_pipeline"].split():
        if pattern != "py.typed" and not pattern.startswith("pretrained"):  # the model comes from the Hub
            files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pet_pipeline").glob(pattern)}
            assert files <= set(space_files("user/pets")), pattern


def test_a_second_push_of_a_space_updates_it(hub, saved):
    push_folder(saved, "pets")
    push_space("pets")
    space = hub.repositories["spaces/user/pets"]
    assert not space.private
    space.files["pet_pipeline/old.py"] = b"gone"
    space.files["notes.md"] = b"of its owner"
    assert push_space("user/pets", commit_message="Again") == f"{hub.url}/spaces/user/pets"
    assert "pet_pipeline/old.py" not in space.files and space.messages[-1] == "Again"
    assert set(space_files("user/pets")) | {"notes.md", ".gitattributes"} == set(space.files)


def test_a_space_that_cannot_be_written_is_one_line(hub, saved, capsys):
    hub.faults["/api/spaces/"] = 403
    assert main(["push", str(saved), "pets", "--space"]) == 1
    error = capsys.readouterr().err
    assert "The token may not write to 'user/pets'" in error and "Traceback" not in error


# The card


def rendered(folder: Path, pipeline: PetDiffusionPipeline, dataset_name: str, **report) -> str:
    options = vars(train_pet.parse_args(["--max_train_steps", "1"]))
    values = {"num_train_images": 9000, "num_held_out_images": 1000, "num_validation_images": 512}
    values |= {"num_steps": 3616, "num_images_seen": 231424, "seconds": 4200.0}
    values |= {"device": "1 × cpu (2 threads)", "precision": "bf16"}
    values |= {"dataset_name": dataset_name, "options": options, **report}
    text = render_model_card(folder, ROOT / "model_card.md", pipeline, TrainingReport(**values))
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\n\n\n|None|Undefined|N/A|TODO", text)
    assert text.endswith("\n") and not text.endswith("\n\n")
    return text


def test_the_card_has_every_option_that_its_template_names():
    template = (ROOT / "model_card.md").read_text(encoding="utf-8")
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
    assert texts[0].replace('"model"', '"user/pets"') == pushed
    (saved / "README.md").write_text(texts[0].replace("license: apache-2.0", "license: ["))
    with pytest.raises(ValueError, match="The metadata of .* are not valid"):
        push_folder(saved, "pets")


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uoft-cs" / "cifar10").mkdir(parents=True)
    assert hub_id("uoft-cs/cifar100") == "uoft-cs/cifar100"
    for name in (None, "uoft-cs/cifar10", "/data/pets", "../pets", "data/pets/all", "~/pets", "C:\\pets"):
        assert hub_id(name) is None
