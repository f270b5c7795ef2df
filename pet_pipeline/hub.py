"""Publishing a saved pipeline on the Hugging Face Hub, with its model card, and a Space with its web page.

What is published is a pipeline folder: index, code, configurations, weights as safetensors, card, pictures.
Training state stays at home, and so do local paths and the token.
"""

import json
import os
import re
import reprlib
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    ModelInfo,
    SpaceCardData,
    SpaceInfo,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .evaluation.tables import COLUMNS, markdown_table


if TYPE_CHECKING:
    from .pipeline_pet_diffusion import PetDiffusionPipeline

INDEX = "model_index.json"
EVALUATION_FILES = ("evaluation.json", "generated.png", "neighbors.png")  # of `pet-pipeline evaluate`
# Published where they are there, beside the index and the pipeline's code.
PIPELINE_FILES = (
    "pipeline_pet_diffusion.py",
    "pipeline_pet_classification.py",
    "pipeline_pet_loading.py",
)
# Of an evaluation the numbers alone: its pictures may show images of a data set that nobody else has.
OPTIONAL_FILES = ("README.md", "samples.png", "evaluation.json")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# The name of a file or of a component's folder, which excludes hidden files, `..`, drives and separators.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,199}")
# Libraries whose classes need no source file beside the weights.
KNOWN_LIBRARIES = ("diffusers", "transformers")

# How a card tells of the settings of an evaluation.
SETTING_PHRASES = {
    "seed": "seeds from {} on",
    "num_inference_steps": "{} steps",
    "guidance_scale": "guidance {}",
    "guidance_schedule": "schedule `{}`",
    "pag_scale": "perturbed attention {}",
    "scheduler": "scheduler `{}`",
}

# Options of `train_pet.py` that a card may show; none of them is a path or a secret.
CARD_OPTIONS = (
    "random_flip",
    "noise_schedule",
    "p_mean",
    "p_std",
    "loss",
    "learned_weighting",
    "label_dropout",
    "train_batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "muon_learning_rate",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "use_ema",
    "ema_inv_gamma",
    "ema_power",
    "ema_max_decay",
    "seed",
)
CIFAR10_IDS = ("uoft-cs/cifar10", "cifar10")
TASK = "unconditional-image-generation"  # the Hub has no name for class-conditional generation
# What a Space installs: the requirements of this package and those of its page; the Hub brings Gradio.
SPACE_REQUIREMENTS = (
    "torch>=2.11",
    "torchvision>=0.26",
    "diffusers>=0.42.1",
    "accelerate>=1.15",
    "safetensors>=0.8",
    "huggingface_hub>=2.4",
    "numpy",
    "Pillow",
    "matplotlib",
)
GRADIO_VERSION = "6.31.0"
# Between these marks, which the Hub does not show, a card tells of an evaluation.
EVALUATION_PART = re.compile(r"(<!-- evaluation -->\n).*?(<!-- end of evaluation -->)", re.DOTALL)


@dataclass
class TrainingReport:
    """What a training tells its model card.

    Args:
        dataset_name (`str`): as given to the training; only a Hub id is shown.
        options (`dict[str, Any]`): options of the training, of which [`CARD_OPTIONS`] are shown.
        num_train_images (`int`): images trained on.
        num_held_out_images (`int`): images kept out of the training.
        num_validation_images (`int`): those of them that measure the validation loss.
        num_steps (`int`): optimizer steps.
        num_images_seen (`int`): images seen by all processes, with repetition.
        seconds (`float`): duration.
        device (`str`): kind and number of the devices.
        precision (`str`): of the matrix products: `"no"` (float32), `"bf16"` or `"fp16"`.
        base_model (`str`, *optional*): the pipeline it started from; only a Hub id is shown.
        validation_loss (`float`, *optional*): of exactly these weights, if it was measured.
    """

    dataset_name: str
    options: dict[str, Any]
    num_train_images: int
    num_held_out_images: int
    num_validation_images: int
    num_steps: int
    num_images_seen: int
    seconds: float
    device: str
    precision: str
    base_model: str | None = None
    validation_loss: float | None = None


