"""The schedulers that a pipeline can be given by name; the names alone do not load PyTorch."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SOLVERS = ["multistep", "euler", "heun"]
SCHEDULERS = [*SOLVERS, "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]


def scheduler_by_name(name: str | None, scheduler: "SchedulerMixin") -> "SchedulerMixin":
    """Returns a new scheduler, with the configuration of another and no state of it.

    Args:
        name (`str`, *optional*): one of [`SCHEDULERS`]: a solver of [`AdaptiveEDMScheduler`], or a scheduler
            of diffusers; `None` for the class and solver of `scheduler`.
        scheduler (`SchedulerMixin`): gives the configuration.

    Raises:
        ValueError: if there is none of that name.
    """
    import diffusers

    from .scheduling_adaptive_edm import AdaptiveEDMScheduler

    if name is None:
        return type(scheduler).from_config(scheduler.config)
    if name in SOLVERS:
        churn = {"s_churn": 0.0} if name == "multistep" else {}  # which that solver cannot have
        return AdaptiveEDMScheduler.from_config(scheduler.config, solver=name, **churn)
    if name not in SCHEDULERS:
        raise ValueError(f"There is no scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")
    return getattr(diffusers, name).from_config(scheduler.config)
