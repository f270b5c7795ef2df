"""Folders that must not be pushed: links, strange names, malformed JSON, damaged weights."""

import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, snapshot_download
from support.hub_server import HubServer
from support.publishing import RECORD, edit, rendered

from pet_pipeline.__main__ import main
from pet_pipeline.publishing import push
from pet_pipeline.publishing.folder import published_files
from pet_pipeline.publishing.push import published_content, push_folder


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
    "name",
    ["samples.png", "transformer/config.json", "transformer/extra.json", "transformer", "README.md"]
    + ["notebook.ipynb"],
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
