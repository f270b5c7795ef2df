"""Measures how exactly solvers and grids sample Gaussians of several widths; prints a Markdown table.

    python tests/benchmarks/measure_solvers.py

Images have structure of every contrast: a fine texture of standard deviation 0.02 to 0.1, areas of 0.5. The
denoiser of N(0, s²) is known, so the standard deviation of exact samples is s; the table shows that of a
solver's samples over s.
"""

import torch

from pet_pipeline import AdaptiveEDMScheduler


WIDTHS = (0.02, 0.05, 0.1, 0.2, 0.5)
SOLVERS = {
    "multistep, Karras grid": {},
    "multistep, exponential grid": {"sigma_schedule": "exponential"},
    "Heun, Karras grid": {"solver": "heun"},
    "Heun, exponential grid": {"solver": "heun", "sigma_schedule": "exponential"},
    "Euler, Karras grid": {"solver": "euler"},
}


def sampled_width(scheduler: AdaptiveEDMScheduler, width: float) -> float:
    """Standard deviation of the samples of N(0, `width`²), over `width`."""
    first = scheduler.sigmas[0].double()
    # The sampler is linear here: one image tells what it does to all.
    sample = torch.full((1, 1, 1, 1), (width**2 + first**2).sqrt().item(), dtype=torch.float64)
    sigma_data = scheduler.config.sigma_data
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        sigma = (4 * timestep.double()).exp()
        total = (sigma**2 + sigma_data**2).sqrt()
        denoised = width**2 / (width**2 + sigma**2) * sample
        model_output = (denoised - sigma_data**2 / total**2 * sample) * total / (sigma * sigma_data)
        sample = scheduler.step(model_output, timestep, sample, return_dict=False)[0].double()
    return sample.item() / width


def main() -> None:
    print("| solver | NFE | " + " | ".join(f"s = {width}" for width in WIDTHS) + " |")
    print("|---" * (2 + len(WIDTHS)) + "|")
    for name, config in SOLVERS.items():
        for evaluations in (12, 18, 35):
            ratios = []
            for width in WIDTHS:
                scheduler = AdaptiveEDMScheduler(**config)
                scheduler.set_timesteps((evaluations + scheduler.order - 1) // scheduler.order)
                ratios.append(sampled_width(scheduler, width))
            cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"| {name} | {len(scheduler.timesteps)} | {cells} |")


if __name__ == "__main__":
    main()
