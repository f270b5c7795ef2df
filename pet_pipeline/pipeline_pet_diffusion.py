r"""PetDiffusionPipeline: class-conditional sampling with guidance that adapts to the noise level.

Classifier-free guidance is Ho and Salimans (2022). Autoguidance is Karras et al. (2024), "Guiding a Diffusion
Model with a Bad Version of Itself": it steers away from what a smaller and less trained model predicts.
Editing an image is Meng et al. (2022), "SDEdit: Guided Image Synthesis and Editing with Stochastic
Differential Equations".
Perturbed-attention guidance is Ahn et al. (2024), "Self-Rectifying Diffusion Sampling with
Perturbed-Attention Guidance": it steers away from what the denoiser predicts when some of its blocks do not
see the image as a whole.

This file travels inside every saved checkpoint: it imports PyTorch, diffusers, the standard library,
`guidance_pet` and `pipeline_pet_loading`, which travel too.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .guidance_pet import GUIDANCE_INTERVAL, guidance_weight, is_interval
from .pipeline_pet_loading import PetPipelineMixin, check_integer, check_number, check_scale


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PetDiffusionPipeline(PetPipelineMixin, DiffusionPipeline):
    r"""Generates images of given classes with a class-conditional EDM denoiser.

    [`PetPipelineMixin`] documents the arguments, loading and saving. [`DiffusionPipeline`] documents devices,
    offloading and the other methods that all pipelines have.
    """

    _callback_tensor_inputs = ["latents", "pred_original_sample"]

    image_processor = VaeImageProcessor(vae_scale_factor=1)
    _guidance_scale = 1.0
    _pag_scale = 0.0
    _autoguidance_scale = 1.0
    _guidance_schedule: str | Callable[[float], float] = "adaptive"
    _num_timesteps = 0
    _interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Strength of the guidance in the current call."""
        return self._guidance_scale

    @property
    def pag_scale(self) -> float:
        """Strength of the perturbed-attention guidance in the current call."""
        return self._pag_scale

    @property
    def autoguidance_scale(self) -> float:
        """Strength of the autoguidance in the current call."""
        return self._autoguidance_scale

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
        return self.guider is not None or callable(self._guidance_schedule) or self._guidance_scale != 1

    def check_inputs(
        self,
        guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: Sequence[str] | None = (),
        pag_applied_layers: Sequence[int] | None = None,
    ) -> None:
        """Raises `ValueError` for an unsuitable component or an argument of [`__call__`] out of range.

        The guidance that is checked is that of [`set_guidance`].
        """
        self.check_scheduler()
        # Guiders that change the model know the attention and the blocks of diffusers' models only.
        if self.guider is not None and type(self.guider).prepare_models is not BaseGuidance.prepare_models:
            raise ValueError(
                f"The guider {type(self.guider).__name__} changes layers of the model, which is not "
                "supported; use `pag_scale` for perturbed-attention guidance, or a guider that uses "
                "predictions only, such as ClassifierFreeGuidance."
            )
        check_number("guidance_scale", self._guidance_scale)
        check_scale("pag_scale", self._pag_scale)
        if self._pag_scale != 0 and not self.takes_argument("perturbed_layers"):
            raise ValueError(
                "`pag_scale` needs a model whose `forward` takes `perturbed_layers`, such as "
                f"`PetTransformer2DModel`, but the model is of the class {type(self.transformer).__name__}."
            )
        if self._pag_scale != 0 and pag_applied_layers is not None:
            blocks = range(self.transformer.config.num_layers)
            is_list = isinstance(pag_applied_layers, (list, tuple))
            if not is_list or not all(layer in blocks for layer in pag_applied_layers):
                raise ValueError(
                    f"`pag_applied_layers` must be a list of blocks from 0 to {len(blocks) - 1}, but is "
                    f"{pag_applied_layers!r}."
                )
        check_scale("autoguidance_scale", self._autoguidance_scale)
        if self._autoguidance_scale != 1 and self.guide is None:
            raise ValueError(
                "`autoguidance_scale` needs a pipeline with a `guide`, a worse model of the same images: "
                "`PetDiffusionPipeline.from_pretrained(folder, guide=model)`."
            )
        if not callable(self._guidance_schedule):  # raises if there is no such schedule
            guidance_weight(1.0, self._guidance_scale, self._guidance_schedule)
        is_guided = self.do_classifier_free_guidance or self._pag_scale != 0 or self._autoguidance_scale != 1
        if is_guided and self.is_tuned:
            raise ValueError(
                "The solver 'consistency' draws without guidance, since its models have learned that of "
                "their teacher: use `guidance_scale=1`, `pag_scale=0`, `autoguidance_scale=1` and no guider."
            )
        if not is_interval(guidance_interval):
            raise ValueError(
                f"`guidance_interval` must be two numbers with 0 ≤ low < high, but is {guidance_interval!r}."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}."
            )
        if not set(callback_on_step_end_tensor_inputs or ()) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, but is "
                f"{callback_on_step_end_tensor_inputs}."
            )

    def prepare_labels(
        self, class_labels: Any, negative_class_labels: Any, num_images_per_prompt: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the class ids to draw and the class ids to steer away from, each of shape `(batch,)`.

        For mixtures of classes, both are weights of shape `(batch, num_classes + 1)`.

        Raises:
            ValueError: if a class does not exist, there is none, or the numbers of labels do not fit.
        """
        repeats = check_integer("num_images_per_prompt", num_images_per_prompt)
        num_classes = self.null_class_id
        if class_labels is None:
            class_labels = list(range(num_classes))
        is_mixed = isinstance(class_labels, torch.Tensor) and class_labels.is_floating_point()
        models = [self.transformer, *([] if self.guide is None else [self.guide])]
        if is_mixed and not all(getattr(model, "takes_class_weights", False) for model in models):
            raise ValueError(
                "Weights of classes need models that take them, as `PetTransformer2DModel` does; pass labels."
            )
        if is_mixed and (class_labels.shape[1:] != (num_classes,) or not class_labels.isfinite().all()):
            raise ValueError(
                f"Weights of classes in `class_labels` must be finite and of shape (batch, {num_classes}), "
                f"but are {class_labels.tolist()!r:.100}."
            )
        ids = range(len(class_labels)) if is_mixed else self.get_label_ids(class_labels)
        if not ids:
            raise ValueError("`class_labels` is empty.")
        if negative_class_labels is None:
            null_ids = [self.null_class_id]
        else:
            null_ids = self.get_label_ids(negative_class_labels)
        if len(null_ids) not in (1, len(ids)):
            raise ValueError(
                f"`negative_class_labels` must be one label or one for each of the {len(ids)} class labels, "
                f"but there are {len(null_ids)}."
            )
        null_ids = null_ids * len(ids) if len(null_ids) == 1 else null_ids
        labels, null_labels = (torch.tensor(each, device=device) for each in (ids, null_ids))
        if is_mixed:
            labels = F.pad(class_labels.to(device, torch.float32), (0, 1))  # the null class has no weight
            null_labels = F.one_hot(null_labels, num_classes + 1).to(labels)
        return labels.repeat_interleave(repeats, 0), null_labels.repeat_interleave(repeats, 0)

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
        # Latents may be larger or smaller than the training images: they set the size of the images.
        elif latents.ndim != 4 or latents.shape[:2] != shape[:2] or 0 in latents.shape:
            raise ValueError(f"`latents` must be of shape {shape}, but is {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
    ) -> tuple[torch.Tensor, int]:
        """Sets the scheduler's grid; returns the timesteps of a call, and the index of the first in the grid.

        The arguments are those of [`__call__`].

        Raises:
            ValueError: if `strength` is out of range, or it or a mask is given without an image; or if the
                steps cannot be used, see [`retrieve_timesteps`].
        """
        if image is None:
            if strength is not None or mask_image is not None:
                raise ValueError("`strength` and `mask_image` need an `image` to edit.")
            return retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas), 0
        if strength is None:
            strength = 0.5 if mask_image is None else 1.0
        strength = check_number("strength", strength)
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` must be in (0, 1], but is {strength}.")
        if self.is_tuned and sigmas is None:  # it has too few steps to leave some of them out
            steps = check_integer("num_inference_steps", num_inference_steps)
            self.scheduler.set_timesteps(steps, device=device, strength=strength)
            return self.scheduler.timesteps, 0
        timesteps = retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas)
        order = self.scheduler.order
        num_steps = -(-len(timesteps) // order)
        first = (num_steps - max(1, int(num_steps * strength))) * order
        return timesteps[first:], first

    def prepare_edit(
        self, image: Any, mask_image: Any, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns images in [-1, 1], shaped to broadcast with `latents`, and where they are drawn anew.

        Raises:
            ValueError: if an image cannot be used, or the numbers or sizes do not fit `latents`.
        """
        edited = self.prepare_images(image)
        if edited.shape[2:] != latents.shape[2:]:
            raise ValueError(
                f"`latents` must be of the size of the image to edit, {tuple(edited.shape[2:])}, but are of "
                f"the size {tuple(latents.shape[2:])}."
            )
        mask = None
        if mask_image is not None:
            masks = self.prepare_images(mask_image, num_channels=1)
            mask = (masks > 0).to(latents.device)
        for name, given in (("image", edited), ("mask_image", mask)):
            if given is not None and len(given) not in (1, len(latents)):
                raise ValueError(
                    f"`{name}` must be one image or one for each of the {len(latents)} images to draw, but "
                    f"there are {len(given)}."
                )
        return edited.to(latents), mask

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | list | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | Callable[[float], float] = "adaptive",
        guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
        pag_scale: float | None = None,
        pag_applied_layers: list[int] | None = None,
        autoguidance_scale: float | None = None,
        negative_class_labels: str | int | list | torch.Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
    ) -> ImagePipelineOutput:
        r"""Generates images, or edits an image.

        Args:
            class_labels (`str`, `int`, or a list or tensor of them, *optional*): a class name or id for each
                image. `None` means one image of every class. A floating tensor of shape
                `(batch, num_classes)` mixes classes: its rows are weights of their embeddings, which
                [`PetTransformer2DModel`] takes.
            num_inference_steps (`int`, *optional*): number of denoising steps. `None` means the number in the
                pipeline's config.
            sigmas (`list[float]` or `torch.Tensor`, *optional*): noise levels that replace the scheduler's,
                strictly decreasing.
            guidance_scale (`float`, *optional*): strength of classifier-free guidance. At 1 the named
                schedules do not guide; at 0 `"constant"` samples from the null class. `None` means the value
                in the pipeline's config.
            guidance_schedule (`str` or callable, defaults to `"adaptive"`): how the strength varies with the
                noise level σ: `"adaptive"`, `"constant"`, `"interval"`, or a function σ → w. See
                [`guidance_weight`].
            guidance_interval (`tuple[float, float]`, defaults to `(0.05, 5.0)`): lowest and highest guided σ
                of the schedule `"interval"`, of perturbed-attention guidance and of autoguidance.
            pag_scale (`float`, *optional*): strength s of perturbed-attention guidance (PAG), in [-100, 100].
                PAG adds s·(D_class - D_perturbed) inside `guidance_interval`, which costs one more evaluation
                a step there. Shapes become clearer and surroundings plainer. 0 turns PAG off. `None` means
                the value in the pipeline's config if the model can be perturbed, and otherwise 0.
            pag_applied_layers (`list[int]`, *optional*): indices of the blocks that PAG perturbs. `None`
                means the block at 3/10 of the depth.
            autoguidance_scale (`float`, *optional*): strength w of autoguidance, which replaces D_class by
                D_guide + w·(D_class - D_guide) inside `guidance_interval`, where D_guide is what the
                pipeline's `guide` predicts for the same class. The guide then also supplies the difference
                D_class - D_null of classifier-free guidance, so that the denoiser is evaluated once a step.
                1 turns autoguidance off. `None` means the value in the pipeline's config if the pipeline has
                a guide, and otherwise 1.
            negative_class_labels (like `class_labels`, *optional*): classes to steer away from instead of the
                null class: one, or one for each class label.
            num_images_per_prompt (`int`, defaults to 1): number of images for each class label.
            generator (`torch.Generator` or a list of them, *optional*): makes the images reproducible. With a
                list of one generator for each image, an image does not depend on the others in its batch.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): starting noise
                of unit variance.
            output_type (`str`, defaults to `"pil"`): `"pil"`; `"np"`, an array of shape
                `(batch, height, width, channels)` in [0, 1]; `"pt"`, a tensor of shape
                `(batch, channels, height, width)` in [0, 1]; or `"latent"`, the raw tensor of the same shape,
                in about [-1, 1].
            return_dict (`bool`, defaults to `True`): return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end (callable, *optional*): called after each step as
                `callback(pipeline, step, timestep, callback_kwargs)`, where the steps of a call count from 0,
                also those of an edit. It returns a dict; if the dict has
                `latents`, they replace the sample.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): the tensors in
                `callback_kwargs`, out of `latents` and `pred_original_sample` (the denoised image D of the
                step).
            image (PIL image, path, tensor, or a list of them, *optional*): an image to edit: one, or one for
                each image to draw. Sampling begins with this image and noise, and not with noise alone
                (SDEdit). It is resized and cropped to the model's size.
            strength (`float`, *optional*): share of the steps, the last ones, that an edit takes, in (0, 1].
                The default is 0.5, or 1 with a `mask_image`. At 1, the image leaves hardly a trace. A model
                that was tuned to few steps begins at the noise level where another would begin, and takes its
                own levels below that.
            mask_image (PIL image, path, tensor, or a list of them, *optional*): white where `image` is to be
                drawn anew, and black where its pixels are kept.

        Returns:
            `ImagePipelineOutput` or `tuple`: the images.

        Raises:
            ValueError: if an argument is out of range; the message names it.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps
        self.set_guidance(guidance_scale, guidance_schedule, pag_scale, autoguidance_scale)
        self.check_inputs(
            guidance_interval, output_type, callback_on_step_end_tensor_inputs, pag_applied_layers
        )
        device = self._execution_device
        labels, null_labels = self.prepare_labels(
            class_labels, negative_class_labels, num_images_per_prompt, device
        )
        generator = list(generator) if isinstance(generator, tuple) else generator
        self._interrupt = False

        # 2. Noise levels
        timesteps, first = self.prepare_timesteps(
            num_inference_steps, device, sigmas, image, strength, mask_image
        )
        self.scheduler.set_begin_index(first)
        self._num_timesteps = len(timesteps)

        # 3. Starting noise, and the image that it is added to
        latents = self.prepare_latents(len(labels), generator, latents, device)
        edited = mask = None
        if image is not None:
            edited, mask = self.prepare_edit(image, mask_image, latents)
            latents = edited + self.scheduler.sigmas[first] / self.scheduler.init_noise_sigma * latents

        # 4. Denoising loop
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, timestep in enumerate(timesteps):
                if self._interrupt:
                    continue
                model_input = self.scheduler.scale_model_input(latents, timestep)
                sigma = self.scheduler.sigmas[first + i].item()
                inputs = (model_input, timestep, labels, null_labels)
                if self.guider is None:
                    model_output = self.guided_output(*inputs, sigma, guidance_interval, pag_applied_layers)
                else:
                    self.guider.set_state(i, self._num_timesteps, timestep)
                    model_output = self._guider_output(*inputs, latents, sigma)
                # Where the mask is black, what denoising finds is the image.
                if edited is not None and mask is not None:
                    denoised = self.scheduler.precondition_outputs(latents, model_output, sigma)
                    model_output = self._output_of(torch.where(mask, denoised, edited), latents, sigma)
                if callback_on_step_end is not None:
                    pred_original_sample = self.scheduler.precondition_outputs(latents, model_output, sigma)
                latents = self.scheduler.step(
                    model_output, timestep, latents, generator=generator, return_dict=False
                )[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs or ():
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
            return (images,)  # type: ignore[return-value]
        return ImagePipelineOutput(images=images)

    def set_guidance(
        self,
        guidance_scale: float | None = None,
        guidance_schedule: str | Callable[[float], float] = "adaptive",
        pag_scale: float | None = None,
        autoguidance_scale: float | None = None,
    ) -> None:
        """Sets the guidance of [`guided_output`]; the arguments are those of [`__call__`]."""
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        if pag_scale is None:
            is_used = self.guider is None and self.takes_argument("perturbed_layers")
            pag_scale = self.config.pag_scale if is_used else 0.0
        if autoguidance_scale is None:
            is_used = self.guider is None and self.guide is not None
            autoguidance_scale = self.config.autoguidance_scale if is_used else 1.0
        self._guidance_scale = guidance_scale
        self._guidance_schedule = guidance_schedule
        self._pag_scale = pag_scale
        self._autoguidance_scale = autoguidance_scale

    def guided_output(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor,
        null_labels: torch.Tensor,
        sigma: float,
        guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
        pag_applied_layers: list[int] | None = None,
    ) -> torch.Tensor:
        """Evaluates the network with the guidance that [`set_guidance`] or the current call has set.

        Args:
            model_input (`torch.Tensor` of shape `(batch, channels, height, width)`): c_in·x.
            timestep (`torch.Tensor`): c_noise.
            labels, null_labels (`torch.Tensor` of shape `(batch,)`): the classes to draw and those to steer
                away from.
            sigma (`float`): the noise level σ.
            guidance_interval, pag_applied_layers: see [`__call__`].

        Returns:
            `torch.Tensor`: the guided network output F, of the shape of `model_input`, float32.
        """
        weight = guidance_weight(sigma, self._guidance_scale, self._guidance_schedule, guidance_interval)
        low, high = guidance_interval
        is_inside = low <= sigma <= high
        # D is affine in F, so that guidance of F equals guidance of D.
        inputs = (model_input, timestep, labels)
        if self._autoguidance_scale != 1:
            conditional = output = self._model_output(self.transformer, *inputs)
            if weight != 1:
                worse, unconditional = self._outputs_of_both(self.guide, *inputs, null_labels)
                output = output + (weight - 1) * (worse - unconditional)
            elif is_inside:
                worse = self._model_output(self.guide, *inputs)
            if is_inside:
                output = output + (self._autoguidance_scale - 1) * (conditional - worse)
        elif weight == 1:
            conditional = output = self._model_output(self.transformer, *inputs)
        else:
            conditional, unconditional = self._outputs_of_both(self.transformer, *inputs, null_labels)
            output = unconditional + weight * (conditional - unconditional)
        if self._pag_scale == 0 or not is_inside:
            return output
        if pag_applied_layers is None:
            pag_applied_layers = [3 * self.transformer.config.num_layers // 10]
        perturbed = self._model_output(self.transformer, *inputs, perturbed_layers=pag_applied_layers)
        return output + self._pag_scale * (conditional - perturbed)

    def _model_output(
        self,
        model: ModelMixin,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs a network on `(batch, channels, height, width)`; returns its raw output in float32."""
        timesteps = timestep.float().expand(len(model_input))
        output = model(model_input.to(model.dtype), timesteps, labels, **kwargs, return_dict=False)[0]
        return output.float()

    def _outputs_of_both(
        self,
        model: ModelMixin,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor,
        null_labels: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the outputs of a network for the classes and for the null class, in one evaluation."""
        both = [torch.cat([model_input] * 2), timestep, torch.cat([labels, null_labels])]
        return self._model_output(model, *both).chunk(2)

    def _guider_output(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor,
        null_labels: torch.Tensor,
        latents: torch.Tensor,
        sigma: float,
    ) -> torch.Tensor:
        """Lets a guider combine denoised images; returns the network output F of the combined image."""
        batches = self.guider.prepare_inputs({"class_labels": (labels, null_labels)})
        for batch in batches:
            self.guider.prepare_models(self.transformer)
            output = self._model_output(self.transformer, model_input, timestep, batch.class_labels)
            batch.noise_pred = self.scheduler.precondition_outputs(latents, output, sigma)
            self.guider.cleanup_models(self.transformer)
        return self._output_of(self.guider(batches)[0], latents, sigma)

    def _output_of(self, denoised: torch.Tensor, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Returns the network output F that a denoised image D = c_skip·x + c_out·F stands for."""
        # The scheduler's own formula at F = 0 and F = 1.
        offset, end = (
            self.scheduler.precondition_outputs(latents, torch.full_like(latents, value), sigma)
            for value in (0, 1)
        )
        return (denoised - offset) / (end - offset)


def retrieve_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: str | torch.device | None,
    sigmas: list[float] | torch.Tensor | None = None,
) -> torch.Tensor:
    """Sets the scheduler's grid and returns its timesteps.

    Raises:
        ValueError: if the number of steps is not a positive integer, or the scheduler would not use the given
            `sigmas` unchanged.
    """
    if sigmas is None:
        scheduler.set_timesteps(check_integer("num_inference_steps", num_inference_steps), device=device)
        return scheduler.timesteps
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    # EDMEulerScheduler takes `sigmas` as positions on its own ramp.
    if not takes_sigmas or isinstance(scheduler, EDMEulerScheduler):
        raise ValueError(
            f"The scheduler class {type(scheduler).__name__} does not use custom `sigmas` unchanged; "
            "pass `num_inference_steps`, or use AdaptiveEDMScheduler."
        )
    scheduler.set_timesteps(sigmas=sigmas, device=device)
    return scheduler.timesteps
