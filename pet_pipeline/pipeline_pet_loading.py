"""PetPipelineMixin: what the two pipelines share, namely their components, loading, saving and class labels.

Both pipeline files import this file relatively, and a saved folder holds them all, so that diffusers finds
it without this package. A process that loads the code of two folders with different versions of this file
keeps the first version, because diffusers copies the files of all folders into one place.

This file travels inside every saved checkpoint: it imports PyTorch, diffusers, Pillow and the standard
library only.
"""

import importlib
import inspect
import json
import math
import reprlib
import shutil
import sys
import warnings
from collections import Counter
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module
from PIL import Image, ImageOps


logger = logging.get_logger(__name__)

# The modules of this package that define components, and the files at the top of every saved folder.
COMPONENT_MODULES = ("transformer_pet", "scheduling_adaptive_edm", "probe_pet")
PIPELINE_MODULES = (
    "pipeline_pet_diffusion",
    "pipeline_pet_classification",
    "pipeline_pet_loading",
    "guidance_pet",
)

MAX_LABEL_LENGTH = 256
MAX_SCALE = 100.0  # useful values are about 0 to 3; float16 overflows at thousands
MAX_STEPS = 1000
NUM_BANDS = 8  # bands of noise levels in a calibration

# Pillow reads these formats by itself; for some others it starts programs.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_IMAGE_PIXELS = 2**24  # of an image file, which is decoded at its full size

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as PipelineBase
else:  # diffusers requires that a pipeline file knows one subclass of `DiffusionPipeline` only
    PipelineBase = object