def hub_id(name: Any) -> str | None:
    """Returns `name` if `name` can be the id of a repository on the Hub, and `None` if it is a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if name is None or Path(name).exists() else name


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        ValueError: if the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise ValueError(f"{str(path)!r} must be UTF-8 text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: if the file does not hold a JSON object.
    """
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


# What is published


def path_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file or a folder of a pipeline, after the check that it lies inside the pipeline.

    Everything that is read for an upload is found by this function, because names come from the files of the
    folder, which somebody else may have written.

    Args:
        folder (`Path`): the folder of the pipeline.
        name (`str`): `"FILE"`, `"COMPONENT"` or `"COMPONENT/FILE"`.

    Raises:
        ValueError: if `name` is not such a name, or if a link at that place leads out of the folder. The
            links of the Hub's cache, from a snapshot to the `blobs` of the same repository, are allowed.
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


def file_names(folder: Path, component: str) -> list[str]:
    """Lists the files in the folder of a component, without hidden files."""
    paths = sorted(path_inside(folder, component).glob("*"))
    names = [f"{component}/{path.name}" for path in paths if PLAIN_NAME.fullmatch(path.name)]
    return [name for name in names if path_inside(folder, name).is_file()]


def read_index(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Reads which sources and components a saved pipeline has.

    Returns:
        `tuple[str | None, dict[str, str]]`: the stem of the source file of the pipeline, `None` if the
        pipeline's class is not of the folder, and the library, or the stem of the source file, of each
        component.

    Raises:
        ValueError: if the index is missing or is not the index of a pipeline.
    """
    path = path_inside(folder, INDEX)
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is not a saved pipeline: it has no {INDEX}.")
    index = read_json(path)

    pairs = {key: value for key, value in index.items() if isinstance(value, list) and key[:1] != "_"}
    # A component that this pipeline does without is a pair of nulls.
    pairs = {key: pair for key, pair in pairs.items() if pair != [None, None]}
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


def published_files(folder: str | Path) -> list[str]:
    """Lists which files of a saved pipeline are published, as paths inside its folder.

    Args:
        folder (`str` or `Path`): a folder that `save_pretrained` wrote; other files in it are left out.

    Raises:
        ValueError: if the pipeline is incomplete, if its weights are not safetensors, or if a name in its
            files or a link leads out of the folder.
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
    others = [name for name in (*PIPELINE_FILES, *OPTIONAL_FILES) if name not in files]
    return files + [name for name in others if path_inside(folder, name).is_file()]


def read_shards(path: Path) -> list[str]:
    """Reads the names of the files over which weights are split from the index of these files.

    Raises:
        ValueError: if the index does not map the names of tensors to the names of files.
    """
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"`weight_map` in {str(path)!r} must map the names of tensors to files.")
    return list(shards.values())


def published_content(folder: Path, name: str, repo_id: str) -> Path | bytes:
    """Returns a file as it is published: without local paths, and the card with the id of its repository."""
    path = path_inside(folder, name)
    if name == "README.md":
        return published_card(folder, repo_id).encode()
    if name == "evaluation.json":
        record = read_evaluation(path)
        reference = hub_id(record["settings"].get("reference")) or "local data set"
        record["settings"] |= {"model": repo_id, "reference": reference}
        return write_json(record)
    if path.suffix != ".json":
        return path
    content = read_json(path)
    if "_name_or_path" not in content:  # where diffusers notes the folder that the pipeline was loaded from
        return path
    del content["_name_or_path"]
    return write_json(content)


