"""Measures the seconds of sampling for 16 images; prints a Markdown row for each number of steps.

    python tests/benchmarks/measure_few_steps.py

The settings take turns in one process, so that their ratios can be compared on a noisy machine.
"""

import argparse
import time

from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.sampling import image_generators


SETTINGS = [("bundled", 18), ("bundled", 4), ("bundled", 2), ("fast", 4), ("fast", 2), ("fast", 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    pipelines = {"bundled": PetDiffusionPipeline.from_pretrained()}
    pipelines["fast"] = PetDiffusionPipeline.from_pretrained("fast")
    seconds: dict[tuple[str, int], list[float]] = {setting: [] for setting in SETTINGS}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline(generator=image_generators(2), num_inference_steps=1)  # the first call is slower
    for _ in range(args.repeats):
        for name, steps in SETTINGS:
            began = time.perf_counter()
            pipelines[name](
                num_images_per_prompt=8, num_inference_steps=steps, generator=image_generators(16)
            )
            seconds[name, steps].append(time.perf_counter() - began)
    print("| model | steps | seconds, lowest | highest |\n|---|---|---|---|")
    for (name, steps), times in seconds.items():
        print(f"| {name} | {steps} | {min(times):.2f} | {max(times):.2f} |")


if __name__ == "__main__":
    main()