class PetPipelineMixin(PipelineBase):
    r"""The components, loading, saving and class labels of the pipelines of this package.

    Args:
        transformer ([`PetTransformer2DModel`]): the denoiser, whose class `num_classes` is the null class. A
            model of another class needs the same `forward`, and `sample_size`, `in_channels` and
            `num_classes` in its config.
        scheduler ([`AdaptiveEDMScheduler`]): the noise levels and the preconditioning; `EDMEulerScheduler`
            and `EDMDPMSolverMultistepScheduler` are possible too.
        guider (`BaseGuidance`, *optional*): a guider of diffusers. [`PetDiffusionPipeline`] then uses it
            instead of `guidance_scale`, `guidance_schedule`, `pag_scale` and `autoguidance_scale`.
        guide (`ModelMixin`, *optional*): a worse model of the same images, called in the same way as the
            denoiser: smaller, or trained for less time. [`PetDiffusionPipeline`] uses it for autoguidance.
        id2label (`dict`, *optional*): class names by id, for example `{0: "cat", 1: "dog"}`.
        probe ([`PetLinearProbe`], *optional*): classifies by features of the denoiser, in
            [`PetClassificationPipeline`].
        calibration (`dict`, *optional*): the weight of each band of noise levels in the classification,
            `{"weights": [...]}`, and of the two methods in their combination, `{"combination": [...]}`.
            `pet-pipeline calibrate` measures both.
        pag_scale (`float`, defaults to 0.0), autoguidance_scale (`float`, defaults to 1.0), guidance_scale
            (`float`, defaults to 2.5): strengths of perturbed-attention guidance, of autoguidance and of
            classifier-free guidance if a call of [`PetDiffusionPipeline`] does not give them; at most 100 in
            absolute value.
        num_inference_steps (`int`, defaults to 18): number of denoising steps if a call does not give it.

    Raises:
        ValueError: if an argument is out of range; the message names it.
    """

    model_cpu_offload_seq = "guide->transformer->probe"
    _optional_components = ["guider", "guide", "probe"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        guider: BaseGuidance | None = None,
        id2label: dict | None = None,
        calibration: dict | None = None,
        pag_scale: float = 0.0,
        guide: ModelMixin | None = None,
        autoguidance_scale: float = 1.0,
        guidance_scale: float = 2.5,
        probe: ModelMixin | None = None,
        num_inference_steps: int = 18,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, guider=guider, guide=guide, probe=probe
        )
        self.id2label = check_labels(id2label, transformer.config.num_classes)
        check_calibration(calibration)
        scales = {
            "guidance_scale": guidance_scale,
            "pag_scale": pag_scale,
            "autoguidance_scale": autoguidance_scale,
        }
        for name, scale in scales.items():
            check_scale(name, scale)
        if check_integer("num_inference_steps", num_inference_steps) > MAX_STEPS:
            raise ValueError(
                f"`num_inference_steps` must be at most {MAX_STEPS}, but is {num_inference_steps}."
            )
        check_same_config("guide", guide, transformer, ("num_classes", "in_channels"))
        check_same_config("probe", probe, transformer, ("num_classes",))
        self.register_to_config(
            id2label={str(key): name for key, name in self.id2label.items()},
            calibration=calibration,
            num_inference_steps=num_inference_steps,
            **scales,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None = None, **kwargs: Any) -> Self:
        """Loads a saved pipeline. Without an argument, loads the bundled cats and dogs.

        Args:
            pretrained_model_name_or_path (`str` or `Path`, *optional*): a folder, a Hub id, or `"fast"`, the
                bundled model that draws in a few steps.
            kwargs: see [`DiffusionPipeline.from_pretrained`]. `use_safetensors` defaults to `True`, so that
                no pickle is read.
        """
        if pretrained_model_name_or_path is None:
            pretrained_model_name_or_path = Path(__file__).parent / "pretrained"
        kwargs.setdefault("use_safetensors", True)
        if str(pretrained_model_name_or_path) != "fast" or Path("fast", cls.config_name).is_file():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        fast = importlib.import_module(f"{__name__.rpartition('.')[0]}.fast")
        pipeline = super().from_pretrained(Path(__file__).parent / "pretrained", **{**fast.OPTIONS, **kwargs})
        fast.tune(pipeline)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Makes a pipeline that shares the components and the configuration of another.

        Args:
            pipeline (`DiffusionPipeline`): a pipeline with a `transformer` and a `scheduler`.
            kwargs: arguments of this pipeline that replace those of the other, and `dtype`, the precision of
                the components, which defaults to that of the other pipeline.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", pipeline.dtype))
        available = {**pipeline.config, **pipeline.components}
        names = inspect.signature(cls.__init__).parameters
        new = cls(**{**{name: available[name] for name in names if name in available}, **kwargs})
        if "_name_or_path" in pipeline.config:
            new.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        # diffusers warns of some casts even if they change nothing.
        return new if new.dtype == dtype else new.to(dtype=dtype)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves `model_index.json`, and beside it the source files of classes that diffusers does not have.

        `save_pretrained` and `push_to_hub` call this method before anything is uploaded. The folder can then
        be loaded without this package by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

        Args:
            save_directory (`str` or `Path`): the folder of the pipeline.
            push_to_hub (`bool`, defaults to `False`): not supported; call `push_to_hub` of the pipeline.

        Raises:
            ValueError: if `push_to_hub` is true.
        """
        if push_to_hub:
            raise ValueError("An index alone cannot be pushed; use `pipeline.push_to_hub(repo_id)`.")
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        index["_class_name"] = [copy_source(type(self).__module__, folder), type(self).__name__]
        # The other files lie beside this file, or in the folder that the pipeline was loaded from.
        origins = (Path(__file__).parent, Path(str(self.config.get("_name_or_path"))))
        for name in PIPELINE_MODULES:
            sources = [origin / f"{name}.py" for origin in origins if (origin / f"{name}.py").is_file()]
            if sources:
                copy_file(sources[0], folder)
        for name in self.components:
            library, class_name = index.get(name, (None, None))
            if library is not None and library.partition(".")[0] != "diffusers":
                index[name] = [copy_source(library, folder / name), class_name]
        if getattr(self.transformer, "_auto_class", None) is not None:
            # `AutoModel.from_pretrained(folder, subfolder="transformer")` looks here first.
            index["auto_map"] = {self.transformer._auto_class: ".".join(index["transformer"])}
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)
        if not isinstance(config, dict):
            raise ValueError(f"{str(json_file)!r} must hold a JSON object.")
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = str(*config["_class_name"][-1:])
        return config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads `model_index.json`; see [`ConfigMixin.load_config`].

        The installed package uses its own classes and runs no code of the folder: it reads the names of
        source files as modules of the package. It also checks the components of a local folder here, before
        diffusers builds them.

        Raises:
            ValueError: if a component is not given as a library and a class, or cannot be loaded safely.
        """
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in ("transformer", "scheduler", "guider", "guide", "probe"):
            pair = config.get(name, [None, None])
            if not isinstance(pair, list) or [type(part) for part in pair] not in (
                [str, str],
                [type(None), type(None)],
            ):
                raise ValueError(
                    f"`{name}` in {cls.config_name} must be a library and a class, but is "
                    f"{reprlib.repr(pair)}."
                )
        package = __name__.rpartition(".")[0]
        if package.startswith("diffusers_modules"):  # this is the copy of this file in a folder
            return loaded
        for value in config.values():
            stem = str(value[0]).rpartition(".")[2] if isinstance(value, list) and value else None
            if stem in COMPONENT_MODULES:
                value[0] = importlib.import_module(f"{package}.{stem}").__name__
        if Path(pretrained_model_name_or_path).is_dir():
            # Not a relative import, which diffusers would look for in the folder.
            checks = importlib.import_module(f"{package}.component_checks")
            checks.check_components(config, Path(pretrained_model_name_or_path))
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Leaves out what the index holds for `AutoModel`; see [`ConfigMixin.extract_init_dict`]."""
        own = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return super().extract_init_dict(own, **kwargs)

    @property
    def class_names(self) -> list[str]:
        """The name of each class, or its id if it has no name."""
        return [self.id2label.get(index, str(index)) for index in range(self.null_class_id)]

    @property
    def null_class_id(self) -> int:
        """The id of the null class of classifier-free guidance, which is the number of classes."""
        return self.transformer.config.num_classes

    def get_label_ids(self, class_labels: Any) -> list[int]:
        """Maps class names and ids, alone or in a list, nested or a tensor, to a flat list of class ids.

        Raises:
            ValueError: if a name is unknown or an id is out of range.
        """
        if hasattr(class_labels, "tolist"):  # tensors and arrays
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (list, tuple)):
            return [label_id for label in class_labels for label_id in self.get_label_ids(label)]
        if isinstance(class_labels, str):
            for label_id, name in self.id2label.items():
                if name == class_labels:
                    return [label_id]
            names = ", ".join(self.id2label.values()) or f"none; use ids in [0, {self.null_class_id - 1}]"
            raise ValueError(f"There is no class {class_labels!r}; this pipeline knows {names}.")
        if not isinstance(class_labels, Integral):
            raise ValueError(f"A class label must be a name or an integer, but is {class_labels!r}.")
        label_id = int(class_labels)
        if not 0 <= label_id < self.null_class_id:
            raise ValueError(f"A class id must be in [0, {self.null_class_id - 1}], but is {label_id}.")
        return [label_id]

    def prepare_images(self, images: Any, num_channels: int | None = None) -> torch.Tensor:
        """Returns images as `(N, channels, height, width)` in [-1, 1], upright, resized and cropped.

        The number of channels is that of the model if it is not given.

        Raises:
            ValueError: if there is no image, or an image cannot be used; the message names it.
        """
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise ValueError("There is no image.")
        return torch.stack(
            [self.prepare_image(image, f"Image {i}", num_channels) for i, image in enumerate(images)]
        )

    def prepare_image(self, image: Any, name: str, num_channels: int | None = None) -> torch.Tensor:
        """Returns one image as `(channels, height, width)` in [-1, 1]; see [`prepare_images`]."""
        config = self.transformer.config
        return image_tensor(image, name, config.sample_size, num_channels or config.in_channels)

    @property
    def is_tuned(self) -> bool:
        """Whether the model was tuned to draw in a few steps without guidance, as its scheduler tells."""
        # `EDMEulerScheduler.from_config` keeps settings of another scheduler that it does not use.
        has_solvers = "solver" in inspect.signature(type(self.scheduler).__init__).parameters
        return has_solvers and self.scheduler.config.solver == "consistency"

    def takes_argument(self, name: str) -> bool:
        """Whether the model's `forward` has an argument of this name."""
        model = self.transformer._orig_mod if is_compiled_module(self.transformer) else self.transformer
        return name in inspect.signature(type(model).forward).parameters  # hooks replace that of the model

    def check_scheduler(self) -> None:
        """Raises `ValueError` if the scheduler does not have the preconditioning of EDM."""
        if not hasattr(self.scheduler, "precondition_outputs"):
            raise ValueError(
                "The scheduler must be an EDM scheduler such as `AdaptiveEDMScheduler`, but is of the class "
                f"{type(self.scheduler).__name__}."
            )


