"""Checks of the components of a pipeline folder that may come from anyone, before diffusers builds them.

diffusers builds whatever class `model_index.json` names, with whatever `config.json` says, and so can be made
to read a pickle or to take all memory. The installed package refuses such folders here. This module does not
travel: whoever writes the configuration of a folder also writes the code beside it.
"""

import inspect
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import pipelines
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .scheduling_adaptive_edm import RANGES, AdaptiveEDMScheduler
from .transformer_pet import PetTransformer2DModel, check_config


BASE_CLASSES = {"transformer": ModelMixin, "scheduler": SchedulerMixin, "guider": BaseGuidance}

# Limits of `PetTransformer2DModel`.
MAX_PARAMETERS = 2_000_000_000  # 8 GB in float32
MAX_IMAGE_VALUES = 2**24  # channels × height × width
MAX_FREQUENCIES = 4096  # channels × patch size², if each frequency has a variance

# Limits of all other classes, whose configurations mean what only their authors know.
MAX_NUMBER = 4096
MAX_LAYERS = 128  # of numbers whose name contains "layer"
MAX_ITEMS = 16  # of a list or an object
MAX_POSITION_VALUES = 2**28  # image size² × width of the tokens


def check_components(index: Mapping[str, Any], folder: Path) -> None:
    """Checks the classes and the configurations of the components of a pipeline folder.

    Args:
        index (`dict`): the content of `model_index.json`, with a library and a class for each component.
        folder (`Path`): the local folder.

    Raises:
        ValueError: if a component is of an unsuitable class, or would exhaust memory; the message names it.
        OSError: if a configuration is missing.
    """
    for name, base_class in BASE_CLASSES.items():
        library, class_name = index.get(name, (None, None))
        if library is None or (folder / name / f"{library}.py").is_file():
            continue  # diffusers itself asks for trust before it runs code of the folder
        # diffusers looks for the class in the same places.
        module = getattr(pipelines, library, None) or sys.modules.get(library)
        component_class = getattr(module, class_name, None)
        if not (isinstance(component_class, type) and issubclass(component_class, base_class)):
            raise ValueError(
                f"`{name}` must be an available subclass of {base_class.__name__}, but is {class_name!r} of "
                f"{library!r}. Code of the folder itself needs `DiffusionPipeline.from_pretrained` with "
                "`trust_remote_code=True`."
            )
        config = component_class.load_config(folder / name if (folder / name).is_dir() else folder)
        if not isinstance(config, dict):
            raise ValueError(f"The configuration of the {name} must be a JSON object.")
        parameters = inspect.signature(component_class.__init__).parameters.values()
        defaults = {item.name: item.default for item in parameters if item.default is not item.empty}
        config = {**defaults, **config}
        if issubclass(component_class, PetTransformer2DModel):
            check_memory(config)
        elif issubclass(component_class, ModelMixin):
            check_other_model(component_class, config)
        elif issubclass(component_class, SchedulerMixin):
            check_scheduler(component_class, config)
        else:
            check_size(name, config)


def check_memory(config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a configuration of [`PetTransformer2DModel`] would exhaust memory."""
    full = FrozenDict(config)
    check_config(full)
    num_values = full.in_channels * full.sample_size**2
    if num_values > MAX_IMAGE_VALUES:
        raise ValueError(
            f"`in_channels` × `sample_size`² must be at most {MAX_IMAGE_VALUES:,}, but is {num_values:,}."
        )
    num_frequencies = full.in_channels * full.patch_size**2
    if full.frequency_variances is not None and num_frequencies > MAX_FREQUENCIES:
        raise ValueError(
            f"`frequency_variances` must have at most {MAX_FREQUENCIES:,} values, but has "
            f"{num_frequencies:,}."
        )
    # The large matrices of the blocks, of the embeddings and the output, and of the decoder.
    dim = full.num_attention_heads * full.attention_head_dim
    blocks = full.num_layers * dim**2 * (10 + 3 * full.feed_forward_ratio + full.long_skips)
    ends = dim * (full.num_classes + 2 * num_frequencies + 3 * dim)
    upsampling = dim * full.decoder_channels * full.patch_size**2
    decoder = upsampling + 18 * full.decoder_layers * full.decoder_channels**2
    num_parameters = int(blocks + ends + (decoder if full.decoder_layers else 0))
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(
            f"A model must have at most {MAX_PARAMETERS:,} parameters, but this configuration has about "
            f"{num_parameters:,} ({4 * num_parameters / 1e9:,.0f} GB in float32)."
        )


def check_other_model(component_class: type[ModelMixin], config: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a model cannot be the denoiser, or its configuration would exhaust memory."""
    arguments = list(inspect.signature(component_class.forward).parameters)
    if arguments[3:4] != ["class_labels"]:
        raise ValueError(
            "`transformer` must take an image, a timestep and `class_labels`, but "
            f"{component_class.__name__} does not."
        )
    for name in ("sample_size", "in_channels", "num_classes"):
        if not isinstance(config.get(name), int):
            raise ValueError(
                f"`{name}` in the configuration of the transformer must be an integer, but is "
                f"{reprlib.repr(config.get(name))}."
            )
    check_size("transformer", config)
    dims = [config.get(name, 1) for name in ("num_attention_heads", "attention_head_dim")]
    dim = dims[0] * dims[1] if all(isinstance(value, int) for value in dims) else MAX_NUMBER
    num_values = config["sample_size"] ** 2 * dim
    if num_values > MAX_POSITION_VALUES:
        raise ValueError(
            f"`sample_size`² × `num_attention_heads` × `attention_head_dim` must be at most "
            f"{MAX_POSITION_VALUES:,}, but is {num_values:,}."
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
    for name, (low, high) in RANGES.items():
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
        raise ValueError(f"`{name}` must be at most {limit:,}, but is {value:g}.")
