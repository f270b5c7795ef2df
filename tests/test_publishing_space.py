"""Publishing a Space, which starts from what was uploaded."""

import configparser
import os
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import httpx
import pytest
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from support.hub_server import TOKEN
from support.loading import ROOT

from pet_pipeline.__main__ import main
from pet_pipeline.publishing.push import push_folder
from pet_pipeline.publishing.space import GRADIO_VERSION, push_space, space_files, space_requirements


def test_a_space_of_a_model_that_is_not_there_creates_nothing(hub):
    with pytest.raises(OSError, match="404 for 'user/pets'"):
        push_space("user/pets")
    assert not hub.repositories


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
    needed = [Requirement(text) for text in (*options["options"]["install_requires"].split(), *others)]
    given = {requirement.name: requirement for requirement in map(Requirement, space_requirements().split())}
    assert list(given) == [requirement.name for requirement in needed]
    for requirement in needed:  # PyTorch is pinned to what ZeroGPU has
        if requirement.name in ("torch", "torchvision"):
            (pin,) = given[requirement.name].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version)
        else:
            assert given[requirement.name] == requirement
    assert "torch==2.11.0" in space_requirements().split()
    assert data["python_version"] == "3.12.12" and data["suggested_hardware"] == "zero-a10g"
    assert SpecifierSet(options["options"]["python_requires"]).contains(data["python_version"])
    for pattern in options["options.package_data"]["pet_pipeline"].split():
        if not pattern.startswith(("py.typed", "pretrained", "publishing")):  # the model comes from the Hub
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
