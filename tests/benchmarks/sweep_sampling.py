"""Measures a model's images under many sampling settings; prints a Markdown row for each.

    python tests/benchmarks/sweep_sampling.py guidance --dataset_name uoft-cs/cifar10
    python tests/benchmarks/sweep_sampling.py steps --dataset_name uoft-cs/cifar10 --model out
    python tests/benchmarks/sweep_sampling.py autoguidance --dataset_name uoft-cs/cifar10 --guide folder
    python tests/benchmarks/sweep_sampling.py few --dataset_name uoft-cs/cifar10 --model fast

Every setting draws the same seeds, and is compared with training images, so that the test split stays unseen.
The column "recognised" is what EfficientNet-Lite0, trained on the photographs of ImageNet, makes of the cats
and of the dogs: the mean probability of its breeds of them. The last row is of as many unseen images.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline, PetTransformer2DModel
from pet_pipeline.evaluation.images import generate_images, load_classifier, measure_images
from pet_pipeline.evaluation.metrics import EfficientNetLite0Features, image_features
from pet_pipeline.evaluation.reference import balanced_subset, load_reference


NONE = {"guidance_scale": 1.0}
# Settings of the pipeline's call, and those of its scheduler.
SWEEPS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "guidance": [
        (NONE, {}),
        *(
            ({"guidance_scale": scale, "guidance_schedule": schedule}, {})
            for schedule, scales in (
                ("adaptive", (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)),
                ("interval", (1.5, 2.5, 4.0)),
                ("constant", (1.5, 2.5, 4.0)),
            )
            for scale in scales
        ),
        ({"guidance_scale": 1.5, "guidance_schedule": "original", "num_inference_steps": 18}, {}),
    ],
    # Without the guide, with and without perturbed attention, and then with the guide.
    "autoguidance": [
        *(
            ({"guidance_scale": 2.5, "pag_scale": scale, "autoguidance_scale": 1.0}, {})
            for scale in (0.5, 0.0)
        ),
        *(
            (
                {"guidance_scale": scale, "autoguidance_scale": strength, "guidance_interval": interval},
                {},
            )
            for scale, strength, interval in (
                (1.0, 2.0, (0.0, 100.0)),
                (1.0, 2.0, (0.5, 5.0)),
                (2.5, 1.5, (0.05, 5.0)),
                (5.0, 1.5, (0.05, 5.0)),
                (2.5, 1.75, (0.05, 5.0)),
                (4.0, 1.75, (0.05, 5.0)),
                (5.0, 1.75, (0.05, 5.0)),
                (5.0, 1.75, (0.15, 5.0)),
                (4.0, 2.0, (0.05, 5.0)),
                (4.0, 2.0, (0.3, 5.0)),
                (5.0, 2.0, (0.15, 5.0)),
            )
        ),
    ],
    # For a model that was tuned to few steps. The last levels are those of 4 steps before 2026-11-30.
    "few": [
        *((NONE | {"num_inference_steps": steps}, {}) for steps in (4, 3, 2, 1)),
        (NONE | {"sigmas": [80.0, 0.8, 0.335, 0.14]}, {}),
        (NONE | {"sigmas": [80.0, 23.5, 5.3, 0.8]}, {}),
    ],
    "pag": [({"guidance_scale": 2.5, "pag_scale": pag_scale}, {}) for pag_scale in (0.0, 0.5, 1.0)],
    "steps": [
        ({"num_inference_steps": steps} | guidance, {"sigma_schedule": grid})
        for grid in ("karras", "exponential")
        for steps in (8, 12, 18, 35)
        for guidance in (NONE, {"guidance_scale": 1.5})
    ],
    "grids": [
        (NONE | {"num_inference_steps": steps}, {"sigma_schedule": grid})
        for grid in ("karras", "exponential")
        for steps in (12, 18, 35)
    ],
    "solvers": [
        ({"num_inference_steps": 18}, {"solver": "multistep"}),
        ({"num_inference_steps": 18}, {"solver": "euler"}),
        ({"num_inference_steps": 9}, {"solver": "heun"}),
        ({"num_inference_steps": 18}, {"solver": "euler", "s_churn": 5.0}),
    ],
}


IMAGENET_BREEDS = {"cat": slice(281, 286), "dog": slice(151, 269)}  # ids of its classes


@torch.no_grad()
def recognised(
    features: torch.Tensor, labels: torch.Tensor, names: list[str], network: torch.nn.Module
) -> str:
    """Mean probability of the breeds of each class, for the features `(N, 1280)` of its images."""
    shares = []
    for label, name in enumerate(names):
        if name in IMAGENET_BREEDS:
            probabilities = network._fc(features[labels == label].to(network._fc.weight.device)).softmax(1)
            shares.append(f"{probabilities[:, IMAGENET_BREEDS[name]].sum(1).mean():.3f}")
    return ", ".join(shares)


def original_schedule(sigmas: list[float], guidance_scale: float) -> Callable[[float], float]:
    """Returns the guidance of the script that this project grew from, as a function of σ.

    The weight depends on the share of the steps that are done: it is 1 for the first 5 %, and ½, 1, 1.5 and 2
    times `guidance_scale` from 5, 20, 70 and 90 % on.

    Args:
        sigmas (`list[float]`): the noise level of each step.
        guidance_scale (`float`): strength of the guidance.
    """

    def weight(sigma: float) -> float:
        progress = sum(earlier > sigma for earlier in sigmas) / len(sigmas)
        factors = ((0.9, 2.0), (0.7, 1.5), (0.2, 1.0), (0.05, 0.5))
        return next((factor * guidance_scale for start, factor in factors if progress >= start), 1.0)

    return weight


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", choices=list(SWEEPS))
    parser.add_argument("--model", default=None, help="saved pipeline; the bundled one if not given")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--cache_dir")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="of the pipeline and of the feature extractor")
    parser.add_argument("--torch_compile", action="store_true", help="compile the denoiser")
    parser.add_argument("--guide", help="folder of a model that takes the place of the guide")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="precision of the weights"
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only settings with all of these words")
    parser.add_argument("--out", type=Path, help="JSON file of the records, one a line")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    pipeline = PetDiffusionPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
    if args.guide is not None:
        guide = PetTransformer2DModel.from_pretrained(args.guide, dtype=dtype).to(args.device)
        pipeline = PetDiffusionPipeline.from_pipe(pipeline, guide=guide)
    pipeline.set_progress_bar_config(disable=True)
    if args.torch_compile:
        pipeline.transformer.compile()
        if pipeline.guide is not None:
            pipeline.guide.compile()
    names = pipeline.class_names
    resolution = pipeline.transformer.config.sample_size
    reference = load_reference(args.dataset_name, names, resolution, cache_dir=args.cache_dir)
    extractor, classifier = EfficientNetLite0Features().to(args.device), load_classifier(names, resolution)
    config = pipeline.scheduler.config
    print(
        "| setting | FD-EffLite0 | KID-EffLite0 ×10³ | precision | recall | class accuracy | recognised "
        "| NFE | images/s |"
    )
    print("|---" * 9 + "|")
    network = extractor.network
    for settings, scheduler_settings in SWEEPS[args.sweep]:
        settings = {"pag_scale": 0.0, "autoguidance_scale": 1.0} | settings  # whatever the model keeps
        words = [str(value) for value in (settings | scheduler_settings).values()]
        if not set(args.only or []) <= set(words):
            continue
        pipeline.scheduler = AdaptiveEDMScheduler.from_config(config, **scheduler_settings)
        call = dict(settings)
        if settings.get("guidance_schedule") == "original":
            pipeline.scheduler.set_timesteps(settings["num_inference_steps"])
            grid = pipeline.scheduler.sigmas[:-1].tolist()
            call["guidance_schedule"] = original_schedule(grid, settings["guidance_scale"])
        generated = generate_images(pipeline, args.num_images, args.batch_size, args.seed, **call)
        features = image_features(generated.images, extractor, cache=True)
        measures = measure_images(
            generated.images, generated.labels, reference, extractor, classifier, cache=True
        )
        print(
            f"| {', '.join(words)} | {measures['fd_efflite0']:.1f} | {1000 * measures['kid_efflite0']:.2f} "
            f"| {measures['precision']:.3f} "
            f"| {measures['recall']:.3f} | {measures.get('class_accuracy', math.nan):.3f} "
            f"| {recognised(features, generated.labels, names, network)} "
            f"| {generated.evaluations:.1f} | {1 / generated.seconds:.2f} |",
            flush=True,
        )
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps({**settings, **scheduler_settings, **measures}) + "\n")
    unseen = balanced_subset(reference.validation, args.num_images)
    features = image_features(unseen.images, extractor, cache=True)
    print(f"| unseen images | | | | | | {recognised(features, unseen.labels, names, network)} | | |")


if __name__ == "__main__":
    main()
