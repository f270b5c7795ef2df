"""Pushes a saved pipeline to the Hugging Face Hub.

A push contains the index, the code, the configurations, the weights as safetensors, the card, the notebook
and the samples of a pipeline. The state of a training, local paths and the token are never part of it.
"""

import os
import re
import textwrap
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard

from ..pipeline_pet_loading import PetPipelineMixin
from .card_evaluation import EVALUATION_END, EVALUATION_START, add_evaluation, read_evaluation
from .client import check_card, create_repository, full_repo_id, hub_client, hub_id, readable_errors
from .folder import path_inside, published_files, read_json, read_text, write_json


# The files that `pet-pipeline evaluate` writes.
EVALUATION_FILES = ("evaluation.json", "generated.png", "neighbors.png")
# The files whose snippets load the pipeline.
SNIPPET_FILES = ("README.md", "notebook.ipynb")


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload the pipeline",
) -> str:
    """Publishes a saved pipeline in one commit, and returns the commit's address.

    The same commit removes files of components and evaluations from the repository if an earlier push left
    them there and the folder no longer has them. A second commit writes the hash of the first one into the
    snippets of the card and of the notebook that run the code of the repository, so that they run no later
    code. The folder itself is only read. A new repository is created after everything has been read and
    checked, so that a refused push does not leave an empty one. See [`create_repository`] for `repo_id`,
    `private` and `token`.

    Raises:
        ValueError: if the folder is not a complete pipeline of safetensors, if its card or its evaluation is
            not valid, if the commit message is empty, or for the reasons of [`create_repository`].
        OSError: if a file cannot be read, if the Hub cannot be reached, or if the Hub refuses the push.
    """
    if not commit_message.strip():
        raise ValueError("`commit_message` must not be empty.")
    # `huggingface_hub` would read another folder: it expands `~`, and takes `link/..` for the current folder.
    folder = Path(os.path.realpath(folder))
    files, api = published_files(folder), hub_client(token)
    with readable_errors(repo_id, api):
        repo_id = full_repo_id(repo_id, api)
    contents = {name: published_content(folder, name, repo_id) for name in files}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in contents.items()
    ]
    if "README.md" in files:
        with readable_errors(repo_id, api):
            check_card(published_card(folder, repo_id), api)
    info = create_repository(repo_id, private, token)
    folders = {name.rpartition("/")[0] for name in files} - {""} | {*PetPipelineMixin._optional_components}
    for sibling in info.siblings or []:
        name = sibling.rfilename
        if name not in files and (name.rpartition("/")[0] in folders or name in EVALUATION_FILES):
            operations.append(CommitOperationDelete(name, is_folder=False))
    with readable_errors(repo_id, api):
        # `upload_folder` may make several commits, between which the repository would not load.
        commit = api.create_commit(repo_id, operations, commit_message=commit_message)
        pinned = [
            CommitOperationAdd(name, pin_snippets(contents[name], repo_id, commit.oid))
            for name in SNIPPET_FILES
            if name in files
        ]
    try:
        if pinned:
            with readable_errors(repo_id, api):
                api.create_commit(
                    repo_id, pinned, commit_message="Pin the snippets to the commit of the code"
                )
    except (ValueError, OSError) as error:
        raise OSError(
            f"The pipeline is published, but its snippets are not pinned to a commit: {error} Push again."
        ) from None
    return commit.commit_url


def pin_snippets(content: Path | bytes, repo_id: str, revision: str) -> bytes:
    """Adds the hash of a commit to each snippet in a card or a notebook that trusts the code of `repo_id`."""
    assert isinstance(content, bytes)
    call = r"from_pretrained\((\\?\")" + re.escape(repo_id) + r"\1, (?=trust_remote_code=True)"
    return re.sub(call, rf"\g<0>revision=\g<1>{revision}\g<1>, ", content.decode()).encode()


def published_content(folder: Path, name: str, repo_id: str) -> Path | bytes:
    """Returns the bytes to publish for a name of [`published_files`], or the path of a file of weights.

    Local paths are removed from JSON files, and the snippets of the card and of the notebook are given the id
    of their repository. The other files are read here, so that exactly what was checked is published,
    whatever happens to the folder afterwards.
    """
    path = path_inside(folder, name)
    if name == "README.md":
        return published_card(folder, repo_id).encode()
    if name == "notebook.ipynb":
        return name_repository(read_text(path), repo_id).encode()
    if name == "evaluation.json":
        record = read_evaluation(path)
        reference = hub_id(record["settings"].get("reference")) or "local data set"
        record["settings"] |= {"model": repo_id, "reference": reference}
        return write_json(record)
    if path.suffix == ".safetensors":
        return path
    if path.suffix != ".json":
        return path.read_bytes()
    content = read_json(path)
    if "_name_or_path" not in content:  # here diffusers keeps the folder that the pipeline was loaded from
        return path.read_bytes()
    del content["_name_or_path"]
    return write_json(content)


def published_card(folder: Path, repo_id: str) -> str:
    """Returns the card of a folder with the id of its repository and with the folder's evaluation, if any."""
    path, evaluation = path_inside(folder, "README.md"), path_inside(folder, "evaluation.json")
    text = name_repository(read_text(path), repo_id)
    record = read_evaluation(evaluation) if evaluation.is_file() else None
    try:
        card = ModelCard(text)
        if record is None or EVALUATION_START not in text or EVALUATION_END not in text:
            return text
        add_evaluation(card, record, repo_id)
        return card.content
    except Exception as error:  # the parser of YAML and the types of the metadata raise many kinds
        message = textwrap.shorten(str(error), 300)
        raise ValueError(f"The metadata of {str(path)!r} are not valid: {message}") from None


def name_repository(text: str, repo_id: str) -> str:
    """Lets the snippets of a card or a notebook, in which quotes are escaped, load a repository of the Hub.

    A snippet loads its own folder by a name without a slash. The ids of other repositories have a slash. JSON
    writes some characters as `\\u` and four digits, and a notebook that text once more.
    """
    name = r"(?:[^\"/\\]|\\+u[0-9a-f]{4})+"
    return re.sub(r"(from_pretrained\((\\?\"))" + name + r"\2", rf"\g<1>{repo_id}\g<2>", text)
