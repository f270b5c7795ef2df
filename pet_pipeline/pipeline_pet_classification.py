r"""PetClassificationPipeline: tells which class an image is of, by the denoiser that draws the classes.

A diffusion classifier (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier"): the class
that helps the denoiser most to remove noise from an image explains it best. All classes are tried on the same
noise, which is drawn in pairs ±ε at stratified noise levels, and an image needs no more evaluations once its
classes are apart.

This file travels inside every saved checkpoint: it imports PyTorch, diffusers and the standard library only.
"""

import importlib
import json
import math
import reprlib
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from PIL import Image, ImageOps


logger = logging.get_logger(__name__)

# Modules of this package that define components.
COMPONENT_MODULES = ("transformer_pet", "scheduling_adaptive_edm")
PIPELINE_MODULES = ("pipeline_pet_diffusion", "pipeline_pet_classification")

MAX_LABEL_LENGTH = 256

# Formats that Pillow reads by itself; for some others it starts programs.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

WEIGHTINGS = ("calibrated", "elbo")

# Bands of noise levels, even in ln σ, of the calibrated weighting: below them classes make no difference to a
# denoiser, above them nothing is left of the image.
BAND_RANGE = (0.1, 20.0)
NUM_BANDS = 8

# Evaluations per class after which an image may be decided.
LOOKS = (8, 16, 32, 64, 128, 256)

# Where two classes make no difference at all, stopping early contradicts the decision after all evaluations
# for this share of the images; where they do, for fewer.
ERROR_RATE = 0.05


@dataclass
class ClassificationEvidence:
    """Why an image was classified as it was.

    Args:
        sigmas (`torch.Tensor` of shape `(draws,)`): the noise levels that were tried, ascending.
        errors (`torch.Tensor` of shape `(classes, draws)`): mean squared error of the network's output.
        difference (`torch.Tensor` of shape `(height, width)`): weighted error of the second-best class less
            that of the best, by pixel: positive where the image speaks for the best.
        labels (`tuple[str, str]`): the best and the second-best class.
    """

    sigmas: torch.Tensor
    errors: torch.Tensor
    difference: torch.Tensor
    labels: tuple[str, str]


@dataclass
class PetClassificationOutput(BaseOutput):
    """What [`PetClassificationPipeline`] returns, an entry for each image.

    Args:
        labels (`list[str]`): the most probable class.
        probabilities (`list[dict[str, float]]`): of every class.
        num_evaluations (`list[int]`): evaluations of the denoiser, over all classes.
        evidence (`list[ClassificationEvidence]`, *optional*): if it was asked for.
    """

    labels: list[str]
    probabilities: list[dict[str, float]]
    num_evaluations: list[int]
    evidence: list[ClassificationEvidence] | None = None


