"""Publishes a Space, which is a web page on the Hugging Face Hub, for a model."""

import re
from importlib.metadata import requires
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, SpaceCardData

from .client import create_repository, full_repo_id, hub_client, readable_errors


GRADIO_VERSION = "6.31.0"
# Versions that ZeroGPU has, which lends a GPU to a Space for the time of a call.
PYTHON_VERSION = "3.12.12"
TORCH_VERSIONS = {"torch": "2.11.0", "torchvision": "0.26.0"}
SOURCE_SUFFIXES = (".py", ".css", ".html", ".js")
APP = """# The web page of a model; see README.md.
import sys
from contextlib import suppress


with suppress(ImportError):
    import spaces  # noqa: F401, lends GPUs on ZeroGPU, and must come before PyTorch

from pet_pipeline.__main__ import main


sys.exit(main(["app", "--model", "{model_id}", "--host", "0.0.0.0"]))
"""


def push_space(model_id: str, token: str | None = None, commit_message: str = "Upload the page") -> str:
    """Publishes a Space with the web page of a model in one commit, and returns the Space's address.

    The Space has the id of the model, and is private if the model is private.

    Raises:
        ValueError: if there is no token or the id is malformed.
        OSError: if the Hub does not have the model, cannot be reached, or refuses the push.
    """
    api = hub_client(token)
    with readable_errors(model_id, api):
        model = api.model_info(full_repo_id(model_id, api))
    files = space_files(model.id, bool(model.private))
    info = create_repository(model.id, model.private or None, token, "space")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in files.items()
    ]
    for sibling in info.siblings or []:
        if sibling.rfilename not in files and sibling.rfilename.startswith("pet_pipeline/"):
            operations.append(CommitOperationDelete(sibling.rfilename, is_folder=False))
    with readable_errors(info.id, api):
        api.create_commit(info.id, operations, commit_message=commit_message, repo_type="space")
    return f"{api.endpoint}/spaces/{info.id}"


def space_files(model_id: str, private: bool = False) -> dict[str, bytes]:
    """Returns the files of a Space: its app, requirements and card, and the source of this package.

    The Space runs the uploaded source, which is the version of the package that published it. The card of a
    private model explains which token the Space needs.
    """
    name = model_id.rpartition("/")[2]
    metadata = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        suggested_hardware="zero-a10g",
        app_file="app.py",
        license="apache-2.0",
        models=[model_id],
    )
    card = (
        f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n"
        f"The web page of [{model_id}](https://huggingface.co/{model_id}), a class-conditional diffusion "
        "model. The page generates images, compares settings, and shows which class an image belongs to and "
        "why. The folder `pet_pipeline` holds the source of the page.\n"
    )
    if private:
        card += (
            "\nThe model is private. The settings of this Space therefore need a secret `HF_TOKEN` with a "
            "token that may read the model.\n"
        )
    files = {
        "app.py": APP.format(model_id=model_id),
        "requirements.txt": space_requirements(),
        "README.md": card,
    }
    package = Path(__file__).parent.parent
    sources = [path for path in sorted(package.rglob("*")) if path.suffix in SOURCE_SUFFIXES]
    return {name: text.encode() for name, text in files.items()} | {
        f"pet_pipeline/{source.relative_to(package).as_posix()}": source.read_bytes() for source in sources
    }


def space_requirements() -> str:
    """Returns the requirements of this package without its extras, with the PyTorch of ZeroGPU.

    The Hub itself installs Gradio.
    """
    texts = [text for text in requires("pet-pipeline") or [] if "extra ==" not in text]
    names = [re.split(r"[^\w-]", text)[0] for text in texts]
    return "".join(
        f"{name}=={TORCH_VERSIONS[name]}\n" if name in TORCH_VERSIONS else f"{text}\n"
        for name, text in zip(names, texts)
    )
