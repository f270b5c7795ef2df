"""Measures the seconds of sampling for 16 images; prints a Markdown row for each number of steps.

    python tests/benchmarks/measure_few_steps.py

The settings take turns in one process, so that their ratios can be compared on a noisy machine.
"""

import argparse
import time

import torch

from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.sampling import image_generators


SETTINGS = [("bundled", 18), ("bundled", 4), ("fast", 4), ("fast", 3), ("fast", 2), ("fast", 1)]
DTYPES = ("float32", "bfloat16")  # of the weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    pipelines = {
        (name, dtype): PetDiffusionPipeline.from_pretrained(
            None if name == "bundled" else name, dtype=getattr(torch, dtype)
        )
        for name in ("bundled", "fast")
        for dtype in DTYPES
    }
    seconds: dict[tuple[str, str, int], list[float]] = {}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline(generator=image_generators(2), num_inference_steps=1)  # the first call is slower
    for _ in range(args.repeats):
        for dtype in DTYPES:
            for name, steps in SETTINGS:
                began = time.perf_counter()
                pipelines[name, dtype](
                    num_images_per_prompt=8, num_inference_steps=steps, generator=image_generators(16)
                )
                seconds.setdefault((name, dtype, steps), []).append(time.perf_counter() - began)
    print("| model | weights | steps | seconds, lowest | highest |\n|---|---|---|---|---|")
    for (name, dtype, steps), times in seconds.items():
        print(f"| {name} | {dtype} | {steps} | {min(times):.2f} | {max(times):.2f} |")


if __name__ == "__main__":
    main()
