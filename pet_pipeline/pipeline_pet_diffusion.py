r"""PetDiffusionPipeline: class-conditional sampling with guidance that adapts to the noise level.

Classifier-free guidance is Ho and Salimans (2022). That it should act in a middle interval of noise levels is
Kynkäänniemi et al. (2024), "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality
in Diffusion Models"; that its strength should grow as noise falls is Wang et al. (2024), "Analysis of
Classifier-Free Guidance Weight Schedulers". Perturbed-attention guidance, away from what the denoiser
predicts when some of its blocks do not see the image as a whole, is Ahn et al. (2024), "Self-Rectifying
Diffusion Sampling with Perturbed-Attention Guidance".

This file travels inside every saved checkpoint: it imports PyTorch, diffusers and the standard library only.
"""

import importlib
import inspect
import json
import math
import reprlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import is_compiled_module, randn_tensor


logger = logging.get_logger(__name__)

GUIDANCE_SCHEDULES = ("adaptive", "constant", "interval", "original")
GUIDANCE_INTERVAL = (0.05, 5.0)  # of noise levels σ

# Multiplier of (guidance_scale - 1), linear in ln σ between these points: off while the composition forms,
# standard while the class is decided, increased for its details, and off where only texture is left.
ADAPTIVE_SCHEDULE = ((5.0, 0.0), (2.0, 1.0), (0.5, 1.0), (0.2, 1.5), (0.05, 1.5))


# Modules of this package that define components, and those that define pipelines over them: every saved
# folder holds them all.
COMPONENT_MODULES = ("transformer_pet", "scheduling_adaptive_edm")
PIPELINE_MODULES = ("pipeline_pet_diffusion", "pipeline_pet_classification")

MAX_LABEL_LENGTH = 256


def guidance_weight(
    sigma: float,
    guidance_scale: float,
    guidance_schedule: str | Callable[[float], float] = "adaptive",
    guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
    progress: float = 0.0,
) -> float:
    r"""Returns w(σ) in D = D_null + w·(D_class - D_null); 1 means no guidance.

    Args:
        sigma (`float`): noise level σ of this evaluation.
        guidance_scale (`float`): strength; at 1 every named schedule is 1 everywhere, except `"original"`.
        guidance_schedule (`str` or callable, defaults to `"adaptive"`):

            - `"adaptive"`: 1 + m(σ)·(guidance_scale - 1) with m = 0 for σ ≥ 5, rising to 1 at σ = 2 and from
              0.5 to 1.5 at σ = 0.2, and 0 below σ = 0.05;
            - `"constant"`: guidance_scale;
            - `"interval"`: guidance_scale inside `guidance_interval`, 1 outside;
            - `"original"`: by fraction of steps: 1 for the first 5 %, then ½, 1, 1.5 and 2 times
              guidance_scale from 5, 20, 70 and 90 % on;
            - a callable σ → w.
        guidance_interval (`tuple[float, float]`, defaults to `(0.05, 5.0)`): lowest and highest guided σ.
        progress (`float`, defaults to 0.0): fraction of steps done, in [0, 1); used by `"original"`.

    Raises:
        ValueError: if there is no such schedule, or a callable's result is not finite.
    """
    if callable(guidance_schedule):
        weight = float(guidance_schedule(sigma))
        if not math.isfinite(weight):
            raise ValueError(
                f"`guidance_schedule` returned {weight} at σ = {sigma:.4g}; it has to be finite."
            )
        return weight
    if guidance_schedule == "adaptive":
        return 1 + _interpolate_log(sigma, ADAPTIVE_SCHEDULE) * (guidance_scale - 1)
    if guidance_schedule == "constant":
        return guidance_scale
    if guidance_schedule == "interval":
        low, high = guidance_interval
        return guidance_scale if low <= sigma <= high else 1.0
    if guidance_schedule == "original":
        factor = next(
            f
            for start, f in ((0.9, 2.0), (0.7, 1.5), (0.2, 1.0), (0.05, 0.5), (0.0, None))
            if progress >= start
        )
        return 1.0 if factor is None else factor * guidance_scale
    raise ValueError(
        f"There is no guidance schedule {guidance_schedule!r}; choose one of "
        f"{', '.join(GUIDANCE_SCHEDULES)}, or pass a function of σ."
    )


