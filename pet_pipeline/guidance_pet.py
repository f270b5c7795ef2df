"""How the strength of classifier-free guidance varies with the noise level.

Kynkäänniemi et al. (2024), "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality
in Diffusion Models", show that guidance helps at middle noise levels only, and Wang et al. (2024), "Analysis
of Classifier-Free Guidance Weight Schedulers", that its strength should grow as the noise falls.

This file travels inside every saved checkpoint: it imports the standard library only.
"""

import math
from collections.abc import Callable
from typing import Any


GUIDANCE_SCHEDULES = ("adaptive", "constant", "interval")
GUIDANCE_INTERVAL = (0.05, 5.0)  # of noise levels σ

# Multiplier of (guidance_scale - 1), linear in ln σ between these points: guidance is off while the
# composition forms, standard while the class is decided, stronger for the details of the class, and off where
# only texture is left.
ADAPTIVE_SCHEDULE = ((5.0, 0.0), (2.0, 1.0), (0.5, 1.0), (0.2, 1.5), (0.05, 1.5))


def guidance_weight(
    sigma: float,
    guidance_scale: float,
    guidance_schedule: str | Callable[[float], float] = "adaptive",
    guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
) -> float:
    r"""Returns w(σ) in D = D_null + w·(D_class - D_null). A weight of 1 means no guidance.

    Args:
        sigma (`float`): noise level σ of the evaluation.
        guidance_scale (`float`): strength of the guidance; at 1, every named schedule is 1 everywhere.
        guidance_schedule (`str` or callable, defaults to `"adaptive"`):

            - `"adaptive"`: 1 + m(σ)·(guidance_scale - 1), where m is 0 for σ ≥ 5, rises to 1 at σ = 2, rises
              again from 1 at σ = 0.5 to 1.5 at σ = 0.2, and is 0 below σ = 0.05;
            - `"constant"`: guidance_scale;
            - `"interval"`: guidance_scale inside `guidance_interval`, and 1 outside;
            - a callable σ → w.
        guidance_interval (`tuple[float, float]`, defaults to `(0.05, 5.0)`): lowest and highest guided σ.

    Raises:
        ValueError: if there is no such schedule, or the result of a callable is not finite.
    """
    if callable(guidance_schedule):
        weight = float(guidance_schedule(sigma))
        if not math.isfinite(weight):
            raise ValueError(f"`guidance_schedule` must be finite, but is {weight} at σ = {sigma:.4g}.")
        return weight
    if guidance_schedule == "adaptive":
        return 1 + _interpolate_log(sigma, ADAPTIVE_SCHEDULE) * (guidance_scale - 1)
    if guidance_schedule == "constant":
        return guidance_scale
    if guidance_schedule == "interval":
        low, high = guidance_interval
        return guidance_scale if low <= sigma <= high else 1.0
    raise ValueError(
        f"`guidance_schedule` must be one of {', '.join(GUIDANCE_SCHEDULES)}, or a function of σ, but is "
        f"{guidance_schedule!r}."
    )


def _interpolate_log(sigma: float, points: tuple[tuple[float, float], ...]) -> float:
    """Interpolates (σ, value) points with falling σ linearly in ln σ; returns 0 below the last point."""
    if sigma >= points[0][0]:
        return points[0][1]
    for (high, value_high), (low, value_low) in zip(points, points[1:]):
        if sigma >= low:
            fraction = math.log(high / sigma) / math.log(high / low)
            return value_high + fraction * (value_low - value_high)
    return 0.0


def is_interval(interval: Any) -> bool:
    """Whether a value is a pair of numbers 0 ≤ low < high."""
    try:
        low, high = interval
        return bool(0 <= low < high)
    except (TypeError, ValueError):
        return False
