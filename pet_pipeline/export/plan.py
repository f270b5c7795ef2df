"""The plan of a sampling: every number that a runtime without this package needs, as JSON can hold it."""

from typing import Any

import torch

from ..guidance_pet import GUIDANCE_INTERVAL, guidance_weight
from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..sampling import SampleSettings
from ..scheduling_adaptive_edm import AdaptiveEDMScheduler


def sampling_plan(pipeline: PetDiffusionPipeline, settings: SampleSettings) -> dict[str, Any]:
    """Returns the steps of a sampling as numbers, for models that [`export_onnx`] has written.

    A sampling begins with x = `init_noise_sigma`·n, where n is noise of unit variance. A step of the plan
    evaluates the network F at `timestep` and computes

    - F = F_class, the output of `transformer.onnx` for c_in·x and the class;
    - if `guidance_scale` w is not 1, F gains (w - 1)·(F'_class - F'_negative), where F' is the output of
      `guide.onnx` if the plan has a guide, and otherwise that of `transformer.onnx`;
    - if `autoguidance_scale` w is not 1, F gains (w - 1)·(F_class - F'_class);
    - the denoised image D = `c_skip`·x + `c_out`·F;
    - the next x = `sample`·x + `denoised`·D + `previous`·(D of the step before) + `noise`·n, with fresh n.

    The last x is the image, in about [-1, 1].

    Args:
        pipeline ([`PetDiffusionPipeline`]): the pipeline, with an [`AdaptiveEDMScheduler`].
        settings ([`SampleSettings`]): the settings; those that are `None` are the pipeline's.

    Raises:
        ValueError: if a plan cannot describe the sampling.
    """
    arguments = settings.call_arguments(pipeline)
    schedule = arguments["guidance_schedule"]
    pipeline.set_guidance(
        arguments["guidance_scale"], schedule, arguments["pag_scale"], arguments["autoguidance_scale"]
    )
    pipeline.check_inputs()
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, AdaptiveEDMScheduler) or scheduler.config.solver == "heun":
        raise ValueError(
            "An export needs the solver multistep, euler or consistency of AdaptiveEDMScheduler: choose "
            "multistep or euler with --scheduler."
        )
    if pipeline.guider is not None:
        raise ValueError("An export cannot describe a guider: save the model without one.")
    if pipeline.pag_scale != 0:
        raise ValueError("An export cannot describe perturbed-attention guidance: use --pag_scale 0.")
    # The scheduler itself takes the steps, from unit vectors for x, D and the D before, and without noise.
    silent = AdaptiveEDMScheduler.from_config(scheduler.config, s_noise=0.0)
    silent.set_timesteps(arguments["num_inference_steps"] or pipeline.config.num_inference_steps)
    silent.set_begin_index(0)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    unit = torch.eye(3, dtype=torch.float64)
    low, high = GUIDANCE_INTERVAL
    steps = []
    for index, timestep in enumerate(silent.timesteps):
        sigma, next_sigma, target = silent.sigmas[index], silent.sigmas[index + 1], silent._targets[index]
        level = sigma.item()
        c_skip, c_out = (silent.precondition_outputs(*terms, sigma) for terms in ((one, zero), (zero, one)))
        now, before = 1 + index % 2, 2 - index % 2
        update = silent.step((unit[now] - c_skip * unit[0]) / c_out, timestep, unit[0]).prev_sample.tolist()
        steps.append(
            {
                "sigma": level,
                "timestep": timestep.item(),
                "guidance_scale": guidance_weight(level, pipeline.guidance_scale, schedule),
                "autoguidance_scale": pipeline.autoguidance_scale if low <= level <= high else 1.0,
                "c_in": silent.precondition_inputs(one, sigma).item(),
                "c_skip": c_skip.item(),
                "c_out": c_out.item(),
                "sample": update[0],
                "denoised": update[now],
                "previous": update[before],
                "noise": scheduler.config.s_noise * max(0.0, (next_sigma**2 - target**2).item()) ** 0.5,
            }
        )
    config = pipeline.transformer.config
    return {
        "classes": pipeline.class_names,
        "negative_class": (arguments["negative_class_labels"] or [pipeline.null_class_id])[0],
        "shape": [config.in_channels, config.sample_size, config.sample_size],
        "init_noise_sigma": silent.init_noise_sigma,
        "steps": steps,
    }
