r"""PetClassificationPipeline: finds the class of an image with the denoiser that draws the classes.

A diffusion classifier (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier") takes the
class that helps the denoiser most to remove noise from an image. All classes are tried on the same noise,
which is drawn in pairs ±ε at stratified noise levels, and an image is decided once its classes are apart.
A linear probe of the denoiser's features tells the class too, for a few evaluations (Xiang et al. 2023).

This file travels inside every saved checkpoint: it imports PyTorch, diffusers, Pillow, the standard library
and `pipeline_pet_loading`, which travels too.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image

from .pipeline_pet_loading import NUM_BANDS, PetPipelineMixin, check_integer


METHODS = ("denoising", "features", "combined")
WEIGHTINGS = ("calibrated", "elbo")

# The bands of noise levels of the calibrated weighting are even in ln σ. Below this range, classes make no
# difference to a denoiser; above it, nothing is left of the image.
BAND_RANGE = (0.1, 20.0)

# Evaluations per class after which an image may be decided.
STAGES = (8, 16, 32, 64, 128, 256)

# If no class makes a difference, stopping early contradicts the decision after all evaluations for at most
# this share of the images. If a class makes a difference, it does for fewer images.
ERROR_RATE = 0.05


@dataclass
class ClassificationEvidence:
    """Why an image was classified as it was.

    Args:
        sigmas (`torch.Tensor` of shape `(draws,)`): the noise levels of the evaluations, ascending.
        errors (`torch.Tensor` of shape `(classes, draws)`): mean squared error of the network's output.
        difference (`torch.Tensor` of shape `(height, width)`): for each pixel, the weighted error of the
            second-best class minus that of the best class; positive where the image supports the best class.
        labels (`tuple[str, str]`): the best and the second-best class.
    """

    sigmas: torch.Tensor
    errors: torch.Tensor
    difference: torch.Tensor
    labels: tuple[str, str]


@dataclass
class PetClassificationOutput(BaseOutput):
    """Output of [`PetClassificationPipeline`], with one entry for each image.

    Args:
        labels (`list[str]`): the most probable class.
        probabilities (`list[dict[str, float]]`): the probability of every class.
        num_evaluations (`list[int]`): evaluations of the denoiser, over all classes.
        evidence (`list[ClassificationEvidence]`, *optional*): present if the call asked for evidence.
    """

    labels: list[str]
    probabilities: list[dict[str, float]]
    num_evaluations: list[int]
    evidence: list[ClassificationEvidence] | None = None


class PetClassificationPipeline(PetPipelineMixin, DiffusionPipeline):
    r"""Classifies images with a class-conditional EDM denoiser.

    The pipeline loads the same folders as [`PetDiffusionPipeline`], and `from_pipe` shares its components.
    [`PetPipelineMixin`] documents the arguments. `guider` and `pag_scale` are kept for the other pipeline and
    not used here.
    """

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
        method: str | None = None,
    ) -> PetClassificationOutput:
        r"""Classifies images.

        Args:
            images (PIL images, paths, tensors, or a list of them): images of any size and mode, which are
                converted to the mode and the size of the model. A file may have up to 2²⁴ pixels. A tensor
                has the shape `(channels, height, width)` or `(batch, channels, height, width)`, and is uint8,
                or floating point in [0, 1].
            num_evaluations (`int`, defaults to 32): the most evaluations of the denoiser for each class, an
                even number.
            adaptive (`bool`, defaults to `True`): decide an image, or give up a class, once the classes are
                apart.
            weighting (`str`, defaults to `"calibrated"`): how much each noise level counts. The weights of
                `"calibrated"` were fitted to held-out images, so that the probabilities are right for the
                number of evaluations of that fit (with fewer evaluations the probabilities are too extreme).
                The weights of `"elbo"` make the errors a bound on the likelihood (Kingma and Gao 2023), over
                all noise levels.
            batch_size (`int`, defaults to 64): evaluations at once; the answer does not depend on it.
            generator (`torch.Generator`, *optional*): random generator of the noise, which all images share.
            return_evidence (`bool`, defaults to `False`): also return the errors by noise level and by pixel.
                No image is then decided early.
            return_dict (`bool`, defaults to `True`): return a [`PetClassificationOutput`] instead of a tuple.
            method (`str`, *optional*): `"denoising"` compares the errors of the classes. `"features"` asks
                the pipeline's `probe`, which costs two evaluations for each of its noise levels, one of
                them of the mirror image; the other arguments on evaluations and noise then have no effect.
                `"combined"` adds the log-odds of both with the weights of the calibration. `None` means
                `"combined"` if the pipeline has a probe and was calibrated with it, and otherwise, or
                for evidence, `"denoising"`.

        Returns:
            [`PetClassificationOutput`] or `tuple`: one entry for each image.

        Raises:
            ValueError: if an image cannot be used, which the message names, or an argument is out of range.
        """
        # 1. Inputs
        method = method or self.default_method(weighting, return_evidence)
        self.check_inputs(num_evaluations, weighting, generator, method, return_evidence)
        batch_size = check_integer("batch_size", batch_size)
        pixels = self.prepare_images(images)  # (N, C, H, W) in [-1, 1]

        # 2. Scores, which are ln p of each class up to a constant, and the best class
        used = torch.zeros(len(pixels), dtype=torch.long)
        if method != "features":
            scores, best, errors, maps, sigmas = self.denoising_scores(
                pixels, int(num_evaluations) // 2, adaptive, weighting, batch_size, generator, return_evidence
            )
            used += 2 * errors.isfinite().sum((1, 2))
        if method != "denoising":
            feature_scores = self.feature_scores(pixels, batch_size)
            if method == "combined":
                weight, denoising_weight = self.config.calibration["combination"]
                feature_scores = weight * feature_scores + denoising_weight * scores
            scores, best = feature_scores, feature_scores.argmax(1)
            used += 2 * len(self.probe.config.sigmas)

        # 3. Answers
        names = self.class_names
        output = PetClassificationOutput(
            labels=[names[index] for index in best.tolist()],
            probabilities=[dict(zip(names, row)) for row in scores.softmax(1).tolist()],
            num_evaluations=used.tolist(),
            evidence=self.evidence(errors, maps, scores, best, sigmas, names) if return_evidence else None,
        )
        self.maybe_free_model_hooks()
        if not return_dict:
            return tuple(output.values())  # type: ignore[return-value]
        return output

    def default_method(self, weighting: str = "calibrated", return_evidence: bool = False) -> str:
        """Returns the method of a call that names none."""
        is_suited = weighting == "calibrated" and not return_evidence
        return "combined" if self.is_combined and is_suited else "denoising"

    @property
    def is_combined(self) -> bool:
        """Whether the calibration has the weights of the method `"combined"`."""
        return self.probe is not None and "combination" in (self.config.calibration or {})

    def check_inputs(
        self,
        num_evaluations: int,
        weighting: str,
        generator: torch.Generator | None,
        method: str,
        return_evidence: bool,
    ) -> None:
        """Raises `ValueError` for an argument of [`__call__`] that is out of range."""
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, but is {method!r}.")
        if method != "denoising" and self.probe is None:
            raise ValueError(
                f"The method {method!r} needs a pipeline with a `probe`; `pet-pipeline calibrate` fits one."
            )
        if method == "combined" and (weighting != "calibrated" or not self.is_combined):
            raise ValueError(
                "The method 'combined' needs the weighting 'calibrated' and a calibration with a "
                "`combination`; `pet-pipeline calibrate` fits both."
            )
        if method == "features" and return_evidence:
            raise ValueError("`return_evidence` needs the method 'denoising' or 'combined'.")
        self.check_scheduler()
        if self.is_tuned:
            raise ValueError(
                "This model was tuned to draw in a few steps, and its predictions no longer tell classes "
                "apart: classify with the model that it was tuned from."
            )
        if self.null_class_id < 2:
            raise ValueError("Classification needs a model of at least 2 classes, but the model has 1.")
        if check_integer("num_evaluations", num_evaluations) % 2:
            raise ValueError(
                "`num_evaluations` must be an even number, because noise is drawn in pairs, but is "
                f"{num_evaluations}."
            )
        if weighting not in WEIGHTINGS:
            raise ValueError(f"`weighting` must be one of {', '.join(WEIGHTINGS)}, but is {weighting!r}.")
        if not isinstance(generator, (torch.Generator, type(None))):
            raise ValueError(
                "`generator` must be one `torch.Generator`, because all images share the noise, but is a "
                f"{type(generator).__name__}."
            )

    def feature_scores(self, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Returns the log-odds `(N, classes)` that the probe gives to the images."""
        config = self.probe.config
        features = self.image_features(pixels, config.layer, config.sigmas, batch_size)
        if features.shape[1] != self.probe.linear.in_features:
            raise ValueError(
                f"The probe takes {self.probe.linear.in_features} features, but the model has "
                f"{features.shape[1]}: it is the probe of another model."
            )
        scores = self.probe(features.to(self._execution_device, self.probe.dtype)).float().cpu()
        if not scores.isfinite().all():
            raise ValueError("The log-odds of the probe are not finite: weights of the model are damaged.")
        return scores

    @torch.no_grad()
    def image_features(
        self, pixels: torch.Tensor, layer: int, sigmas: Sequence[float], batch_size: int = 64
    ) -> torch.Tensor:
        """Pools the output of a block of the denoiser for images, without a class.

        The denoiser is told a noise level, but no noise is added.

        Args:
            pixels (`torch.Tensor` of shape `(N, channels, height, width)`): the images in [-1, 1].
            layer (`int`): index of the block.
            sigmas (`Sequence[float]`): noise levels σ.
            batch_size (`int`, defaults to 64): evaluations at once.

        Returns:
            `torch.Tensor` of shape `(N, sigmas * 2 * dim)`: mean and standard deviation of the normalised
            tokens at each noise level, averaged over an image and its mirror image, in float32.

        Raises:
            ValueError: if the denoiser cannot return the output of a block.
        """
        if not self.takes_argument("feature_layer"):
            raise ValueError(
                "Features need a model whose `forward` takes `feature_layer`, such as "
                f"`PetTransformer2DModel`, but the model is of the class {type(self.transformer).__name__}."
            )
        device = self._execution_device
        batches = pixels.split(max(1, batch_size // 2))
        rows = [self._features_of_batch(images.to(device), layer, sigmas).cpu() for images in batches]
        return torch.cat(rows)

    def _features_of_batch(self, images: torch.Tensor, layer: int, sigmas: Sequence[float]) -> torch.Tensor:
        """Pools the output of a block for images on the device of the model, in two evaluations of each."""
        both = torch.cat([images, images.flip(-1)])
        batch = both.shape[0]  # `len` would become a constant in an exported model
        null = torch.full((batch,), self.null_class_id, device=images.device)
        columns = []
        for sigma in sigmas:
            model_input = self.scheduler.precondition_inputs(both, sigma)
            timesteps = self.scheduler.precondition_noise(sigma).to(images.device).expand(batch)
            tokens = self.transformer(
                model_input.to(self.transformer.dtype),
                timesteps,
                null,
                feature_layer=layer,
                return_dict=False,
            )[0]
            columns.append(pool_tokens(tokens))
        return torch.cat(columns, dim=1)

    def denoising_scores(
        self,
        pixels: torch.Tensor,
        num_draws: int,
        adaptive: bool,
        weighting: str,
        batch_size: int,
        generator: torch.Generator | None,
        return_maps: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Compares the errors of the classes; see [`__call__`].

        Returns the scores and the best class of [`class_scores`], the errors and the sums of
        [`measure_errors`], the latter divided by the number of draws, and the noise levels `(num_draws,)`.
        """
        # Noise levels and noise are the same for all images, so that an answer does not depend on its batch.
        sigmas = self.draw_sigmas(num_draws, weighting, generator)
        device = "cpu" if generator is None else generator.device
        noise = torch.randn((num_draws, *pixels.shape[1:]), generator=generator, device=device).cpu()
        weights = self.error_weights(sigmas, weighting, pixels[0].numel())
        is_stopped = adaptive and not return_maps
        stages = (*(stage // 2 for stage in STAGES if is_stopped and stage < 2 * num_draws), num_draws)
        errors, candidates, maps = self.measure_errors(
            pixels, noise, sigmas, weights, stages, batch_size, return_maps
        )
        scores, best = class_scores(errors * weights, candidates)
        return scores, best, errors, maps / num_draws, sigmas

    def measure_errors(
        self,
        pixels: torch.Tensor,
        noise: torch.Tensor,
        sigmas: torch.Tensor,
        weights: torch.Tensor,
        stages: tuple[int, ...],
        batch_size: int,
        return_maps: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Measures the errors of every class, and gives classes up at each stage.

        Args:
            pixels (`torch.Tensor` of shape `(N, channels, height, width)`): the images in [-1, 1].
            noise (`torch.Tensor` of shape `(draws, channels, height, width)`): ε.
            sigmas (`torch.Tensor` of shape `(draws,)`), weights (`torch.Tensor` of the same shape): noise
                levels σ and their weights.
            stages (`tuple[int, ...]`): draws after which classes are compared; the last stage is all draws.
            batch_size (`int`): evaluations at once.
            return_maps (`bool`): whether to sum the weighted errors of each pixel too.

        Returns:
            `tuple`: the errors of shape `(N, classes, draws)`, NaN where a class was given up before; the
            classes that were not given up, `(N, classes)`; and the sums, `(N, classes, height, width)`,
            which are empty without `return_maps`.
        """
        shape = (len(pixels), self.null_class_id)
        errors = torch.full((*shape, len(sigmas)), torch.nan)
        maps = torch.zeros(*shape, *(pixels.shape[2:] if return_maps else (0, 0)))
        candidates = torch.ones(shape, dtype=torch.bool)
        first = 0
        with self.progress_bar(total=len(pixels)) as progress_bar:
            for number, last in enumerate(stages):
                undecided = candidates & (candidates.sum(1, keepdim=True) > 1)
                pairs = undecided.nonzero().tolist()
                if not pairs:
                    break
                rows = torch.tensor([(*pair, draw) for pair in pairs for draw in range(first, last)])
                for part in rows.split(max(1, batch_size // 2)):
                    pixel_errors = self.pixel_errors(pixels, noise, sigmas, part)  # (B, H, W)
                    image, label, draw = part.unbind(1)
                    errors[image, label, draw] = pixel_errors.mean((1, 2))
                    if not errors[image, label, draw].isfinite().all():
                        raise ValueError(
                            "The errors of the model are not finite: its weights are damaged, or its "
                            f"precision ({self.transformer.dtype}) is too low for them."
                        )
                    if return_maps:
                        weighted = weights[draw, None, None] * pixel_errors
                        maps.index_put_((image, label), weighted, accumulate=True)
                first = last
                if last < len(sigmas):
                    order = sigmas[:last].argsort()
                    possible = still_possible((errors * weights)[..., order], number, stages)
                    candidates &= possible | ~undecided.any(1, keepdim=True)
                decided = len(pixels) if last == len(sigmas) else int((candidates.sum(1) == 1).sum())
                progress_bar.update(decided - progress_bar.n)
        return errors, candidates, maps

    def draw_sigmas(self, num_draws: int, weighting: str, generator: torch.Generator | None) -> torch.Tensor:
        """Returns noise levels `(num_draws,)`, uniform in ln σ over the range of the weighting.

        The noise levels follow a van der Corput sequence from a random start, so that the first 1, 2, 4, 8 …
        levels are stratified too, and with them every stage of the sequential test.
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
                "This pipeline is not calibrated, so its probabilities are too extreme; run `pet-pipeline "
                "calibrate`.",
                stacklevel=2,
            )
        return self.band_weights(sigmas, self.config.calibration, num_values)

    def band_weights(self, sigmas: torch.Tensor, calibration: dict | None, num_values: int) -> torch.Tensor:
        """Returns the weights of a calibration, or of the likelihood bound if there is no calibration."""
        if calibration is None:
            return self.likelihood_weights(sigmas, num_values, *BAND_RANGE)
        return torch.tensor(calibration["weights"])[noise_bands(sigmas)]

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


def noise_bands(sigmas: torch.Tensor) -> torch.Tensor:
    """Returns the band of the calibration, from 0 to `NUM_BANDS` - 1, of each noise level."""
    low, high = BAND_RANGE
    return ((sigmas / low).log() / math.log(high / low) * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)


def van_der_corput(index: int) -> float:
    """Returns the element of the base-2 low-discrepancy sequence 0, ½, ¼, ¾, ⅛ … (van der Corput 1935)."""
    value, unit = 0.0, 0.5
    while index:
        value += unit * (index & 1)
        index, unit = index >> 1, unit / 2
    return value


def t_statistic(values: torch.Tensor) -> torch.Tensor:
    """Returns mean over standard error of draws `(..., draws)` that are ordered by noise level.

    The standard error is estimated from successive differences (von Neumann 1941): the draws are stratified,
    so that a smooth change of their mean with the noise level is not an error.
    """
    variance = values.diff(dim=-1).square().mean(-1) / 2
    return values.mean(-1) / (variance / values.shape[-1]).sqrt()


def still_possible(weighted_errors: torch.Tensor, stage: int, stages: tuple[int, ...]) -> torch.Tensor:
    """Returns which classes may still be the best, by a group-sequential t-test of paired draws.

    Args:
        weighted_errors (`torch.Tensor` of shape `(N, classes, draws)`): ordered by noise level; NaN for
            classes that were given up before.
        stage (`int`): index in `stages`.
        stages (`tuple[int, ...]`): draws at each stage; the last stage is all draws.

    Returns:
        `torch.Tensor` of shape `(N, classes)`, bool.
    """
    means = weighted_errors.mean(-1).nan_to_num(math.inf)
    best = means.argmin(1)
    differences = weighted_errors - weighted_errors[torch.arange(len(best)), best][:, None]
    given_up = t_statistic(differences) > stopping_bounds(stages, means.shape[1])[stage]
    return ~(given_up | means.isinf())


@lru_cache
def stopping_bounds(stages: tuple[int, ...], num_classes: int) -> tuple[float, ...]:
    r"""Returns the bound on t at each stage but the last, of the shape of O'Brien and Fleming (1979).

    The bounds fall as $\sqrt{n_{last} / n_k}$. Their common factor is found by simulation of classes that
    make no difference: for a share `ERROR_RATE` of the images, the class that is the best after all draws
    would exceed a bound at an earlier stage, compared with the class that is the best at that stage.

    Args:
        stages (`tuple[int, ...]`): draws at each stage.
        num_classes (`int`): number of classes.
    """
    if len(stages) < 2:
        return ()
    generator = torch.Generator().manual_seed(0)
    num_images = min(20_000, max(4000, 2**27 // (num_classes * stages[-1])))
    shapes = [(stages[-1] / stage) ** 0.5 for stage in stages[:-1]]
    highest = []
    images = torch.arange(100)
    for _ in range(num_images // len(images)):
        draws = torch.randn(len(images), num_classes, stages[-1], generator=generator)
        winner = draws[images, draws.mean(-1).argmin(1)]
        ratios = []
        for stage, shape in zip(stages, shapes):
            leader = draws[images, draws[..., :stage].mean(-1).argmin(1)]
            ratios.append(t_statistic((winner - leader)[:, :stage]).nan_to_num(0.0) / shape)
        highest.append(torch.stack(ratios).amax(0))
    factor = torch.cat(highest).quantile(1 - ERROR_RATE).item()
    return tuple(factor * shape for shape in shapes)


def class_scores(
    weighted_errors: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns estimates of ln p of each class relative to the best class, `(N, classes)`, and the best class.

    A class is compared with the best class on the draws that both classes have had.

    Args:
        weighted_errors (`torch.Tensor` of shape `(N, classes, draws)`): their means estimate -ln p up to a
            constant; NaN where a class was given up before.
        candidates (`torch.Tensor` of shape `(N, classes)`): the classes that were not given up.
    """
    used = weighted_errors.isfinite()
    weighted = weighted_errors.nan_to_num()
    best = weighted.sum(-1).masked_fill(~candidates, math.inf).argmin(1)
    lead = weighted - weighted[torch.arange(len(best)), best][:, None]
    return (-(lead * used).sum(-1) / used.sum(-1)).clamp_max(0), best


def pool_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Pools tokens `(2 * batch, tokens, dim)` of images and their mirror images to `(batch, 2 * dim)`.

    Each token is normalised. Mean and standard deviation over the tokens are averaged over the two images.
    """
    tokens = torch.nn.functional.layer_norm(tokens.float(), tokens.shape[-1:])
    pooled = torch.cat([tokens.mean(1), tokens.std(1, correction=0)], dim=1)
    return pooled.view(2, -1, pooled.shape[1]).mean(0)