def published_card(folder: Path, repo_id: str) -> str:
    """Returns the card with the id of its repository, and with the folder's evaluation if there is one.

    Raises:
        ValueError: if the metadata of the card or the record of the evaluation are not valid.
    """
    path, evaluation = path_inside(folder, "README.md"), path_inside(folder, "evaluation.json")
    text = read_text(path)
    # A card names its own folder, which has no slash; ids of other repositories have one.
    text = re.sub(r"from_pretrained\(\"[^\"/]+\"", f'from_pretrained("{repo_id}"', text)
    record = read_evaluation(evaluation) if evaluation.is_file() else None
    try:
        card = ModelCard(text)
        if record is None or not EVALUATION_PART.search(text):
            return text
        add_evaluation(card, record, repo_id)
        return card.content
    except Exception as error:  # of the YAML parser, or of the metadata's values
        message = textwrap.shorten(str(error), 300)
        raise ValueError(f"The metadata of {str(path)!r} are not valid: {message}") from None


# The Hub


@contextmanager
def readable_errors(repo_id: str, api: HfApi) -> Iterator[None]:
    """Turns whatever `huggingface_hub` raises into one error of one line, without the token."""
    try:
        yield
    except Exception as error:  # HTTP, transport, upload threads, answers that are no JSON: of many kinds
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # raised by a thread
            cause = cause.__cause__
        raise readable_error(cause, repo_id, api) from None


def readable_error(error: BaseException, repo_id: str, api: HfApi) -> ValueError | OSError:
    """Says in a sentence what went wrong on the Hub, and what would be right."""
    if isinstance(error, HFValidationError):
        return ValueError(
            f"{repo_id!r} is not the id of a repository: it has to be NAME or USER/NAME, of letters, digits, "
            "'-', '_' and '.'."
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return PermissionError(
            f"The Hub refused the token for {repo_id!r}: log in with `hf auth login`, or set HF_TOKEN "
            "to one that is valid and may write."
        )
    if status == 403:
        return PermissionError(
            f"The token may not write to {repo_id!r}: use one with write access to it, or another repository."
        )
    message = getattr(error, "server_message", None) or str(error)
    message = " ".join(message.replace(str(api.token), "…").split())
    if status is not None:
        return OSError(f"The Hub answered {status} for {repo_id!r}: {message}")
    if isinstance(error, (ValueError, OSError)):
        return OSError(f"{repo_id!r} could not be written: {message}")
    return ConnectionError(f"The connection to {api.endpoint} failed: {type(error).__name__}: {message}")


def hub_client(token: str | None = None) -> HfApi:
    """Returns a client of the Hub with the given token, that of HF_TOKEN, or that of the stored login.

    Raises:
        ValueError: if there is none, or it cannot be a token.
    """
    token = (token or get_token() or "").strip()
    if not token:
        raise ValueError(
            "Pushing to the Hub needs a token: log in with `hf auth login`, or set HF_TOKEN to one that may "
            "write (https://huggingface.co/settings/tokens)."
        )
    if not re.fullmatch(r"[!-~]+", token):  # the HTTP library would refuse it, and quote it
        raise ValueError("The Hub token has a space or another character that no token has.")
    return HfApi(token=token)


def full_repo_id(repo_id: str, api: HfApi) -> str:
    """Returns `"USER/NAME"` for the `"NAME"` of a repository of the token's owner."""
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def create_repository(
    repo_id: str, private: bool | None = None, token: str | None = None, repo_type: str = "model"
) -> ModelInfo | SpaceInfo:
    """Creates a repository, or finds the one that is there, and checks that the token may write to it.

    Args:
        repo_id (`str`): `"USER/NAME"`, or `"NAME"` for the owner of the token.
        private (`bool`, *optional*): whether only its owner sees it; by default, as the owner's settings say.
        token (`str`, *optional*): by default that of HF_TOKEN or of the stored login.
        repo_type (`str`, defaults to `"model"`): `"model"`, or `"space"` for one of Gradio.

    Returns:
        `ModelInfo` or `SpaceInfo`: what the Hub knows of it: its full `id`, and its files as `siblings`.

    Raises:
        ValueError: if there is no token, the id is malformed, or a private repository is asked for and the
            one that is there is public.
        OSError: if the Hub cannot be reached, refuses the token or does not let it write.
    """
    api = hub_client(token)
    with readable_errors(repo_id, api):
        sdk = "gradio" if repo_type == "space" else None
        repo_id = api.create_repo(
            repo_id, private=private, repo_type=repo_type, exist_ok=True, space_sdk=sdk
        ).repo_id
        api.auth_check(repo_id, repo_type=repo_type, write=True)
        info = api.repo_info(repo_id, repo_type=repo_type)
    if private and not info.private:
        raise ValueError(
            f"The repository {repo_id!r} is there already, and is public: make it private in its settings, "
            "or choose another."
        )
    return info


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload the pipeline",
) -> str:
    """Publishes a saved pipeline in one commit, and returns the commit's address.

    Files of components and evaluations that an earlier push left in the repository, and the folder no longer
    has, are removed from it. The folder itself is only read.

    Args:
        folder (`str` or `Path`): see [`published_files`].
        repo_id (`str`), private (`bool`, *optional*), token (`str`, *optional*): see [`create_repository`].
        commit_message (`str`, defaults to `"Upload the pipeline"`): first line of the commit's message.

    Raises:
        ValueError: if the folder is not a complete pipeline of safetensors, or see [`create_repository`].
        OSError: if the Hub cannot be reached, or refuses.
    """
    files = published_files(folder)
    folder, api = Path(folder), hub_client(token)
    with readable_errors(repo_id, api):
        repo_id = full_repo_id(repo_id, api)
    additions = [CommitOperationAdd(name, published_content(folder, name, repo_id)) for name in files]
    with readable_errors(repo_id, api):
        for addition in additions:
            if addition.path_in_repo == "README.md":
                ModelCard(addition.path_or_fileobj.decode()).validate()
    # Whatever can be refused has been checked: a repository that is created now does not stay empty.
    info = create_repository(repo_id, private, token)
    folders = {name.rpartition("/")[0] for name in files} - {""}
    stale = [
        sibling.rfilename
        for sibling in info.siblings or []
        if sibling.rfilename not in files
        and (sibling.rfilename.rpartition("/")[0] in folders or sibling.rfilename in EVALUATION_FILES)
    ]
    operations = [*(CommitOperationDelete(name, is_folder=False) for name in stale), *additions]
    with readable_errors(repo_id, api):
        # `upload_folder` may make several commits, between which the repository would not load.
        return api.create_commit(repo_id, operations, commit_message=commit_message).commit_url


