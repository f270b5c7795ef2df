"""Checks of the components of a pipeline folder that may come from anyone, before diffusers builds them.

diffusers builds whatever class `model_index.json` names, with whatever `config.json` says, and so can be made
to read a pickle or to take all memory. The installed package refuses such folders here. This module does not
travel: whoever writes the configuration of a folder also writes the code beside it.
"""

import inspect
import reprlib
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import pipelines
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .probe_pet import PetLinearProbe
from .scheduling_adaptive_edm import RANGES, AdaptiveEDMScheduler
from .transformer_pet import PetTransformer2DModel, check_config


BASE_CLASSES = {
    "transformer": ModelMixin,
    "guide": ModelMixin,
    "probe": PetLinearProbe,
    "scheduler": SchedulerMixin,
    "guider": BaseGuidance,
}

MAX_PARAMETERS = 2_000_000_000  # 8 GB in float32

# Limits of `PetTransformer2DModel`.
MAX_IMAGE_VALUES = 2**24  # channels × height × width
MAX_FREQUENCIES = 4096  # channels × patch size², if each frequency has a variance

# Limits of all other classes, whose configurations mean what only their authors know.
MAX_NUMBER = 4096
MAX_LAYERS = 128  # of numbers whose name contains "layer"
MAX_ITEMS = 16  # of a list or an object
MAX_POSITION_VALUES = 2**28  # image size² × width of the tokens


def check_components(index: Mapping[str, Any], folder: Path) -> None:
    """Checks the classes and the configurations of the components of a local pipeline folder.

    `index` is the content of `model_index.json`. `ValueError` is raised if a component is of an unsuitable
    class or would exhaust memory, and `OSError` if a configuration is missing.
    """
    for name, base_class in BASE_CLASSES.items():
        library, class_name = index.get(name, (None, None))
        if library is None:
            continue
        # diffusers looks for the class in the same places, in the same order.
        if hasattr(pipelines, library):
            module = getattr(pipelines, library)
        elif (folder / name / f"{library}.py").is_file():
            continue  # diffusers itself asks for trust before it runs code of the folder
        else:
            module = sys.modules.get(library)
        component_class = getattr(module, class_name, None)
        if not (isinstance(component_class, type) and issubclass(component_class, base_class)):
            raise ValueError(
                f"`{name}` must be an available subclass of {base_class.__name__}, but is "
                f"{reprlib.repr(class_name)} of {reprlib.repr(library)}. Code of the folder itself needs "
                "`DiffusionPipeline.from_pretrained` with `trust_remote_code=True`."
            )
        config_folder = folder / name if (folder / name).is_dir() else folder
        config = component_class.load_config(config_folder)  # type: ignore[attr-defined]
        if not isinstance(config, dict):
            raise ValueError(f"The configuration of the {name} must be a JSON object.")
        parameters = inspect.signature(component_class).parameters.values()
        defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
        config = {**defaults, **config}
        if issubclass(component_class, PetTransformer2DModel):
            check_memory(config)
        elif issubclass(component_class, ModelMixin) and name != "probe":
            check_other_model(name, component_class, config)
        elif issubclass(component_class, SchedulerMixin):
            check_scheduler(component_class, config)
        else:
            check_size(name, config)
        check_building(name, component_class, config)


def check_memory(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a configuration of [`PetTransformer2DModel`] would exhaust memory."""
    full = FrozenDict(config)
    check_config(full)
    check_limit("`in_channels` × `sample_size`²", full.in_channels * full.sample_size**2, MAX_IMAGE_VALUES)
    if full.frequency_variances is not None:
        num_frequencies = full.in_channels * full.patch_size**2
        check_limit("The number of `frequency_variances`", num_frequencies, MAX_FREQUENCIES)


def check_limit(name: str, number: int, limit: int) -> None:
    """Raises `ValueError` if a number that memory grows with is above its limit."""
    if number > limit:
        raise ValueError(f"{name} must be at most {limit:,}, but is {number:,}.")


def check_other_model(name: str, component_class: type[ModelMixin], config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a model cannot be a denoiser, or its configuration would exhaust memory."""
    arguments = list(inspect.signature(component_class.forward).parameters)
    if arguments[3:4] != ["class_labels"]:
        raise ValueError(
            f"`{name}` must take an image, a timestep and `class_labels`, but "
            f"{component_class.__name__} does not."
        )
    for key in ("sample_size", "in_channels", "num_classes"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise ValueError(
                f"`{key}` in the configuration of the {name} must be a positive integer, but is "
                f"{reprlib.repr(config.get(key))}."
            )
    check_size(name, config)
    dims = [config.get(name, 1) for name in ("num_attention_heads", "attention_head_dim")]
    dim = dims[0] * dims[1] if all(isinstance(value, int) for value in dims) else MAX_NUMBER
    name = "`sample_size`² × `num_attention_heads` × `attention_head_dim`"
    check_limit(name, config["sample_size"] ** 2 * dim, MAX_POSITION_VALUES)


def check_building(name: str, component_class: type, config: Mapping[str, Any]) -> None:
    """Builds a component without memory for its weights.

    `ValueError` is raised if the class refuses the configuration, or if a model has too many parameters.
    """
    arguments = {key: config[key] for key in inspect.signature(component_class).parameters if key in config}
    is_model = issubclass(component_class, ModelMixin)
    try:
        with torch.device("meta" if is_model else "cpu"):
            component = component_class(**arguments)
    except Exception as error:  # classes of diffusers fail in many ways
        message = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"The {name} cannot be built from its configuration: {message}") from None
    num_parameters = sum(parameter.numel() for parameter in component.parameters()) if is_model else 0
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(
            f"A model must have at most {MAX_PARAMETERS:,} parameters, but this configuration has "
            f"{num_parameters:,} ({4 * num_parameters / 1e9:,.0f} GB in float32)."
        )


def check_scheduler(component_class: type[SchedulerMixin], config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a scheduler is not one of EDM, or its configuration is out of range."""
    if not hasattr(component_class, "precondition_outputs"):
        raise ValueError(
            "`scheduler` must be an EDM scheduler such as AdaptiveEDMScheduler, but is "
            f"{component_class.__name__}."
        )
    if issubclass(component_class, AdaptiveEDMScheduler):
        return  # it checks itself, before it takes memory
    for name, (low, high) in {**RANGES, "solver_order": (1, 3)}.items():
        value = config.get(name, low)  # not every scheduler has every argument
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(
                f"`{name}` must be a number in [{low:g}, {high:g}], but is {reprlib.repr(value)}."
            )
    check_size("scheduler", {name: value for name, value in config.items() if name not in RANGES})


def check_size(name: str, value: Any) -> None:
    """Raises `ValueError` if a number or the length of a list is so large that it might exhaust memory."""
    limit = MAX_LAYERS if "layer" in name else MAX_NUMBER
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_size(str(key), item)
    elif isinstance(value, (list, tuple)):
        if len(value) > MAX_ITEMS:
            raise ValueError(f"`{name}` must have at most {MAX_ITEMS} items, but has {len(value):,}.")
        for item in value:
            check_size(name, item)
    elif isinstance(value, (int, float)) and not abs(value) <= limit:
        raise ValueError(f"`{name}` must be at most {limit:,}, but is {reprlib.repr(value)}.")
