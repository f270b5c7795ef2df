"""Publishing a saved pipeline on the Hugging Face Hub, with its model card, and a Space with its web page.

What is published is a pipeline folder: index, code, configurations, weights as safetensors, card, pictures.
Training state stays at home, and so do local paths and the token.
"""

import json
import re
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


if TYPE_CHECKING:
    from .pipeline_pet_diffusion import PetDiffusionPipeline

INDEX = "model_index.json"
EVALUATION_FILES = ("evaluation.json", "generated.png", "neighbors.png")  # of `pet-pipeline evaluate`
# Published where they are there, beside the index and the pipeline's code.
PIPELINE_FILES = ("pipeline_pet_diffusion.py", "pipeline_pet_classification.py")
# Of an evaluation the numbers alone: its pictures may show images of a data set that nobody else has.
OPTIONAL_FILES = ("README.md", "samples.png", "evaluation.json")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# Libraries whose classes need no source file beside the weights.
KNOWN_LIBRARIES = ("diffusers", "transformers")

# Heading and format of each column of the table of an evaluation.
COLUMNS = {
    "fd_efflite0": ("FD-EffLite0", "{:.1f}"),
    "kid_efflite0": ("KID-EffLite0 ×10³", "{:.2f}"),
    "fd_inception": ("FID", "{:.2f}"),
    "kid_inception": ("KID ×10³", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "class_accuracy": ("class accuracy", "{:.3f}"),
    "memorization_ratio": ("memorised", "{:.4f}"),
    "nearest_distance": ("nearest, RMS", "{:.3f}"),
    "validation_loss": ("validation loss", "{:.4f}"),
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


def hub_id(name: str | None) -> str | None:
    """Returns `name` if it can be the id of a repository on the Hub, `None` if it is a local path."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: if the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} has to hold a JSON object.")
    return content


# What is published


def component_libraries(index: dict[str, Any]) -> dict[str, str]:
    """Returns the library, or the stem of the source file, of every component that an index names."""
    return {
        name: value[0]
        for name, value in index.items()
        if isinstance(value, list) and not name.startswith("_") and value[0] is not None
    }


def published_files(folder: str | Path) -> list[str]:
    """Lists what is published of a saved pipeline, as paths inside its folder.

    Args:
        folder (`str` or `Path`): what `save_pretrained` wrote; other files beside it are left out.

    Raises:
        ValueError: if the pipeline is incomplete, or its weights are not safetensors.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{str(folder)!r} is not a saved pipeline: it has no {INDEX}.")
    index = read_json(folder / INDEX)
    files = [INDEX]
    if isinstance(index.get("_class_name"), list):  # [stem of the source file, class]
        files.append(f"{index['_class_name'][0]}.py")
    for component, library in component_libraries(index).items():
        names = sorted(path.name for path in (folder / component).glob("*") if path.is_file())
        weights = [name for name in names if name.endswith(".safetensors")]
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        configs = [name for name in names if name.endswith(".json")]
        if pickles and not weights:
            raise ValueError(
                f"{str(folder)!r} holds the weights of its {component} as a pickle only ({pickles[0]}), and "
                "loading one can run code: load it yourself, and save it with `save_pretrained`."
            )
        if not configs or ("config.json" in configs and not weights):  # a scheduler has no config.json
            lack = "safetensors" if configs else "configuration"
            raise ValueError(f"{str(folder)!r} is not a complete pipeline: its {component} has no {lack}.")
        for name in configs:
            if name.endswith(".safetensors.index.json"):
                shards = read_json(folder / component / name).get("weight_map", {}).values()
                weights = sorted({*weights, *shards})
        files += [f"{component}/{name}" for name in (*configs, *weights)]
        if library not in KNOWN_LIBRARIES:
            files.append(f"{component}/{library}.py")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{str(folder)!r} is not a complete pipeline, as {', '.join(missing)} is missing: load it with "
            "`PetDiffusionPipeline.from_pretrained`, and save it with `save_pretrained`."
        )
    others = [name for name in (*PIPELINE_FILES, *OPTIONAL_FILES) if name not in files]
    return files + [name for name in others if (folder / name).is_file()]


def published_content(folder: Path, name: str, repo_id: str) -> Path | bytes:
    """Returns a file as it is published: local paths are left out, and the card names its repository."""
    path = folder / name
    if name == "README.md":
        return published_card(folder, repo_id).encode()
    if path.suffix != ".json":
        return path
    content = read_json(path)
    if name == "evaluation.json":
        settings = content.get("settings", {})
        content["settings"] = {
            **settings,
            "model": repo_id,
            "reference": hub_id(settings.get("reference")) or "local data set",
        }
    elif "_name_or_path" in content:  # where diffusers notes the folder that the pipeline was loaded from
        del content["_name_or_path"]
    else:
        return path
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def published_card(folder: Path, repo_id: str) -> str:
    """Returns the folder's card, which loads the pipeline from the repository and tells of its evaluation."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    # A card names its own folder, which has no slash; ids of other repositories have one.
    text = re.sub(r"from_pretrained\(\"[^\"/]+\"", f'from_pretrained("{repo_id}"', text)
    if EVALUATION_PART.search(text) and (folder / "evaluation.json").is_file():
        try:
            card = ModelCard(text)
        except Exception as error:  # of the YAML parser, or of the metadata's values
            message = " ".join(str(error).split())
            raise ValueError(
                f"The metadata of {str(folder / 'README.md')!r} are not valid: {message}"
            ) from None
        add_evaluation(card, read_evaluation(folder / "evaluation.json"), repo_id)
        return card.content
    return text


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
    folder = Path(folder)
    files = published_files(folder)
    components = component_libraries(read_json(folder / INDEX))
    api = hub_client(token)
    info = create_repository(repo_id, private, token)
    remote = [sibling.rfilename for sibling in info.siblings or []]
    stale = [
        name
        for name in remote
        if name not in files and (name.partition("/")[0] in components or name in EVALUATION_FILES)
    ]
    operations = [
        *(CommitOperationDelete(name, is_folder=False) for name in stale),
        *(CommitOperationAdd(name, published_content(folder, name, info.id)) for name in files),
    ]
    with readable_errors(info.id, api):
        # `upload_folder` may make several commits, between which the repository would not load.
        return api.create_commit(info.id, operations, commit_message=commit_message).commit_url


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
        for source in sorted(package.rglob("*.py"))
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
    model = create_repository(model_id, token=token)
    info = create_repository(model.id, model.private or None, token, "space")
    files = space_files(model.id, bool(model.private))
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
    from .visualization import class_names

    folder = Path(folder)
    config = pipeline.transformer.config
    names = class_names(pipeline)
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

    Raises:
        ValueError: if the file is something else.
    """
    record = read_json(path)
    if not isinstance(record.get("measures"), dict):
        raise ValueError(f"{str(path)!r} is not a record of `pet-pipeline evaluate`: it has no measures.")
    return record


def add_evaluation(card: ModelCard, record: dict[str, Any], model_name: str) -> None:
    """Puts an evaluation into the metadata of a card and into the part of its text that is kept for it.

    Args:
        card (`ModelCard`): a card of our template.
        record (`dict`): see [`evaluate`].
        model_name (`str`): names the model in the metadata of a card that has no results yet.
    """
    settings, measures = record.get("settings", {}), record["measures"]
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


def markdown_table(record: dict[str, Any], name: str) -> str:
    """Returns the record as a Markdown table: a row for the pipeline and one for each floor."""
    rows = {name: record["measures"], **record.get("floors", {})}
    keys = [key for key in COLUMNS if key in record["measures"]]
    headings = ["images of", *(COLUMNS[key][0] for key in keys), "evaluations", "images/s"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row_name, measures in rows.items():
        cells = [row_name]
        for key in keys:
            value = measures.get(key)
            scaled = None if value is None else value * (1000 if key.startswith("kid") else 1)
            cells.append("" if scaled is None else COLUMNS[key][1].format(scaled))
        if row_name == name:
            cells += [f"{record['evaluations_per_image']:.1f}", f"{record['images_per_second']:.2f}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evaluation_section(record: dict[str, Any]) -> str:
    """Returns the sections of a card that tell of an evaluation and of memorisation."""
    settings, measures = record.get("settings", {}), record["measures"]
    reference = hub_id(settings.get("reference"))
    phrases = {
        "seed": "seeds from {} on",
        "num_inference_steps": "{} steps",
        "guidance_scale": "guidance {}",
        "guidance_schedule": "schedule `{}`",
        "pag_scale": "perturbed attention {}",
        "scheduler": "scheduler `{}`",
    }
    drawn = [phrase.format(settings[name]) for name, phrase in phrases.items() if name in settings]
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
        unseen = record.get("floors", {}).get("unseen images", {}).get("nearest_distance")
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