# The Space


def space_files(model_id: str, private: bool = False) -> dict[str, bytes]:
    """Returns the files of a Space that shows a model: its app, requirements and card, and this package.

    The package comes as source, so that the Space runs the version that made it.

    Args:
        model_id (`str`): the model's full id on the Hub.
        private (`bool`, defaults to `False`): whether the model is; the card then says what the Space needs.
    """
    app = (
        '"""The web page of a model; see README.md."""\n\nimport sys\n\n'
        "from pet_pipeline.__main__ import main\n\n\n"
        f'sys.exit(main(["app", "--model", "{model_id}", "--host", "0.0.0.0"]))\n'
    )
    name = model_id.rpartition("/")[2]
    metadata = SpaceCardData(
        title=name,
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version="3.11",
        app_file="app.py",
        license="apache-2.0",
        models=[model_id],
    )
    card = (
        f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n"
        f"The web page of [{model_id}](https://huggingface.co/{model_id}), a class-conditional diffusion "
        "model: make images, compare settings, and see which class an image is of and why. `pet_pipeline/` "
        "is the package that the model belongs to.\n"
    )
    if private:
        card += (
            "\nThe model is private: in the settings of this Space, a secret `HF_TOKEN` has to hold a token "
            "that may read it.\n"
        )
    files = {"app.py": app, "requirements.txt": "\n".join(SPACE_REQUIREMENTS) + "\n", "README.md": card}
    package = Path(__file__).parent
    return {name: text.encode() for name, text in files.items()} | {
        f"pet_pipeline/{source.relative_to(package).as_posix()}": source.read_bytes()
        for source in sorted(package.rglob("*"))
        if source.suffix in (".py", ".css")
    }


