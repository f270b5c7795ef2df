"""Pushing a pipeline to a stand-in for the Hub, by a training and from a folder."""

import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub.constants
import pytest
import torch
from conftest import random_model
from diffusers import EDMEulerScheduler
from PIL import Image
from support.hub_server import TOKEN, use
from support.loading import DRAW, GENERIC, INSTALLED, ROOT, image_sum
from support.publishing import PIPELINE_FILES, RECORD, contents, rendered
from support.training_process import train

import train_pet
from pet_pipeline import PetDiffusionPipeline, PetLinearProbe
from pet_pipeline.__main__ import main
from pet_pipeline.publishing.folder import published_files
from pet_pipeline.publishing.notebook import render_notebook
from pet_pipeline.publishing.push import name_repository, push_folder


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
    pin = "Pin the snippets to the commit of the code"
    assert repository.messages[1:] == ["Step 1", pin, "End of the training, step 2", pin]
    written = {"README.md", "notebook.ipynb", "samples.png"}
    assert set(repository.files) == {*PIPELINE_FILES, *written, ".gitattributes"}
    assert {"checkpoint-1", "best", "logs", "metrics.jsonl"} <= {path.name for path in output_dir.iterdir()}
    for name in ("transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"):
        assert repository.files[name] == (output_dir / name).read_bytes()
    with Image.open(output_dir / "samples.png") as grid:
        assert grid.size[0] > 8 * 16  # seeds 0 to 7


def test_snippets_that_trust_code_name_its_commit(pushed_run):
    server, output_dir = pushed_run
    repository = server.repositories["user/pets"]
    for index in (1, 3):
        pushed, pinned = repository.commits[index], repository.commits[index + 1]
        assert {name for name in pinned if pinned[name] != pushed[name]} == {"README.md", "notebook.ipynb"}
        card, notebook = pinned["README.md"].decode(), pinned["notebook.ipynb"].decode()
        snippet = f'"user/pets", revision="{repository.hashes[index]}", trust_remote_code=True'
        assert card.count("trust_remote_code=True") == card.count(snippet) == 1
        assert notebook.count("trust_remote_code=True") == notebook.count(json.dumps(snippet)[1:-1]) == 2
        assert 'from_pretrained("user/pets")' in card  # the snippet with the package, which needs no trust
    assert "revision=" not in (output_dir / "README.md").read_text()


@pytest.mark.parametrize("name", ["größe", "cats&dogs", "it's", "plain"])
def test_snippets_name_the_repository_whatever_the_name_of_the_folder(pipeline, tmp_path, name):
    card = rendered(tmp_path / name, pipeline, "uoft-cs/cifar10")
    for text in (card, render_notebook(name, pipeline)):
        named = name_repository(text, "user/pets")
        loaded = re.findall(r"from_pretrained\(\\?\"(.*?)\\?\"", named)
        assert loaded and set(loaded) == {"user/pets"}


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
    assert hub.repositories["user/pets"].messages[1] == "Later"
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
    # Components that are optional leave no file behind.
    probed = PetDiffusionPipeline.from_pipe(pipeline, probe=PetLinearProbe(2, 16), guide=random_model(1))
    probed.save_pretrained(saved)
    push_folder(saved, "user/pets")
    assert {name.partition("/")[0] for name in repository.files} >= {"probe", "guide"}
    pipeline.save_pretrained(saved)
    shutil.rmtree(saved / "probe")
    push_folder(saved, "user/pets")
    assert not {name.partition("/")[0] for name in repository.files} & {"probe", "guide"}


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