def eight_bit_image(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Returns an image upright, in mode `"RGB"`, `"L"` or `"RGBA"`.

    An image is put on white where it is transparent, except in the mode `"RGBA"`.

    16-bit grey levels are scaled; Pillow's own conversion would cut them off at 255.

    Raises:
        ValueError: if the pixels are floating-point numbers, whose range is unknown.
    """
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many kinds of exceptions for damaged EXIF; the pixels are usable anyway
        image = image.copy()
    if image.mode == "F":
        raise ValueError("the pixels are floating-point numbers of an unknown range.")
    if image.mode[0] == "I":
        # Of the 16-bit modes, only "I" can be scaled in every byte order.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data and mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Reads an image file as [`eight_bit_image`] describes.

    Raises:
        ValueError: if the file cannot be read, or has more than `MAX_IMAGE_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is stricter
            with Image.open(path, formats=IMAGE_FORMATS) as file:
                if file.width * file.height > MAX_IMAGE_PIXELS:
                    raise ValueError(
                        f"the image has {file.width}×{file.height} pixels, more than {MAX_IMAGE_PIXELS:,}."
                    )
                file.load()
                return eight_bit_image(file, mode)
    except MemoryError:
        raise ValueError(f"{str(path)!r} is too large an image for the available memory.") from None
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from None


def image_tensor(image: Any, name: str, size: int, channels: int) -> torch.Tensor:
    """Returns a PIL image, the image at a path or a tensor as `(channels, size, size)` in [-1, 1].

    Raises:
        ValueError: if the image cannot be used; the message names it.
    """
    mode = {1: "L", 4: "RGBA"}.get(channels, "RGB")
    if isinstance(image, (str, Path)):
        name = repr(str(image))
        image = read_image(image, mode)
    elif isinstance(image, Image.Image):
        try:
            image = eight_bit_image(image, mode)
        except ValueError as error:
            raise ValueError(f"{name} cannot be used: {error}") from None
    if isinstance(image, Image.Image):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        image = data.view(size, size, channels).permute(2, 0, 1)
    if not isinstance(image, torch.Tensor):
        raise ValueError(f"{name} must be a PIL image, a path or a tensor, but is a {type(image).__name__}.")
    if image.ndim != 3 or image.shape[0] != channels or image.numel() == 0:
        raise ValueError(f"{name} must be of shape ({channels}, height, width), but is {tuple(image.shape)}.")
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):  # false for NaN
        raise ValueError(
            f"{name} must be in [0, 1], or uint8, but has values from {image.min():.3g} to {image.max():.3g}."
        )
    return resize_and_crop(image, size).clamp(0, 1) * 2 - 1


def resize_and_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes an image `(channels, height, width)` until its shorter side is `size`; crops its centre."""
    scale = size / min(image.shape[1:])
    height, width = (max(size, round(side * scale)) for side in image.shape[1:])
    if image.shape[1:] != (height, width):
        image = torch.nn.functional.interpolate(
            image[None], (height, width), mode="bicubic", antialias=True, align_corners=False
        )[0]
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]