def push_space(model_id: str, token: str | None = None, commit_message: str = "Upload the page") -> str:
    """Publishes a Space with the web page of a model in one commit, and returns the Space's address.

    It has the id of the model and is as private.

    Args:
        model_id (`str`): id of a model on the Hub.
        token (`str`, *optional*): see [`create_repository`].
        commit_message (`str`, defaults to `"Upload the page"`): first line of the commit's message.

    Raises:
        ValueError, OSError: see [`push_folder`].
    """
    api = hub_client(token)
    with readable_errors(model_id, api):
        model = api.model_info(full_repo_id(model_id, api))
    files = space_files(model.id, bool(model.private))
    info = create_repository(model.id, model.private or None, token, "space")
    remote = [sibling.rfilename for sibling in info.siblings or []]
    stale = [name for name in remote if name not in files and name.startswith("pet_pipeline/")]
    operations = [
        *(CommitOperationDelete(name, is_folder=False) for name in stale),
        *(CommitOperationAdd(name, content) for name, content in files.items()),
    ]
    with readable_errors(info.id, api):
        api.create_commit(info.id, operations, commit_message=commit_message, repo_type="space")
    return f"{api.endpoint}/spaces/{info.id}"


# The card


def render_model_card(
    folder: str | Path, template: str | Path, pipeline: "PetDiffusionPipeline", report: TrainingReport
) -> str:
    """Renders the card of a trained pipeline; what was not measured is not in it.

    Args:
        folder (`str` or `Path`): of the saved pipeline; its `samples.png` and `evaluation.json`, if there,
            are in the card.
        template (`str` or `Path`): a Jinja file.
        pipeline ([`PetDiffusionPipeline`]): gives the classes and the architecture.
        report ([`TrainingReport`]): gives the data, the recipe and the validation loss.

    Returns:
        `str`: the text of its `README.md`.
    """

    folder = Path(folder)
    config = pipeline.transformer.config
    names = pipeline.class_names
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    subject = listed if len(names) <= 4 else f"{len(names)} classes"
    title = f"Images of {subject}, {config.sample_size}×{config.sample_size}"
    dataset_id, base_model = hub_id(report.dataset_name), hub_id(report.base_model)
    results = []
    if report.validation_loss is not None:
        results = [
            EvalResult(
                task_type=TASK,
                dataset_type=dataset_id or "local",
                dataset_name=dataset_id or "local data set",
                dataset_split="train",
                metric_type="validation_loss",
                metric_name="validation loss",
                metric_value=round(report.validation_loss, 6),
            )
        ]
    linear = config.attention_type == "linear"
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license="apache-2.0",
        datasets=[dataset_id] if dataset_id else None,
        base_model=base_model,
        tags=["diffusers", "class-conditional", "edm"] + (["linear-attention"] if linear else []),
        model_name=title if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template),
        title=title,
        model_id=folder.resolve().name,
        class_names=names,
        resolution=config.sample_size,
        config=config,
        num_parameters=pipeline.transformer.num_parameters(),
        has_samples=(folder / "samples.png").is_file(),
        dataset_id=dataset_id,
        is_cifar10=dataset_id in CIFAR10_IDS,
        fine_tuned=report.base_model is not None,
        report=report,
        options={name: report.options[name] for name in CARD_OPTIONS},
        versions={
            "pet_pipeline": __version__,
            **{name: version(name) for name in ("torch", "diffusers", "accelerate")},
        },
    )
    if (folder / "evaluation.json").is_file():
        add_evaluation(card, read_evaluation(folder / "evaluation.json"), title)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"  # sections left out leave blank lines
    return card.content


