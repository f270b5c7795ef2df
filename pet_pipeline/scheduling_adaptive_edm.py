"""AdaptiveEDMScheduler: the noise-level mathematics of EDM, for sampling and for training.

Sampling follows Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models"
(EDM), Lu et al. (2022), "DPM-Solver++", and, for models that were tuned to draw in a few steps, Song et al.
(2023), "Consistency Models". Training draws noise levels by importance sampling, adapted to
the observed losses (motivated by Kingma and Gao 2023, "Understanding Diffusion Objectives as the ELBO with
Simple Data Augmentation").

This file travels inside every saved checkpoint: it imports PyTorch, diffusers and the standard library only.
"""

import math
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


# Within these ranges, grids fit into memory and squares into float32.
RANGES: dict[str, tuple[float, float]] = {
    "sigma_min": (1e-9, 1e9),
    "sigma_max": (1e-9, 1e9),
    "sigma_data": (1e-9, 1e9),
    "rho": (0.1, 1000),
    "num_train_timesteps": (1, 1_000_000),
    "s_churn": (0, math.inf),
    "s_tmin": (0, math.inf),
    "s_tmax": (0, math.inf),
    "s_noise": (0, 1000),
    "p_mean": (-100, 100),
    "p_std": (1e-3, 100),
    "num_bins": (1, 100_000),
    "adaptive_decay": (0, 1),
}
INTEGERS = ("num_train_timesteps", "num_bins")
SOLVERS = ("multistep", "euler", "heun", "consistency")