def eight_bit_image(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Returns an image upright, in mode `"RGB"` or `"L"`, on white where it is transparent.

    Grey levels of 16 bits are scaled, where Pillow's own conversion would cut them off at 255.

    Raises:
        ValueError: if the pixels are floating-point numbers, whose range is unknown.
    """
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # of damaged EXIF Pillow raises nearly anything; the pixels are as they are
        image = image.copy()
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of an unknown range.")
    if image.mode[0] == "I":
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


class PetClassificationPipeline(DiffusionPipeline):
    r"""Classifies images with a class-conditional EDM denoiser.

    It has the components of [`PetDiffusionPipeline`] and loads the same folders; `from_pipe` shares them.

    Args:
        transformer ([`PetTransformer2DModel`]): the denoiser.
        scheduler ([`AdaptiveEDMScheduler`]): its preconditioning; `EDMEulerScheduler` and
            `EDMDPMSolverMultistepScheduler` will do.
        guider (`BaseGuidance`, *optional*): kept for [`PetDiffusionPipeline`]; not used here.
        id2label (`dict`, *optional*): class names by id, for example `{0: "cat", 1: "dog"}`.
        calibration (`dict`, *optional*): the weight of each band of noise levels, `{"weights": [...]}`, as
            `pet-pipeline calibrate` finds them.
        pag_scale (`float`, defaults to 0.0): kept for [`PetDiffusionPipeline`]; not used here.
    """

    model_cpu_offload_seq = "transformer"
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
        if calibration is not None:
            check_calibration(calibration)
        self.register_to_config(
            id2label={str(key): name for key, name in self.id2label.items()},
            calibration=calibration,
            pag_scale=pag_scale,
        )

    # What follows up to `from_pipe` is copied from PetDiffusionPipeline, as either file has to stand alone; a
    # test keeps the copies equal.

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None = None, **kwargs: Any
    ) -> "PetClassificationPipeline":
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
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "PetClassificationPipeline":
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

    @torch.no_grad()
    def __call__(
        self,
        images: Image.Image | str | Path | torch.Tensor | Sequence[Image.Image | str | Path | torch.Tensor],
        num_evaluations: int = 32,
        adaptive: bool = True,
        weighting: str = "calibrated",
        batch_size: int = 64,
        generator: torch.Generator | None = None,
        return_evidence: bool = False,
        return_dict: bool = True,
    ) -> PetClassificationOutput | tuple:
        r"""Classifies images.

        Args:
            images (PIL images, paths, tensors, or a list of them): of any size and mode; they are brought to
                RGB and to the size of the model. A tensor is `(3, height, width)` or a batch of them, uint8
                or floating point in [0, 1].
            num_evaluations (`int`, defaults to 32): evaluations of the denoiser for each class, at most; an
                even number.
            adaptive (`bool`, defaults to `True`): stop an image, or give up a class, once they are apart.
            weighting (`str`, defaults to `"calibrated"`): `"calibrated"`, weights of noise levels that make
                the probabilities those of held-out images, at the number of evaluations that they were fitted
                with (fewer make them too sure); or `"elbo"`, the weights that make the errors a
                bound on the likelihood (Kingma and Gao 2023), over all noise levels.
            batch_size (`int`, defaults to 64): evaluations at once; the answer does not depend on it.
            generator (`torch.Generator`, *optional*): of the noise, which all images share.
            return_evidence (`bool`, defaults to `False`): return the errors by noise level and pixel too;
                then nothing is stopped early.
            return_dict (`bool`, defaults to `True`): return a [`PetClassificationOutput`] instead of a tuple.

        Returns:
            [`PetClassificationOutput`] or `tuple`: an entry for each image.

        Raises:
            ValueError: if an image cannot be used, which the message names, or an argument is out of range.
        """
        # 1. Inputs
        num_classes = self.transformer.config.num_classes
        if not hasattr(self.scheduler, "precondition_outputs"):
            raise ValueError(
                "The scheduler has to be one of EDM, as `AdaptiveEDMScheduler` is, but is of the class "
                f"{type(self.scheduler).__name__}."
            )
        if num_classes < 2:
            raise ValueError("A model of one class has nothing to tell apart.")
        if not isinstance(num_evaluations, int) or num_evaluations < 2 or num_evaluations % 2:
            raise ValueError(
                f"`num_evaluations` has to be a positive even number, but is {num_evaluations!r}: noise is "
                "drawn in pairs."
            )
        if weighting not in WEIGHTINGS:
            raise ValueError(f"`weighting` has to be one of {', '.join(WEIGHTINGS)}, but is {weighting!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` has to be a positive integer, but is {batch_size!r}.")
        pixels = self.prepare_images(images)  # (N, C, H, W) in [-1, 1]

        # 2. Noise levels and noise, the same for all images: an answer does not depend on its batch.
        num_draws = num_evaluations // 2
        sigmas = self.draw_sigmas(num_draws, weighting, generator)
        shape = (num_draws, *pixels.shape[1:])
        device = "cpu" if generator is None else generator.device
        noise = torch.randn(shape, generator=generator, device=device).cpu()
        weights = self.error_weights(sigmas, weighting, pixels[0].numel())

        # 3. Errors of each class on the same noise, until the classes of an image are apart.
        stops = adaptive and not return_evidence
        looks = [look // 2 for look in LOOKS if look < num_evaluations] if stops else []
        looks.append(num_draws)
        errors = torch.full((len(pixels), num_classes, num_draws), torch.nan)
        maps = torch.zeros(len(pixels), num_classes, *pixels.shape[2:]) if return_evidence else None
        candidates = torch.ones(len(pixels), num_classes, dtype=torch.bool)
        first = 0
        with self.progress_bar(total=len(pixels)) as progress_bar:
            for number, last in enumerate(looks):
                # One class left: the image is decided.
                undecided = candidates & (candidates.sum(1, keepdim=True) > 1)
                rows = [
                    (image, label, draw)
                    for image, label in undecided.nonzero().tolist()
                    for draw in range(first, last)
                ]
                for start in range(0, len(rows), max(1, batch_size // 2)):
                    part = torch.tensor(rows[start : start + max(1, batch_size // 2)])
                    pixel_errors = self.pixel_errors(pixels, noise, sigmas, part)  # (B, H, W)
                    image, label, draw = part.unbind(1)
                    errors[image, label, draw] = pixel_errors.mean((1, 2))
                    if not errors[image, label, draw].isfinite().all():
                        raise ValueError(
                            "The model's errors are not finite; its weights are damaged, or its precision "
                            f"({self.transformer.dtype}) is too small for them."
                        )
                    if maps is not None:
                        maps.index_put_(
                            (image, label), weights[draw, None, None] * pixel_errors, accumulate=True
                        )
                first = last
                if last < num_draws:
                    order = sigmas[:last].argsort()
                    possible = still_possible((errors * weights)[..., order], number, tuple(looks))
                    undecided_images = candidates.sum(1, keepdim=True) > 1
                    candidates = torch.where(undecided_images, candidates & possible, candidates)
                decided = len(pixels) if last == num_draws else int((candidates.sum(1) == 1).sum())
                progress_bar.update(decided - progress_bar.n)

        # 4. Probabilities: the weighted errors are estimates of -ln p, up to a constant. A class is compared
        # with the best one on the draws that both have had.
        used = errors.isnan().logical_not()
        weighted = (errors * weights).nan_to_num()
        best = weighted.sum(-1).masked_fill(~candidates, math.inf).argmin(1)
        lead = weighted - weighted[torch.arange(len(best)), best][:, None]  # (N, classes, draws)
        scores = -(lead * used).sum(-1) / used.sum(-1)
        probabilities = scores.clamp_max(0).softmax(1)
        names = [self.id2label.get(index, str(index)) for index in range(num_classes)]
        evidence = None
        if maps is not None:
            evidence = self.evidence(errors, maps / num_draws, scores, best, sigmas, names)
        output = PetClassificationOutput(
            labels=[names[index] for index in best.tolist()],
            probabilities=[dict(zip(names, row)) for row in probabilities.tolist()],
            num_evaluations=(2 * used.sum((1, 2))).tolist(),
            evidence=evidence,
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return tuple(output.values())
        return output

    def prepare_images(self, images: Any) -> torch.Tensor:
        """Returns images as `(N, channels, height, width)` in [-1, 1], upright, resized and cropped.

        Raises:
            ValueError: if there is none, or one cannot be used; the message names it.
        """
        if isinstance(images, torch.Tensor) and images.ndim == 4:
            images = list(images)
        if not isinstance(images, (list, tuple)):
            images = [images]
        if not images:
            raise ValueError("There is no image to classify.")
        return torch.stack([self.prepare_image(image, f"Image {i}") for i, image in enumerate(images)])

    def prepare_image(self, image: Any, name: str) -> torch.Tensor:
        """Returns one image as `(channels, height, width)` in [-1, 1]; see [`prepare_images`]."""
        size, channels = self.transformer.config.sample_size, self.transformer.config.in_channels
        mode = "L" if channels == 1 else "RGB"
        if isinstance(image, (str, Path)):
            name = repr(str(image))
            try:
                with Image.open(image, formats=IMAGE_FORMATS) as file:
                    file.load()
                    image = eight_bit_image(file, mode)
            except MemoryError:
                raise ValueError(f"{name} is too large an image for the memory there is.") from None
            except Exception as error:  # of damaged files Pillow raises nearly anything
                raise ValueError(f"{name} cannot be read as an image: {error}") from None
        elif isinstance(image, Image.Image):
            try:
                image = eight_bit_image(image, mode)
            except ValueError as error:
                raise ValueError(f"{name} cannot be used: {error}") from None
        if isinstance(image, Image.Image):
            image = ImageOps.fit(image, (size, size), Image.BICUBIC)
            data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            image = data.view(size, size, channels).permute(2, 0, 1)
        if not isinstance(image, torch.Tensor):
            raise ValueError(
                f"{name} has to be a PIL image, a path or a tensor, but is a {type(image).__name__}."
            )
        if image.ndim != 3 or image.shape[0] != channels or image.numel() == 0:
            raise ValueError(
                f"{name} has to be of shape ({channels}, height, width), but is {tuple(image.shape)}."
            )
        image = image.detach().cpu()
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        if not image.isfinite().all():
            raise ValueError(f"{name} has values that are not finite.")
        if image.min() < -1e-3 or image.max() > 1 + 1e-3:
            raise ValueError(
                f"{name} has to be in [0, 1], or uint8, but has values from {image.min():.3g} to "
                f"{image.max():.3g}."
            )
        if image.shape[1:] != (size, size):
            scale = size / min(image.shape[1:])
            height, width = (max(size, round(side * scale)) for side in image.shape[1:])
            image = torch.nn.functional.interpolate(
                image[None], (height, width), mode="bicubic", antialias=True, align_corners=False
            )[0]
            top, left = (height - size) // 2, (width - size) // 2
            image = image[:, top : top + size, left : left + size]
        return image.clamp(0, 1) * 2 - 1

    def draw_sigmas(self, num_draws: int, weighting: str, generator: torch.Generator | None) -> torch.Tensor:
        """Returns noise levels `(num_draws,)`, uniform in ln σ over the range of the weighting.

        They follow a van der Corput sequence from a random start, so that the first 1, 2, 4, 8 … of them are
        stratified too, and with them every look of the sequential test.
        """
        config = self.scheduler.config
        low, high = (config.sigma_min, config.sigma_max) if weighting == "elbo" else BAND_RANGE
        device = "cpu" if generator is None else generator.device
        start = torch.rand((), generator=generator, device=device).item()
        positions = [(van_der_corput(draw) + start) % 1 for draw in range(num_draws)]
        return (math.log(low) + torch.tensor(positions) * math.log(high / low)).exp()

    def error_weights(self, sigmas: torch.Tensor, weighting: str, num_values: int) -> torch.Tensor:
        r"""Returns weights `(draws,)` whose mean product with the errors estimates -ln p(x | class).

        `"elbo"`: $-\ln p(x|c) = \int E\|D - x\|^2 \sigma^{-2} d\ln\sigma$ up to a constant (Kingma and Gao
        2023), where $\|D - x\|^2 = c_{out}^2 \|F - F^*\|^2$.
        """
        if weighting == "elbo":
            low, high = self.scheduler.config.sigma_min, self.scheduler.config.sigma_max
            return self.likelihood_weights(sigmas, num_values, low, high)
        if self.config.calibration is None:
            warnings.warn(
                "This pipeline is not calibrated, so its probabilities are too sure; "
                "`pet-pipeline calibrate` mends that.",
                stacklevel=2,
            )
        return self.band_weights(sigmas, self.config.calibration, num_values)

    def band_weights(self, sigmas: torch.Tensor, calibration: dict | None, num_values: int) -> torch.Tensor:
        """Returns the weights of a calibration, or those of the likelihood bound where there is none."""
        low, high = BAND_RANGE
        if calibration is None:
            return self.likelihood_weights(sigmas, num_values, low, high)
        bands = ((sigmas / low).log() / math.log(high / low) * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)
        return torch.tensor(calibration["weights"])[bands]

    def likelihood_weights(
        self, sigmas: torch.Tensor, num_values: int, low: float, high: float
    ) -> torch.Tensor:
        """Returns σ⁻² c_out² for each value of an image, times the length of the range in ln σ."""
        sigma_data = self.scheduler.config.sigma_data
        return math.log(high / low) * num_values * sigma_data**2 / (sigmas**2 + sigma_data**2)

    def pixel_errors(
        self, pixels: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Returns squared errors of the network's output, averaged over channels and over +ε and -ε.

        Args:
            pixels (`torch.Tensor` of shape `(N, channels, height, width)`): the images in [-1, 1].
            noise (`torch.Tensor` of shape `(draws, channels, height, width)`): ε.
            sigmas (`torch.Tensor` of shape `(draws,)`): noise levels σ.
            rows (`torch.Tensor` of shape `(B, 3)`): image, class and draw of each evaluation.

        Returns:
            `torch.Tensor` of shape `(B, height, width)`.
        """
        device, sigma_data = self._execution_device, self.scheduler.config.sigma_data
        image, label, draw = (column.repeat(2) for column in rows.unbind(1))
        sigma = sigmas[draw].to(device).view(-1, 1, 1, 1)
        clean, noise = pixels[image].to(device), noise[draw].to(device)
        noise[len(rows) :] *= -1
        noisy = clean + sigma * noise
        model_input = self.scheduler.precondition_inputs(noisy, sigma)
        timesteps = self.scheduler.precondition_noise(sigma.flatten())
        model_output = self.transformer(
            model_input.to(self.transformer.dtype), timesteps, label.to(device), return_dict=False
        )[0].float()
        denoised = self.scheduler.precondition_outputs(noisy, model_output, sigma)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        squares = ((denoised - clean) / c_out).square().mean(1)  # (2B, H, W)
        return squares.view(2, -1, *squares.shape[1:]).mean(0).cpu()

    def evidence(
        self,
        errors: torch.Tensor,
        maps: torch.Tensor,
        scores: torch.Tensor,
        best: torch.Tensor,
        sigmas: torch.Tensor,
        names: list[str],
    ) -> list[ClassificationEvidence]:
        """Collects the [`ClassificationEvidence`] of each image."""
        order = sigmas.argsort()
        second = scores.scatter(1, best[:, None], -math.inf).argmax(1)
        collected = []
        for image, (first_id, second_id) in enumerate(zip(best.tolist(), second.tolist())):
            collected.append(
                ClassificationEvidence(
                    sigmas=sigmas[order],
                    errors=errors[image][:, order],
                    difference=maps[image, second_id] - maps[image, first_id],
                    labels=(names[first_id], names[second_id]),
                )
            )
        return collected


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


def van_der_corput(index: int) -> float:
    """Returns the element of the base-2 low-discrepancy sequence 0, ½, ¼, ¾, ⅛ … (van der Corput 1935)."""
    value, unit = 0.0, 0.5
    while index:
        value += unit * (index & 1)
        index, unit = index >> 1, unit / 2
    return value


def t_statistic(values: torch.Tensor) -> torch.Tensor:
    """Returns mean over standard error of draws `(..., draws)` that are ordered by noise level.

    The error is estimated from successive differences (von Neumann 1941), as the draws are stratified: that
    their mean changes smoothly with the noise level is no error.
    """
    variance = values.diff(dim=-1).square().mean(-1) / 2
    return values.mean(-1) / (variance / values.shape[-1]).sqrt()


def still_possible(weighted_errors: torch.Tensor, look: int, looks: tuple[int, ...]) -> torch.Tensor:
    """Returns which classes may still be the best, `(N, classes)`, by a group-sequential t-test of paired
    draws.

    Args:
        weighted_errors (`torch.Tensor` of shape `(N, classes, draws)`): ordered by noise level; NaN for
            classes given up before.
        look (`int`): index in `looks`.
        looks (`tuple[int, ...]`): draws at each look, the last one included.
    """
    means = weighted_errors.mean(-1).nan_to_num(math.inf)
    best = means.argmin(1)
    differences = weighted_errors - weighted_errors[torch.arange(len(best)), best][:, None]
    given_up = t_statistic(differences) > stopping_bounds(looks)[look]
    return ~(given_up | means.isinf())


@lru_cache
def stopping_bounds(looks: tuple[int, ...]) -> tuple[float, ...]:
    r"""Returns the bound on |t| at each look but the last, of the shape of O'Brien and Fleming (1979).

    The bounds fall as $\sqrt{n_{last} / n_k}$. Their common factor is found by simulation: with no difference
    at all, a share `ERROR_RATE` of the tests stops on the side that all draws together speak against.

    Args:
        looks (`tuple[int, ...]`): draws at each look.
    """
    if len(looks) < 2:
        return ()
    draws = torch.randn(20_000, looks[-1], generator=torch.Generator().manual_seed(0))
    shapes = [(looks[-1] / look) ** 0.5 for look in looks[:-1]]
    ratios = torch.stack([t_statistic(draws[:, :look]) / shape for look, shape in zip(looks, shapes)])
    low, high = 0.0, ratios.abs().max().item()
    for _ in range(30):
        factor = (low + high) / 2
        first = (ratios.abs() > factor).int().argmax(0, keepdim=True)  # look 0 where none stops
        at_first = ratios.gather(0, first)[0]
        contradicts = (at_first.abs() > factor) & (at_first * draws.mean(1) < 0)
        low, high = (factor, high) if contradicts.float().mean() > ERROR_RATE else (low, factor)
    return tuple(high * shape for shape in shapes)


def check_calibration(calibration: dict) -> None:
    """Raises `ValueError` if a calibration is not what [`PetClassificationPipeline`] can use."""
    weights = calibration.get("weights") if isinstance(calibration, dict) else None
    if (
        not isinstance(weights, (list, tuple))
        or len(weights) != NUM_BANDS
        or any(isinstance(weight, bool) or not isinstance(weight, (int, float)) for weight in weights)
        or not all(math.isfinite(weight) for weight in weights)
    ):
        raise ValueError(
            f"`calibration` has to hold `weights`, {NUM_BANDS} finite numbers, but is {calibration!r}."
        )