def check_integer(name: str, value: Any) -> int:
    """Returns a positive integer of any integer type as an `int`.

    Raises:
        ValueError: if the value is not a positive integer.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, but is {value!r}.")
    return int(value)


def check_number(name: str, value: Any) -> float:
    """Returns a finite number of any real type as a `float`.

    Raises:
        ValueError: if the value is not a finite number.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, but is {reprlib.repr(value)}.")
    return float(value)


def check_scale(name: str, scale: float) -> None:
    """Raises `ValueError` if the strength of a guidance is out of range."""
    if abs(check_number(name, scale)) > MAX_SCALE:
        raise ValueError(f"`{name}` must be in [-{MAX_SCALE:g}, {MAX_SCALE:g}], but is {scale}.")


def check_same_config(
    component: str, model: ModelMixin | None, transformer: ModelMixin, names: tuple[str, ...]
) -> None:
    """Raises `ValueError` if values in the config of a component are not those of the denoiser."""
    if model is None:
        return
    for name in names:
        own, needed = model.config.get(name), transformer.config[name]
        if own != needed:
            raise ValueError(
                f"`{name}` of the {component} must be that of the transformer, {needed}, but is {own!r}."
            )


def check_calibration(calibration: dict | None) -> None:
    """Raises `ValueError` if a calibration does not hold the weights of the bands and of the methods."""
    if calibration is None:
        return
    known = calibration if isinstance(calibration, dict) else {}
    for name, count in {"weights": NUM_BANDS, "combination": 2}.items():
        weights = known.get(name, [0.0] * count if name == "combination" else None)
        if (
            not isinstance(weights, (list, tuple))
            or len(weights) != count
            or any(not isinstance(weight, Real) or isinstance(weight, bool) for weight in weights)
            or not all(0 <= weight < math.inf for weight in weights)
        ):
            raise ValueError(
                f"`calibration` must hold `{name}`, {count} finite numbers of at least 0, but is "
                f"{reprlib.repr(calibration)}."
            )