def read_evaluation(path: Path) -> dict[str, Any]:
    """Reads the record of an evaluation; see [`evaluate`].

    Returns:
        `dict`: the record, in which `settings` and `floors` may be empty.

    Raises:
        ValueError: if the file is not the record of an evaluation.
    """
    record = {"settings": {}, "floors": {}, **read_json(path)}

    def check(name: str, value: Any, valid: bool) -> None:
        if not valid:
            raise ValueError(
                f"{str(path)!r} is not a record of `pet-pipeline evaluate`: {reprlib.repr(name)} is "
                f"{reprlib.repr(value)}."
            )

    for name in ("settings", "measures", "floors"):
        check(name, record.get(name), isinstance(record.get(name), dict))
    for name, measures in record["floors"].items():
        check("floors", record["floors"], is_plain_text(name) and isinstance(measures, dict))
    numbers = {name: record.get(name) for name in ("evaluations_per_image", "images_per_second")}
    numbers |= {name: record["measures"].get(name) for name in ("num_images", "num_reference_images")}
    if "memorization_ratio" in record["measures"]:
        numbers["nearest_distance"] = record["measures"].get("nearest_distance")
    for table in (numbers, record["measures"], *record["floors"].values()):
        for name, value in table.items():
            check(name, value, is_number(value))
    check("date", record.get("date"), is_plain_text(record.get("date")))
    for name in (*SETTING_PHRASES, "reference", "split"):
        value = record["settings"].get(name, 0)
        check(name, value, value is None or is_number(value) or is_plain_text(value))
    return record


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that can be formatted as a float."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def is_plain_text(value: Any) -> bool:
    """Whether a value of JSON is a short string without control characters, as a card can show it."""
    return isinstance(value, str) and len(value) < 1000 and value.isprintable()


def add_evaluation(card: ModelCard, record: dict[str, Any], model_name: str) -> None:
    """Puts an evaluation into the metadata of a card and into the part of its text that is kept for it.

    Args:
        card (`ModelCard`): a card of our template.
        record (`dict`): see [`evaluate`].
        model_name (`str`): names the model in the metadata of a card that has no results yet.
    """
    settings, measures = record["settings"], record["measures"]
    dataset_id = hub_id(settings.get("reference"))
    kept = [result for result in card.data.eval_results or [] if result.metric_type not in measures]
    card.data.model_name = card.data.model_name or model_name
    card.data.eval_results = kept + [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset_id or "local",
            dataset_name=dataset_id or "local data set",
            dataset_split=settings.get("split"),
            metric_type=name,
            metric_name=heading.removesuffix(" ×10³"),  # the value is not scaled here
            metric_value=round(measures[name], 6),
        )
        for name, (heading, _) in COLUMNS.items()
        if name in measures
    ]
    section = evaluation_section(record)
    card.text = EVALUATION_PART.sub(lambda match: f"{match[1]}{section}\n{match[2]}", card.text)


def evaluation_section(record: dict[str, Any]) -> str:
    """Returns the sections of a card that tell of an evaluation and of memorisation."""
    settings, measures = record["settings"], record["measures"]
    reference = hub_id(settings.get("reference"))
    drawn = [phrase.format(settings[name]) for name, phrase in SETTING_PHRASES.items() if name in settings]
    lines = [
        "## Evaluation",
        "",
        f"{measures['num_images']:,} generated images ({', '.join(drawn)}) against "
        f"{measures['num_reference_images']:,} of "
        + (f"[{reference}](https://huggingface.co/datasets/{reference})" if reference else "a local data set")
        + (f" (`{settings['split']}`)" if "split" in settings else "")
        + f"; measured on {record['date']} by `pet-pipeline evaluate`.",
        "",
        markdown_table(record, "this model"),
    ]
    if "fd_efflite0" in measures:
        lines += [
            "",
            "FD-EffLite0 and KID-EffLite0 are the Fréchet and the kernel distance in the feature space of "
            "EfficientNet-Lite0. They are not FID and KID, and compare only with those of the same "
            "features and the same number of images.",
        ]
    if "memorization_ratio" in measures:
        unseen = record["floors"].get("unseen images", {}).get("nearest_distance")
        lines += [
            "",
            "## Memorisation",
            "",
            f"{measures['memorization_ratio']:.2%} of these images copy a training image of that data set: "
            "they are three times nearer to it than to the second nearest. The median distance to the "
            "nearest one is "
            f"{measures['nearest_distance']:.3f} (RMS, pixels in [-1, 1])"
            + (f"; that of unseen images is {unseen:.3f}." if unseen is not None else "."),
        ]
    return "\n".join(lines)