def _interpolate_log(sigma: float, points: tuple[tuple[float, float], ...]) -> float:
    """Interpolates (σ, value) points, σ falling, linearly in ln σ; 0 below the last of them."""
    if sigma >= points[0][0]:
        return points[0][1]
    for (high, value_high), (low, value_low) in zip(points, points[1:]):
        if sigma >= low:
            fraction = math.log(high / sigma) / math.log(high / low)
            return value_high + fraction * (value_low - value_high)
    return 0.0


class PetDiffusionPipeline(DiffusionPipeline):
    r"""Generates images of given classes with a class-conditional EDM denoiser.

    This pipeline inherits from [`DiffusionPipeline`], whose documentation describes loading, saving, devices,
    offloading and so on.

    Args:
        transformer ([`PetTransformer2DModel`]): the denoiser; its class `num_classes` is the null class.
            Any model with the same `forward` and the same config entries will do.
        scheduler ([`AdaptiveEDMScheduler`]): or `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`.
        guider (`BaseGuidance`, *optional*): a guider of diffusers, which then replaces `guidance_scale`,
            `guidance_schedule` and `pag_scale`. It is given denoised images. Guiders that skip layers know
            the models of diffusers only.
        id2label (`dict`, *optional*): class names by id, for example `{0: "cat", 1: "dog"}`.
        calibration (`dict`, *optional*): kept for [`PetClassificationPipeline`]; not used here.
        pag_scale (`float`, defaults to 0.0): strength of perturbed-attention guidance where a call gives
            none: what suits the model.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents", "pred_original_sample"]
    _optional_components = ["guider"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        guider: BaseGuidance | None = None,
        id2label: dict | None = None,
        calibration: dict | None = None,
        pag_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, guider=guider)
        num_classes = transformer.config.num_classes
        self.id2label = check_labels(id2label, num_classes)
        check_pag_scale(pag_scale)
        self.register_to_config(
            id2label={str(key): name for key, name in self.id2label.items()},
            calibration=calibration,
            pag_scale=pag_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._guidance_scale = 1.0
        self._pag_scale = 0.0
        self._guidance_schedule: str | Callable[[float], float] = "adaptive"
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None = None, **kwargs: Any
    ) -> "PetDiffusionPipeline":
        """Loads a saved pipeline; without an argument, the cats and dogs that come with the package.

        Args:
            pretrained_model_name_or_path (`str` or `Path`, *optional*): a folder or a Hub id.
            kwargs: see [`DiffusionPipeline.from_pretrained`]; `use_safetensors` defaults to `True`, so that
                no pickle is read.
        """
        if pretrained_model_name_or_path is None:
            pretrained_model_name_or_path = Path(__file__).parent / "pretrained"
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves `model_index.json`, and beside it the source files of the classes that are not of diffusers.

        `save_pretrained` and `push_to_hub` call this before anything is uploaded. The folder can then be
        loaded without this package, by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

        Args:
            save_directory (`str` or `Path`): the folder of the pipeline.
            push_to_hub (`bool`, defaults to `False`): not supported here; use `push_to_hub` of the pipeline.

        Raises:
            ValueError: if `push_to_hub` is asked for.
        """
        if push_to_hub:
            raise ValueError("An index alone cannot be pushed; use `pipeline.push_to_hub(repo_id)`.")
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text())
        stem = copy_source(type(self).__module__, folder)
        index["_class_name"] = [stem, type(self).__name__]
        # The other pipeline over the same components lies beside this one, or in the folder this one came
        # from.
        for name in PIPELINE_MODULES:
            sources = [
                origin / f"{name}.py"
                for origin in (Path(__file__).parent, Path(str(self.config.get("_name_or_path"))))
            ]
            source = next((source for source in sources if source.is_file()), None)
            target = folder / f"{name}.py"
            if source is not None and not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        for name in self.components:
            library, class_name = index.get(name, (None, None))
            if library is not None and library.partition(".")[0] != "diffusers":
                index[name] = [copy_source(library, folder / name), class_name]
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    # With this package installed, its own classes are used and no code of a checkpoint is run: the names of
    # source files in `model_index.json` are read as the modules of this package.

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)
        if not isinstance(config, dict):
            raise ValueError(f"{str(json_file)!r} has to hold a JSON object.")
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = str(*config["_class_name"][-1:])
        return config

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads `model_index.json`; see [`ConfigMixin.load_config`].

        Raises:
            ValueError: if it does not name a library and a class for each component.
        """
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in ("transformer", "scheduler", "guider"):
            pair = config.get(name, [None, None])
            if not isinstance(pair, list) or [type(part) for part in pair] not in (
                [str] * 2,
                [type(None)] * 2,
            ):
                raise ValueError(
                    f"`{name}` in {cls.config_name} has to be a library and a class, but is "
                    f"{reprlib.repr(pair)}."
                )
        package = __name__.rpartition(".")[0]
        if not package.startswith("diffusers_modules"):  # where diffusers puts the code of checkpoints
            for value in config.values():
                stem = str(value[0]).rpartition(".")[2] if isinstance(value, list) and value else None
                if stem in COMPONENT_MODULES:
                    value[0] = importlib.import_module(f"{package}.{stem}").__name__
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "PetDiffusionPipeline":
        """Makes a pipeline that shares the components of another, in the precision they are in.

        Args:
            pipeline (`DiffusionPipeline`): a pipeline with a `transformer` and a `scheduler`, whose precision
                a `transformer` among the replacements is brought to.
            kwargs: components and arguments to replace, see [`DiffusionPipeline.from_pipe`].
        """
        # `DiffusionPipeline.from_pipe` would take over models of exactly the annotated class only, and cast
        # to float32.
        if "transformer" not in kwargs:
            kwargs["transformer"] = pipeline.transformer
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        return super().from_pipe(pipeline, **kwargs)

    @property
    def guidance_scale(self) -> float:
        """Strength of the guidance in the current call."""
        return self._guidance_scale

    @property
    def pag_scale(self) -> float:
        """Strength of the perturbed-attention guidance in the current call."""
        return self._pag_scale

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps of the current call are skipped; callbacks set `_interrupt`."""
        return self._interrupt

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call may need unconditional evaluations."""
        return (
            self.guider is not None
            or callable(self._guidance_schedule)
            or self._guidance_schedule == "original"
            or self._guidance_scale != 1
        )

    def _can_be_perturbed(self) -> bool:
        """Whether the model can make the worse prediction of perturbed-attention guidance."""
        is_compiled = is_compiled_module(self.transformer)
        model = self.transformer._orig_mod if is_compiled else self.transformer
        return "perturbed_layers" in inspect.signature(model.forward).parameters

    def get_label_ids(self, class_labels: Any) -> list[int]:
        """Maps class names and ids, alone or in a list, nested or a tensor, to a flat list of class ids.

        Raises:
            ValueError: if a name is unknown or an id out of range.
        """
        if hasattr(class_labels, "tolist"):  # tensors and arrays
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (list, tuple)):
            return [label_id for label in class_labels for label_id in self.get_label_ids(label)]
        num_classes = self.transformer.config.num_classes
        if isinstance(class_labels, str):
            ids = [key for key, name in self.id2label.items() if name == class_labels]
            if not ids:
                names = ", ".join(self.id2label.values()) or f"none; use ids in [0, {num_classes - 1}]"
                raise ValueError(f"There is no class {class_labels!r}; this pipeline knows {names}.")
            return ids[:1]
        try:
            label_id = class_labels.__index__()
        except AttributeError:
            raise ValueError(
                f"A class label has to be a name or an integer, but is {class_labels!r}."
            ) from None
        if not 0 <= label_id < num_classes:
            raise ValueError(f"A class id has to be in [0, {num_classes - 1}], but is {label_id}.")
        return [label_id]

    def check_inputs(
        self,
        class_labels: list[int],
        negative_class_labels: list[int] | None,
        guidance_scale: float,
        guidance_schedule: str | Callable[[float], float],
        guidance_interval: tuple[float, float],
        pag_scale: float,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raises `ValueError` for an argument of [`__call__`] that is out of range."""
        if not hasattr(self.scheduler, "precondition_outputs"):
            raise ValueError(
                "The scheduler has to be one of EDM, as `AdaptiveEDMScheduler` is, but is of the class "
                f"{type(self.scheduler).__name__}."
            )
        if not class_labels:
            raise ValueError("`class_labels` is empty.")
        if negative_class_labels is not None and len(negative_class_labels) not in (1, len(class_labels)):
            raise ValueError(
                f"`negative_class_labels` has to be one label or one for each of the {len(class_labels)} "
                f"class labels, but there are {len(negative_class_labels)}."
            )
        if (
            isinstance(num_images_per_prompt, bool)
            or not isinstance(num_images_per_prompt, int)
            or num_images_per_prompt < 1
        ):
            raise ValueError(
                f"`num_images_per_prompt` has to be a positive integer, but is {num_images_per_prompt!r}."
            )
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` has to be finite, but is {guidance_scale}.")
        check_pag_scale(pag_scale)
        if pag_scale != 0 and not self._can_be_perturbed():
            raise ValueError(
                "`pag_scale` needs a model whose `forward` takes `perturbed_layers`, as that of "
                "`PetTransformer2DModel` does, but the model is of the class "
                f"{type(self.transformer).__name__}."
            )
        if not callable(guidance_schedule) and guidance_schedule not in GUIDANCE_SCHEDULES:
            guidance_weight(1.0, guidance_scale, guidance_schedule)  # raises
        low, high = guidance_interval
        if not 0 <= low < high:
            raise ValueError(f"`guidance_interval` has to be 0 ≤ low < high, but is {guidance_interval}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be one of pil, np, pt, latent, but is {output_type!r}.")
        unknown = [
            name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs
        ]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but has "
                f"{unknown}."
            )

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Returns starting noise, `(batch, channels, height, width)` in float32, scaled to the first level.

        Raises:
            ValueError: if `latents` has another shape or the number of generators is not the batch size.
        """
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"There are {len(generator)} generators for {batch_size} images; pass one, or one for each."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            # Other sizes than the training size may be asked for, through latents of that size.
            if latents.ndim != 4 or latents.shape[:2] != shape[:2]:
                raise ValueError(f"`latents` has to be of shape {shape}, but is {tuple(latents.shape)}.")
            latents = latents.to(device=device, dtype=torch.float32)
        return latents * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | list | torch.Tensor | None = None,
        num_inference_steps: int = 18,
        sigmas: list[float] | torch.Tensor | None = None,
        guidance_scale: float = 2.5,
        guidance_schedule: str | Callable[[float], float] = "adaptive",
        guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
        pag_scale: float | None = None,
        pag_applied_layers: list[int] | None = None,
        negative_class_labels: str | int | list | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        r"""Generates images.

        Args:
            class_labels (`str`, `int`, or a list or tensor of them, *optional*): class names or ids, one
                image for each; `None` means one image of every class.
            num_inference_steps (`int`, defaults to 18): denoising steps.
            sigmas (`list[float]` or `torch.Tensor`, *optional*): noise levels to use instead, strictly
                decreasing.
            guidance_scale (`float`, defaults to 2.5): strength of the guidance. At 1 the named schedules but
                `"original"` do without; at 0 `"constant"` samples from the null class.
            guidance_schedule (`str` or callable, defaults to `"adaptive"`): how the strength varies with the
                noise level σ: `"adaptive"`, `"constant"`, `"interval"`, `"original"`, or a function σ → w.
                See [`guidance_weight`].
            guidance_interval (`tuple[float, float]`, defaults to `(0.05, 5.0)`): lowest and highest guided σ
                of the schedule `"interval"`, and of perturbed-attention guidance.
            pag_scale (`float`, *optional*): strength s of perturbed-attention guidance (PAG), which adds
                s·(D_class - D_perturbed) inside `guidance_interval`, for one more evaluation a step there:
                shapes become clearer and surroundings plainer. At 0 there is none; if not given, it is that
                of the pipeline's config, for a model that can be perturbed.
            pag_applied_layers (`list[int]`, *optional*): blocks to perturb, counted from 0; if not given, the
                one at 3/10 of the depth.
            negative_class_labels (like `class_labels`, *optional*): classes to steer away from, instead of
                the null class; one, or one for each class label.
            num_images_per_prompt (`int`, defaults to 1): images for each class label.
            generator (`torch.Generator` or a list of them, *optional*): for reproducible images. With a list,
                one for each image, an image does not depend on the others in its batch.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): starting noise
                of unit variance.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"`, `(batch, height, width, channels)` in
                [0, 1]; `"pt"`, `(batch, channels, height, width)` in [0, 1]; or `"latent"`, the raw tensor,
                about [-1, 1].
            return_dict (`bool`, defaults to `True`): return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (callable, *optional*): called after each step as
                `callback(pipeline, step, timestep, callback_kwargs)`; returns a dict whose `latents`, if
                there, replaces the sample.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): what
                `callback_kwargs` holds, out of `latents` and `pred_original_sample` (the denoised image D
                this step was taken with).

        Returns:
            `ImagePipelineOutput` or `tuple`: the images.

        Raises:
            ValueError: if an argument is out of range; the message names it.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Inputs
        if pag_scale is None:
            suits = self.guider is None and self._can_be_perturbed()
            pag_scale = self.config.pag_scale if suits else 0.0
        num_classes = self.transformer.config.num_classes
        label_ids = list(range(num_classes)) if class_labels is None else self.get_label_ids(class_labels)
        negative_ids = None if negative_class_labels is None else self.get_label_ids(negative_class_labels)
        self.check_inputs(
            label_ids,
            negative_ids,
            guidance_scale,
            guidance_schedule,
            guidance_interval,
            pag_scale,
            num_images_per_prompt,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._guidance_schedule = guidance_schedule
        self._pag_scale = pag_scale
        self._interrupt = False
        device = self._execution_device
        null_ids = [num_classes] if negative_ids is None else negative_ids
        null_ids = null_ids * len(label_ids) if len(null_ids) == 1 else null_ids
        labels = torch.tensor(label_ids, device=device).repeat_interleave(num_images_per_prompt)
        null_labels = torch.tensor(null_ids, device=device).repeat_interleave(num_images_per_prompt)

        # 2. Noise levels
        timesteps = retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(timesteps)

        # 3. Starting noise
        latents = self.prepare_latents(len(labels), generator, latents, device)

        # 4. Denoising loop
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                model_input = self.scheduler.scale_model_input(latents, timestep)
                sigma = self.scheduler.sigmas[i].item()
                if self.guider is not None:
                    self.guider.set_state(step=i, num_inference_steps=len(timesteps), timestep=timestep)
                    model_output = self._guider_output(
                        model_input, latents, timestep, labels, null_labels, sigma
                    )
                else:
                    weight = guidance_weight(
                        sigma,
                        self._guidance_scale,
                        guidance_schedule,
                        guidance_interval,
                        progress=i / len(timesteps),
                    )
                    low, high = guidance_interval
                    model_output = self._guided_output(
                        model_input,
                        timestep,
                        labels,
                        null_labels,
                        weight,
                        self._pag_scale if low <= sigma <= high else 0.0,
                        pag_applied_layers,
                    )
                if callback_on_step_end is not None:
                    pred_original_sample = self.scheduler.precondition_outputs(latents, model_output, sigma)
                latents = self.scheduler.step(
                    model_output, timestep, latents, generator=generator, return_dict=False
                )[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, timestep, callback_kwargs)
                    latents = (callback_outputs or {}).pop("latents", latents)
                progress_bar.update()

        # 5. Images
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _model_output(
        self, model_input: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Runs the network on `(batch, channels, height, width)`; returns its raw output in float32."""
        timesteps = timestep.float().expand(len(model_input))
        output = self.transformer(
            model_input.to(self.transformer.dtype), timesteps, labels, **kwargs, return_dict=False
        )[0]
        return output.float()

    def _guided_output(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor,
        null_labels: torch.Tensor,
        weight: float,
        pag_weight: float,
        pag_applied_layers: list[int] | None,
    ) -> torch.Tensor:
        """Both kinds of guidance; they do the same to F as to D, which is affine in it."""
        if weight == 1:
            conditional = output = self._model_output(model_input, timestep, labels)
        else:
            both = self._model_output(
                torch.cat([model_input] * 2), timestep, torch.cat([labels, null_labels])
            )
            conditional, unconditional = both.chunk(2)
            output = unconditional + weight * (conditional - unconditional)
        if pag_weight == 0:
            return output
        if pag_applied_layers is None:
            pag_applied_layers = [3 * self.transformer.config.num_layers // 10]
        perturbed = self._model_output(model_input, timestep, labels, perturbed_layers=pag_applied_layers)
        return output + pag_weight * (conditional - perturbed)

    def _guider_output(
        self,
        model_input: torch.Tensor,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor,
        null_labels: torch.Tensor,
        sigma: float,
    ) -> torch.Tensor:
        """Guidance by a guider, which sees denoised images; returns the network output they stand for."""

        def precondition(model_output: torch.Tensor) -> torch.Tensor:
            return self.scheduler.precondition_outputs(latents, model_output, sigma)

        batches = self.guider.prepare_inputs({"class_labels": (labels, null_labels)})
        for batch in batches:
            self.guider.prepare_models(self.transformer)
            batch.noise_pred = precondition(self._model_output(model_input, timestep, batch.class_labels))
            self.guider.cleanup_models(self.transformer)
        denoised = self.guider(batches)[0]
        # D = c_skip·x + c_out·F is inverted with the scheduler's own formula at F = 0 and F = 1.
        offset = precondition(torch.zeros_like(latents))
        return (denoised - offset) / (precondition(torch.ones_like(latents)) - offset)


def check_pag_scale(pag_scale: float) -> None:
    """Raises `ValueError` if the strength of perturbed-attention guidance is not a finite number."""
    if isinstance(pag_scale, bool) or not isinstance(pag_scale, (int, float)) or not math.isfinite(pag_scale):
        raise ValueError(f"`pag_scale` has to be a finite number, but is {pag_scale!r}.")


def check_labels(id2label: dict | None, num_classes: int) -> dict[int, str]:
    """Returns class names by id; the keys may be strings, which JSON turns integers into.

    Raises:
        ValueError: if a key is not the id of a class, a name is not a printable one, or two are the same.
    """
    if not isinstance(id2label, (dict, type(None))):
        raise ValueError(f"`id2label` has to be a dict, but is {reprlib.repr(id2label)}.")
    labels = {}
    for key, name in (id2label or {}).items():
        if not str(key).isdecimal() or len(str(key)) > 18 or not int(key) < num_classes:
            raise ValueError(
                f"The keys of `id2label` have to be in [0, {num_classes - 1}], but one is "
                f"{reprlib.repr(key)}."
            )
        if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= MAX_LABEL_LENGTH:
            raise ValueError(
                f"The names in `id2label` have to be of 1 to {MAX_LABEL_LENGTH} printable characters, but "
                f"one is {reprlib.repr(name)}."
            )
        labels[int(key)] = name
    names = [labels.get(index, str(index)) for index in range(num_classes)] if labels else []
    if len(set(names)) < len(names):
        name = Counter(names).most_common(1)[0][0]
        raise ValueError(f"The names in `id2label` have to differ, but two classes are {reprlib.repr(name)}.")
    return labels


def copy_source(module_name: str, folder: Path) -> str:
    """Copies the source file of a module into a folder and returns its stem, which the index names it by.

    A module without a source file, such as a notebook, keeps its own name; its classes load with it alone.
    """
    source = Path(getattr(sys.modules[module_name], "__file__", None) or "")
    if not source.is_file():
        logger.warning(
            f"{module_name} has no source file to save, so the folder cannot be loaded without it."
        )
        return module_name
    target = folder / source.name
    if not target.exists() or not target.samefile(source):
        shutil.copyfile(source, target)
    return source.stem


def retrieve_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device,
    sigmas: list[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Sets the scheduler's grid and returns its timesteps.

    Raises:
        ValueError: if the number of steps is not a positive integer, or `sigmas` is given to a scheduler
            that does not use noise levels as they are given.
    """
    if sigmas is None:
        if (
            not isinstance(num_inference_steps, Integral)
            or num_inference_steps is True
            or num_inference_steps < 1
        ):
            raise ValueError(
                f"`num_inference_steps` has to be a positive integer, but is {num_inference_steps!r}."
            )
        scheduler.set_timesteps(int(num_inference_steps), device=device)
        return scheduler.timesteps
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    # EDMEulerScheduler takes them, but as positions on its own ramp.
    if not takes_sigmas or isinstance(scheduler, EDMEulerScheduler):
        raise ValueError(
            f"The scheduler class {type(scheduler).__name__} does not use custom `sigmas` as they are given; "
            "pass `num_inference_steps`, or use AdaptiveEDMScheduler."
        )
    scheduler.set_timesteps(sigmas=sigmas, device=device)
    return scheduler.timesteps
