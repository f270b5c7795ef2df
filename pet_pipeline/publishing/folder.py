"""Finds the files of a saved pipeline that may be published, and reads them.

A folder may come from somebody else. The names in its files and its links are therefore checked here, so that
nothing outside the folder is read.
"""

import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


INDEX = "model_index.json"
# These files are published if they exist. The pictures of an evaluation are not among them, because they may
# show images of a data set that nobody else has.
OPTIONAL_FILES = (
    "pipeline_pet_diffusion.py",
    "pipeline_pet_classification.py",
    "pipeline_pet_loading.py",
    "guidance_pet.py",
    "README.md",
    "notebook.ipynb",
    "samples.png",
    "evaluation.json",
)
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# The name of a file or of a component's folder. It excludes hidden files, `..`, drives and separators.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,199}")
# The classes of these libraries need no source file beside the weights.
KNOWN_LIBRARIES = ("diffusers", "transformers")


def published_files(folder: str | Path) -> list[str]:
    """Lists the files of a saved pipeline that are published, as `"FILE"` or `"COMPONENT/FILE"`.

    Other files in the folder, such as the state of a training, are not listed.

    Raises:
        ValueError: if the pipeline is incomplete, if its weights are damaged or not safetensors, or if a name
            in its files or a link leads out of the folder.
    """
    folder = Path(folder)
    source, components = read_index(folder)
    files = [INDEX] if source is None else [INDEX, f"{source}.py"]
    for component, library in components.items():
        names = file_names(folder, component)
        weights = [name for name in names if name.endswith(".safetensors")]
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        configs = [name for name in names if name.endswith(".json")]
        if pickles and not weights:
            raise ValueError(
                f"{str(folder)!r} holds the weights of `{component}` only as a pickle ({pickles[0]}). "
                "Loading a pickle can run code. Load the pipeline yourself, and save it with "
                "`save_pretrained`."
            )
        # A scheduler has no config.json.
        if not configs or (f"{component}/config.json" in configs and not weights):
            lack = "safetensors" if configs else "configuration"
            raise ValueError(f"{str(folder)!r} is not a complete pipeline: `{component}` has no {lack}.")
        for name in configs:
            if name.endswith(".safetensors.index.json"):
                weights += [f"{component}/{shard}" for shard in read_shards(path_inside(folder, name))]
        files += [*configs, *sorted(set(weights))]
        if library not in KNOWN_LIBRARIES:
            files.append(f"{component}/{library}.py")
    missing = [name for name in files if not path_inside(folder, name).is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} is not a complete pipeline, because {', '.join(missing)} is missing. Load the "
            "pipeline with `PetDiffusionPipeline.from_pretrained`, and save it with `save_pretrained`."
        )
    for name in files:
        if name.endswith(".safetensors"):
            check_safetensors(path_inside(folder, name))
    others = [name for name in OPTIONAL_FILES if name not in files]
    return files + [name for name in others if path_inside(folder, name).is_file()]


def read_index(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Reads the names of the pipeline's source file and of its components from the index.

    The first result is the name of the source file without `.py`, or `None` if the folder does not hold that
    file. The second has for each component its library, or the name of its source file without `.py`.
    """
    path = path_inside(folder, INDEX)
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is not a saved pipeline: it has no {INDEX}.")
    index = read_json(path)
    # The pair of an optional component that the pipeline does not have is two nulls.
    pairs: dict[str, Any] = {
        key: value
        for key, value in index.items()
        if isinstance(value, list) and not key.startswith("_") and value != [None, None]
    }
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        pairs["_class_name"] = class_name
    for key, pair in pairs.items():
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        if not is_pair:
            raise ValueError(
                f"{reprlib.repr(key)} in {str(path)!r} must be a library and a class, but is "
                f"{reprlib.repr(pair)}."
            )
    libraries = {key: library for key, (library, _) in pairs.items()}
    return libraries.pop("_class_name", None), libraries


def read_shards(path: Path) -> list[str]:
    """Reads the names of the files over which weights are split from the index of these files."""
    shards = read_json(path).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
        raise ValueError(f"`weight_map` in {str(path)!r} must map the names of tensors to safetensors files.")
    return names


def check_safetensors(path: Path) -> None:
    """Raises `ValueError` if a file of weights is damaged. Only the header of the file is read."""
    try:
        with path.open("rb"), safe_open(path, framework="numpy"):  # the former says why it cannot read a file
            pass
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not safetensors, or is incomplete: {error}") from None


def file_names(folder: Path, component: str) -> list[str]:
    """Lists the configurations and the weights in the folder of a component, without hidden files."""
    suffixes = (".json", ".safetensors", *PICKLE_SUFFIXES)
    paths = sorted(path for path in path_inside(folder, component).glob("*") if path.suffix in suffixes)
    names = [f"{component}/{path.name}" for path in paths if PLAIN_NAME.fullmatch(path.name)]
    return [name for name in names if path_inside(folder, name).is_file()]


def path_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file or of a component, and checks that this path lies inside the pipeline.

    All paths that a push reads come from this function. `ValueError` is raised if `name` is not `"FILE"`,
    `"COMPONENT"` or `"COMPONENT/FILE"`, or if the path is a link that leads out of the folder. A snapshot in
    the cache of `huggingface_hub` may link to the `blobs` of the same repository.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(PLAIN_NAME.fullmatch(part) for part in parts):
        raise ValueError(f"{reprlib.repr(name)} in {str(folder)!r} is not the name of a file in that folder.")
    root, target = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    roots = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        roots.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{str(folder / name)!r} is a link that leads out of the folder of the pipeline.")
    return folder / name


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, or raises `ValueError`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise ValueError(f"{str(path)!r} must be UTF-8 text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, or raises `ValueError`."""
    try:
        content = json.loads(read_text(path))
        write_json(content)  # JSON can escape half of a surrogate pair, which UTF-8 cannot encode
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object.")
    return content


def write_json(content: Any) -> bytes:
    """Returns a value as indented JSON in UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