@dataclass
class TrainingSigmas(BaseOutput):
    """What [`AdaptiveEDMScheduler.sample_training_sigmas`] returns.

    Args:
        sigmas (`torch.Tensor` of shape `(batch,)`): noise levels σ.
        weights (`torch.Tensor` of shape `(batch,)`): importance weights q(σ)/p(σ); all 1 when the draw is
            fixed.
    """

    sigmas: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation of the denoiser: its index, the sample x, the denoised image D(x; σ) and σ."""

    index: int
    sample: torch.Tensor
    denoised: torch.Tensor
    sigma: torch.Tensor

    @property
    def slope(self) -> torch.Tensor:
        """dx/dσ of the probability-flow ODE (Karras et al. 2022, equation 1)."""
        return (self.sample - self.denoised) / self.sigma


class AdaptiveEDMScheduler(SchedulerMixin, ConfigMixin):
    r"""EDM preconditioning, four solvers, and adaptive noise levels for training.

    The network $F$ is wrapped as $D(x; \sigma) = c_{skip} x + c_{out} F(c_{in} x; c_{noise})$ (Karras et al.
    2022, equation 7 and table 1) and called with `timestep` = $c_{noise} = \ln(\sigma) / 4$. Names and values
    are those of `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler`, so that each of the three can
    replace the others; only `init_noise_sigma` differs, √(σ_max² + σ_data²) here and √(σ_max² + 1) there.

    Args:
        sigma_min (`float`, defaults to 0.002): smallest noise level of the sampling grid.
        sigma_max (`float`, defaults to 80.0): largest noise level of the sampling grid.
        sigma_data (`float`, defaults to 0.5): standard deviation of the data, in [-1, 1] pixel units.
        sigma_schedule (`str`, defaults to `"karras"`): `"karras"` (equation 5) or `"exponential"` (evenly in
            ln σ).
        num_train_timesteps (`int`, defaults to 1000): length of the grid before `set_timesteps` is called.
        prediction_type (`str`, defaults to `"epsilon"`): sign of $c_{out}$: `"epsilon"` (+) or
            `"v_prediction"` (-).
        rho (`float`, defaults to 7.0): exponent of the Karras grid.
        final_sigmas_type (`str`, defaults to `"zero"`): the level after the last step: `"zero"`, or
            `"sigma_min"` for the last level of the grid once more, where the last step changes nothing.
        solver (`str`, defaults to `"multistep"`): `"multistep"` (DPM-Solver++(2M), second order at one
            evaluation a step), `"euler"`, `"heun"` (EDM's algorithm 1, n steps with 2n - 1 evaluations), or
            `"consistency"`, for a model that `train_pet.py --objective consistency` has tuned: each step
            denoises completely, and adds fresh noise of the next level (Song et al. 2023, algorithm 1).
        s_churn (`float`, defaults to 0.0): EDM's stochasticity, for the solvers `"euler"` and `"heun"`. Each
            step's level is raised by a factor 1 + min(s_churn / steps, √2 - 1) with fresh noise.
        s_tmin (`float`, defaults to 0.05), s_tmax (`float`, defaults to 50.0): levels between which churn
            acts.
        s_noise (`float`, defaults to 1.0): standard deviation of the fresh noise, in units of the level.
        consistency_sigmas (`list[float]`, defaults to `(0.8, 0.14, 10.0)`): levels of the solver
            `"consistency"` after `sigma_max`, the most important one first. N steps take the first N - 1 of
            them, in decreasing order; more steps than there are levels are refused.
        adaptive (`bool`, defaults to `True`): adapt the training draw to the observed losses. Where a learned
            weighting brings these to the same size at every noise level, as that of [`BalancedAdaptiveLoss`]
            does, the draw stays at the proposal.
        p_mean (`float`, defaults to -1.6), p_std (`float`, defaults to 1.4): mean and standard deviation of
            ln σ in the training proposal q, truncated to [`sigma_min`, `sigma_max`].
        num_bins (`int`, defaults to 32): bins of the adaptive draw, of equal probability under q.
        adaptive_decay (`float`, defaults to 0.99): decay of the bins' running means per reported batch.

    Raises:
        ValueError: if an argument is out of range; the message names it.
    """

    # `from_config` looks these names up in diffusers.
    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        solver: Literal["multistep", "euler", "heun", "consistency"] = "multistep",
        s_churn: float = 0.0,
        s_tmin: float = 0.05,
        s_tmax: float = 50.0,
        s_noise: float = 1.0,
        consistency_sigmas: list[float] | tuple[float, ...] = (0.8, 0.14, 10.0),
        adaptive: bool = True,
        p_mean: float = -1.6,
        p_std: float = 1.4,
        num_bins: int = 32,
        adaptive_decay: float = 0.99,
    ) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self.config, name)
            kind, kind_name = (int, "an integer") if name in INTEGERS else ((int, float), "a number")
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"`{name}` must be {kind_name} in [{low:g}, {high:g}], but is {value!r}.")
        if not isinstance(adaptive, bool):
            raise ValueError(f"`adaptive` must be true or false, but is {adaptive!r}.")
        if not sigma_min < sigma_max:
            raise ValueError(
                f"`sigma_min` must be less than `sigma_max`, but they are {sigma_min} and {sigma_max}."
            )
        for name, choices in {
            "sigma_schedule": ("karras", "exponential"),
            "prediction_type": ("epsilon", "v_prediction"),
            "final_sigmas_type": ("zero", "sigma_min"),
            "solver": SOLVERS,
        }.items():
            if getattr(self.config, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(choices)}, but is {getattr(self.config, name)!r}."
                )
        if s_churn > 0 and solver not in ("euler", "heun"):
            raise ValueError(f"`s_churn` needs the solver 'euler' or 'heun', but the solver is {solver!r}.")
        if solver == "consistency":
            if final_sigmas_type != "zero":
                raise ValueError("The solver 'consistency' needs `final_sigmas_type` 'zero'.")
            is_list = isinstance(consistency_sigmas, (list, tuple))
            if not is_list or not all(
                isinstance(sigma, (int, float)) and 0 < sigma < sigma_max for sigma in consistency_sigmas
            ):
                raise ValueError(
                    f"`consistency_sigmas` must be a list of levels between 0 and `sigma_max` = {sigma_max}, "
                    f"but is {consistency_sigmas!r:.100}."
                )
        if adaptive_decay == 1:
            raise ValueError("`adaptive_decay` must be less than 1, because the running sums would overflow.")

        # Running sums of L² and of the number of samples, for each bin of the training proposal.
        self._bin_square_sums = torch.zeros(num_bins)
        self._bin_counts = torch.zeros(num_bins)
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._previous: _Evaluation | None = None
        self._set_grid(self._ramp(torch.linspace(0, 1, num_train_timesteps, dtype=torch.float64)))

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)
        if not isinstance(config, dict):  # diffusers would take a string for the name of a repository
            raise ValueError(f"{str(json_file)!r} must hold a JSON object.")
        return config

    def precondition_inputs(self, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """Returns c_in·x, the network's input of unit variance, in the dtype of `sample`."""
        return (sample / (_like(sigma, sample) ** 2 + self.config.sigma_data**2) ** 0.5).to(sample.dtype)

    def precondition_noise(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """Returns c_noise = ln(σ)/4, the network's `timestep`."""
        return torch.as_tensor(sigma).log() / 4

    def precondition_outputs(
        self, sample: torch.Tensor, model_output: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """Returns the denoised image D = c_skip·x + c_out·F."""
        c_skip, c_out = self._output_coefficients(_like(sigma, sample))
        return c_skip * sample + c_out * model_output

    def training_target(
        self, original_samples: torch.Tensor, noisy_samples: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """Returns F* = (y - c_skip·x)/c_out, the network output that would denoise exactly; of unit variance.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`): images y in [-1,
                1].
            noisy_samples (`torch.Tensor` of the same shape): x = y + σ·n.
            sigma (`float` or `torch.Tensor` of shape `(batch,)`): noise levels σ.
        """
        c_skip, c_out = self._output_coefficients(_like(sigma, noisy_samples))
        return (original_samples - c_skip * noisy_samples) / c_out

    def _output_coefficients(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma_data = self.config.sigma_data
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        return c_skip, c_out if self.config.prediction_type == "epsilon" else -c_out

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """Returns x = y + σ·n for any noise level, on the sampling grid or not.

        Args:
            original_samples (`torch.Tensor` of shape `(batch, channels, height, width)`): images y in [-1,
                1].
            noise (`torch.Tensor` of the same shape): n ~ N(0, I).
            timesteps (`float` or `torch.Tensor` of shape `(batch,)`): c_noise = ln(σ)/4.
        """
        sigma = (4 * torch.as_tensor(timesteps, dtype=torch.float32)).exp()
        return (original_samples + _like(sigma, original_samples) * noise).to(original_samples.dtype)

    @property
    def order(self) -> int:
        """Model evaluations per step: 2 for Heun, else 1."""
        return 2 if self.config.solver == "heun" else 1

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of an image of the data at the grid's first noise level."""
        return float((self.sigmas[0] ** 2 + self.config.sigma_data**2) ** 0.5)

    @property
    def step_index(self) -> int | None:
        """Index of the next evaluation in `timesteps`; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first evaluation, as set by [`set_begin_index`]."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the index in `timesteps` at which sampling begins (0 for pure noise)."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """Sets the grid of noise levels.

        Args:
            num_inference_steps (`int`, *optional*): number of steps, needed unless `sigmas` is given. With
                the solver `"heun"`, n steps make 2n - 1 evaluations and as many `timesteps`.
            device (`str` or `torch.device`, *optional*): device of `timesteps`; `sigmas` stays on the CPU.
            sigmas (`list[float]` or `torch.Tensor`, *optional*): noise levels, strictly decreasing, used as
                given. The final level (see `final_sigmas_type`) is appended unless the last one is 0.
            strength (`float`, defaults to 1.0): share of the ramp of noise levels that is left, in (0, 1],
                where an edit begins. Only the solver `"consistency"` uses it: its grid then begins at the
                level where a long grid of another solver would have this share of its steps left, and goes on
                with those of its levels that are lower.

        Raises:
            ValueError: if neither of the two is given, or the one that is given cannot be used; or if the
                solver `"consistency"` has fewer levels than steps.
        """
        if sigmas is not None:
            sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").flatten()
            if len(sigmas) > 1 and sigmas[-1] == 0:
                sigmas = sigmas[:-1]
                final_sigma = 0.0
            else:
                final_sigma = None
            if (
                len(sigmas) == 0
                or not sigmas.isfinite().all()
                or (sigmas <= 0).any()
                or (sigmas.diff() >= 0).any()
            ):
                raise ValueError(
                    f"`sigmas` must be positive, finite and strictly decreasing, but is {sigmas.tolist()}."
                )
        else:
            if (
                not isinstance(num_inference_steps, Integral)
                or num_inference_steps is True
                or num_inference_steps < 1
            ):
                raise ValueError(
                    f"`num_inference_steps` must be a positive integer, but is {num_inference_steps!r}."
                )
            if self.config.solver == "consistency":
                sigmas = self._consistency_grid(int(num_inference_steps), strength)
            else:
                sigmas = self._ramp(torch.linspace(0, 1, int(num_inference_steps), dtype=torch.float64))
            final_sigma = None
        self.num_inference_steps = len(sigmas)
        self._set_grid(sigmas, final_sigma, device)

    def _consistency_grid(self, num_steps: int, strength: float) -> torch.Tensor:
        """Returns the levels of the solver `"consistency"`; see [`set_timesteps`]."""
        levels = list(self.config.consistency_sigmas)
        if num_steps > len(levels) + 1:
            raise ValueError(
                f"The solver 'consistency' has levels for at most {len(levels) + 1} steps, not {num_steps}: "
                "give fewer steps, or levels of your own as `sigmas`."
            )
        start = self._ramp(torch.tensor([1.0 - strength], dtype=torch.float64))
        lower = sorted({level for level in levels[: num_steps - 1] if level < start}, reverse=True)
        return torch.cat([start, torch.tensor(lower)])

    def _ramp(self, position: torch.Tensor) -> torch.Tensor:
        """Returns the levels at positions from 0, which is `sigma_max`, to 1, which is `sigma_min`."""
        sigma_min, sigma_max, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        if self.config.sigma_schedule == "exponential":
            return (math.log(sigma_max) + position * math.log(sigma_min / sigma_max)).exp().float()
        ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        return ((ends[0] + position * (ends[1] - ends[0])) ** rho).float()

    def _set_grid(
        self, sigmas: torch.Tensor, final_sigma: float | None = None, device: str | torch.device | None = None
    ) -> None:
        if final_sigma is None:
            final_sigma = 0.0 if self.config.final_sigmas_type == "zero" else sigmas[-1].item()
        # The level of each step, raised by churn (Karras et al. 2022, algorithm 2), and where the step ends.
        acts = (sigmas >= self.config.s_tmin) & (sigmas <= self.config.s_tmax)
        gamma = min(self.config.s_churn / len(sigmas), 2**0.5 - 1)
        raised = torch.where(acts, sigmas * (1 + gamma), sigmas)
        targets = torch.cat([sigmas[1:], torch.tensor([final_sigma])])
        if self.config.solver == "heun":
            # A step evaluates the model at its own level, and again at the level where it ends, except for
            # the last step.
            levels = torch.stack([raised, targets], dim=1).flatten()[:-1]
            targets = targets.repeat_interleave(2)[:-1]
        else:
            levels = raised
        if self.config.solver == "consistency":
            targets = torch.zeros_like(targets)
        # For `timesteps[i]`, the model is evaluated at the level `sigmas[i]`, and the step ends at the level
        # `_targets[i]`.
        self.sigmas = torch.cat([levels, torch.tensor([final_sigma])])
        self._targets = targets
        self.timesteps = self.precondition_noise(levels).to(device=device)
        self._step_index = self._begin_index = self._previous = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """Returns the index of the evaluation nearest to `timestep` at which a step begins."""
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        timestep = torch.as_tensor(timestep, device=timesteps.device).flatten()[0]
        return int((timesteps[:: self.order] - timestep).abs().argmin()) * self.order

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """Returns c_in·x at the level of the next evaluation; called before the model, once per evaluation.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): the current sample.
            timestep (`float` or `torch.Tensor`): the current entry of `timesteps`.
        """
        return self.precondition_inputs(sample, self.sigmas[self._index(timestep)])

    def _index(self, timestep: float | torch.Tensor) -> int:
        """Returns the index of the next evaluation, which the first call of a sampling has to find."""
        if self._step_index is None:
            found = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if found is None else found
        return self._step_index

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EDMEulerSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Takes the sample from the current noise level to the next.

        Args:
            model_output (`torch.Tensor` of shape `(batch, channels, height, width)`): the network's raw
                output F.
            timestep (`float` or `torch.Tensor`): the current entry of `timesteps`.
            sample (`torch.Tensor` of the same shape): the current sample.
            generator (`torch.Generator` or a list of them, *optional*): generator of the fresh noise, if the
                solver adds any.
            return_dict (`bool`, defaults to `True`): return an [`EDMEulerSchedulerOutput`] instead of a
                tuple.

        Returns:
            [`EDMEulerSchedulerOutput`] or `tuple`: in the dtype of `sample`; computed in float32 at least.
        """
        index = self._index(timestep)
        dtype = sample.dtype
        compute_dtype = torch.promote_types(dtype, torch.float32)
        sample = sample.to(compute_dtype)
        sigma, target = self.sigmas[index].to(compute_dtype), self._targets[index].to(compute_dtype)
        denoised = self.precondition_outputs(sample, model_output.to(compute_dtype), sigma)

        solve = {"multistep": self._multistep, "heun": self._heun}.get(self.config.solver, self._euler)
        current = _Evaluation(index, sample, denoised, sigma)
        prev_sample = solve(current, target)
        next_sigma = self.sigmas[index + 1].to(compute_dtype)
        if next_sigma > target:  # fresh noise leads to the level of the next evaluation
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=compute_dtype)
            prev_sample = prev_sample + (next_sigma**2 - target**2).sqrt() * self.config.s_noise * noise

        self._step_index = index + 1
        self._previous = current if self._step_index < len(self.timesteps) else None
        prev_sample, denoised = prev_sample.to(dtype), denoised.to(dtype)
        if not return_dict:
            return (prev_sample, denoised)
        return EDMEulerSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def _euler(self, current: "_Evaluation", target: torch.Tensor) -> torch.Tensor:
        """First order in σ."""
        return current.sample + (target - current.sigma) * current.slope

    def _heun(self, current: "_Evaluation", target: torch.Tensor) -> torch.Tensor:
        """Second order in σ (Karras et al. 2022, algorithm 1): even indices predict, odd ones correct."""
        start = self._previous
        if start is None or current.index % 2 == 0:
            return self._euler(current, target)
        return start.sample + (target - start.sigma) * (start.slope + current.slope) / 2

    def _multistep(self, current: "_Evaluation", target: torch.Tensor) -> torch.Tensor:
        """DPM-Solver++(2M) in -ln σ (Lu et al. 2022, algorithm 2), first order at both ends of the grid."""
        sigma, extrapolated = current.sigma, current.denoised
        if self._previous is not None and target > 0:
            step, previous_step = (sigma / target).log(), (self._previous.sigma / sigma).log()
            change = current.denoised - self._previous.denoised
            extrapolated = current.denoised + step / (2 * previous_step) * change
        return target / sigma * current.sample + (1 - target / sigma) * extrapolated

    def sample_training_sigmas(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
    ) -> TrainingSigmas:
        r"""Draws noise levels for a training batch, stratified.

        The proposal q is log-normal, truncated to [`sigma_min`, `sigma_max`] and cut into bins of equal
        probability. With `adaptive`, bin b is drawn with $p_b \propto (1 + \sqrt{E_b[L^2]} / Z) / 2$, Z the
        mean of the roots: half of it q, half the proposal that minimises the variance of the
        importance-sampled mean of L. Weighting each loss by q/p keeps the objective what it is under q.

        Args:
            batch_size (`int`): number of noise levels.
            generator (`torch.Generator`, *optional*): random generator on `device`.
            device (`str` or `torch.device`, *optional*): device of the results, by default the CPU.

        Returns:
            [`TrainingSigmas`]: `sigmas` and `weights`, each of shape `(batch_size,)`, float32.
        """
        probabilities = self.bin_probabilities.to(device)
        num_bins = len(probabilities)
        jitter = torch.rand(batch_size, generator=generator, device=device)
        strata = (torch.arange(batch_size, device=device) + jitter) / batch_size  # u ~ U(0, 1), stratified
        edges = probabilities.cumsum(0)
        bins = torch.searchsorted(edges, strata, right=True).clamp(max=num_bins - 1)
        inside = ((strata - (edges - probabilities)[bins]) / probabilities[bins]).clamp(0, 1)
        sigmas = self._proposal_quantile((bins + inside) / num_bins)
        return TrainingSigmas(sigmas=sigmas, weights=1 / (num_bins * probabilities[bins]))

    def update_training_losses(self, sigmas: torch.Tensor, losses: torch.Tensor) -> None:
        """Takes the losses of a batch, to which the next draws adapt. Several processes gather theirs first.

        Args:
            sigmas (`torch.Tensor` of shape `(batch,)`): noise levels of the samples.
            losses (`torch.Tensor` of shape `(batch,)`): losses of the samples as they enter the objective,
                without importance weights. A loss is left out if its square is so large that sums could
                overflow, or is not finite.
        """
        num_bins = self.config.num_bins
        edges = self._proposal_quantile(torch.arange(1, num_bins, device=sigmas.device) / num_bins)
        bins = torch.bucketize(sigmas.detach().float(), edges)
        squares = losses.detach().float() ** 2
        # Nothing here depends on the values, so that a GPU is not waited for.
        counted = (squares < torch.finfo(squares.dtype).max / 1e6).float()  # false for NaN
        squares = torch.where(counted > 0, squares, 0.0)
        decay = self.config.adaptive_decay
        self._bin_square_sums = (decay * self._bin_square_sums.to(squares)).index_add(0, bins, squares)
        self._bin_counts = (decay * self._bin_counts.to(squares)).index_add(0, bins, counted)

    @property
    def bin_probabilities(self) -> torch.Tensor:
        """Probability of each bin in the next training draw, of shape `(num_bins,)`; sums to 1."""
        uniform = torch.full_like(self._bin_counts, 1 / self.config.num_bins)
        if not self.config.adaptive:
            return uniform
        tiny = torch.finfo(torch.float32).tiny
        observed = self._bin_counts > 0
        roots = torch.where(observed, (self._bin_square_sums / self._bin_counts.clamp(min=tiny)).sqrt(), 0.0)
        # A bin without a sample so far takes the mean of the other bins.
        roots = torch.where(observed, roots, roots.sum() / observed.sum().clamp(min=1))
        total = roots.sum()
        return (uniform + torch.where(total > 0, roots / total.clamp(min=tiny), uniform)) / 2

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state of the adaptive draw, which belongs into a training checkpoint."""
        return {"bin_square_sums": self._bin_square_sums.cpu(), "bin_counts": self._bin_counts.cpu()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restores what [`state_dict`] returned.

        Raises:
            ValueError: if the state has another number of bins.
        """
        expected = (self.config.num_bins,)
        for name in ("bin_square_sums", "bin_counts"):
            if tuple(state_dict[name].shape) != expected:
                raise ValueError(
                    f"The state's `{name}` is of shape {tuple(state_dict[name].shape)}, but this scheduler "
                    f"has `num_bins`={self.config.num_bins}."
                )
        self._bin_square_sums = state_dict["bin_square_sums"].clone()
        self._bin_counts = state_dict["bin_counts"].clone()

    def _proposal_quantile(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Returns the levels below which the truncated log-normal proposal has the given probabilities."""
        mean, std, sigma_min, sigma_max = (
            self.config[name] for name in ("p_mean", "p_std", "sigma_min", "sigma_max")
        )
        low, high = (math.erf((math.log(sigma) - mean) / std / 2**0.5) for sigma in (sigma_min, sigma_max))
        if high - low < 1e-3:  # float32 would round the levels to one end, or to the wrong one
            raise ValueError(
                f"Hardly any noise level of the training, ln σ ~ N({mean:g}, {std:g}²), lies between "
                f"`sigma_min` = {sigma_min:g} and `sigma_max` = {sigma_max:g}. Change `p_mean` or `p_std`."
            )
        z_scores = 2**0.5 * torch.erfinv(low + (high - low) * probabilities)
        # The inverse is steep at both ends, where rounding could leave the range.
        return (mean + std * z_scores).exp().clamp(sigma_min, sigma_max)


def _like(sigma: float | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Puts noise levels on the device of `sample`, shaped to broadcast over its last three axes."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sigma = torch.as_tensor(sigma, dtype=dtype, device=sample.device)
    return sigma.reshape(-1, *[1] * (sample.ndim - 1)) if sigma.ndim else sigma