def check_labels(id2label: dict | None, num_classes: int) -> dict[int, str]:
    """Returns class names by id. The keys may be strings, because JSON turns integer keys into strings.

    Raises:
        ValueError: if a key is not the id of a class, a name is not printable, or two classes share a name.
    """
    if not isinstance(id2label, (dict, type(None))):
        raise ValueError(f"`id2label` must be a dict, but is {reprlib.repr(id2label)}.")
    labels = {}
    for key, name in (id2label or {}).items():
        if not str(key).isdecimal() or len(str(key)) > 18 or not int(key) < num_classes:
            raise ValueError(
                f"The keys of `id2label` must be in [0, {num_classes - 1}], but one is {reprlib.repr(key)}."
            )
        if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= MAX_LABEL_LENGTH:
            raise ValueError(
                f"The names in `id2label` must have 1 to {MAX_LABEL_LENGTH} printable characters, but one is "
                f"{reprlib.repr(name)}."
            )
        labels[int(key)] = name
    names = [labels.get(index, str(index)) for index in range(num_classes)] if labels else []
    if len(set(names)) < len(names):
        name = Counter(names).most_common(1)[0][0]
        raise ValueError(f"The names in `id2label` must differ, but two classes are {reprlib.repr(name)}.")
    return labels


def copy_file(source: Path, folder: Path) -> None:
    """Copies a file into a folder, unless it is there already."""
    target = folder / source.name
    if not target.exists() or not target.samefile(source):
        shutil.copyfile(source, target)


def copy_source(module_name: str, folder: Path) -> str:
    """Copies the source file of a module into a folder; returns its stem, which the index names it by.

    A module without a source file, such as a notebook, keeps its own name. Its classes then load only where
    the module exists.
    """
    source = Path(getattr(sys.modules[module_name], "__file__", None) or "")
    if not source.is_file():
        logger.warning(
            f"{module_name} has no source file to save, so the folder cannot be loaded without it."
        )
        return module_name
    copy_file(source, folder)
    return source.stem
