"""Measures a saved pipeline: validation loss, memorisation, and time per image; prints a Markdown table.

    python tests/benchmarks/measure_checkpoint.py --dataset_name uoft-cs/cifar10

The validation images are those that `train_pet.py --seed 0` holds out.
"""

import argparse
import time

import torch

from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.data import ImageDataset, load_image_dataset, stratified_split, to_model_range
from pet_pipeline.metrics import memorization_ratio, nearest_neighbors, validation_loss
from pet_pipeline.visualization import class_names, image_generators


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="saved pipeline; the bundled one if not given")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--cache_dir")
    parser.add_argument("--validation_images", type=int, default=512)
    parser.add_argument(
        "--num_images", type=int, default=256, help="samples for memorisation and time, all classes"
    )
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    args = parser.parse_args()

    pipeline = PetDiffusionPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(desc="batch")
    names = class_names(pipeline)
    resolution = pipeline.transformer.config.sample_size
    dataset = load_image_dataset(args.dataset_name, names, resolution, cache_dir=args.cache_dir)
    train_set, validation_set = stratified_split(dataset, 0.1, seed=0)
    held_out = validation_set.subset(torch.arange(min(args.validation_images, len(validation_set))))
    errors = validation_loss(pipeline.transformer, pipeline.scheduler, held_out)

    # What the class tells the model: the loss with the true label, the null label and the next class's label.
    num_classes = len(names)
    by_label = {}
    for label, class_labels in {
        "true": held_out.labels,
        "null": torch.full_like(held_out.labels, num_classes),
        "wrong": (held_out.labels + 1) % num_classes,
    }.items():
        labelled = ImageDataset(held_out.images, class_labels, names)
        by_label[label] = validation_loss(
            pipeline.transformer, pipeline.scheduler, labelled, sigmas=(0.5, 1.5, 4.0)
        )

    response = label_response(pipeline, held_out, sigma=4.0)

    samples, seconds = [], 0.0
    generators = image_generators(args.num_images)
    for start in range(0, args.num_images, 32):
        batch = generators[start : start + 32]
        labels = [(start + index) % len(names) for index in range(len(batch))]
        began = time.perf_counter()
        samples.append(
            pipeline(
                labels,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale,
                generator=batch,
                output_type="latent",
            ).images.clamp(-1, 1)
        )
        seconds += time.perf_counter() - began
    samples = torch.cat(samples)
    known = to_model_range(train_set.images)
    unseen = to_model_range(validation_set.images[: args.num_images])
    rows = {
        "RMS difference of the outputs for the true and the wrong label, σ = 4": f"{response:.3f}",
        **{
            f"loss with the {label} label, σ = 0.5, 1.5, 4": ", ".join(f"{x:.4f}" for x in losses.values())
            for label, losses in by_label.items()
        },
        f"validation loss, {len(held_out)} unseen images, 16 σ": f"{sum(errors.values()) / len(errors):.4f}",
        "memorisation ratio of the samples": f"{memorization_ratio(samples, known):.4f}",
        "the same of unseen images": f"{memorization_ratio(unseen, known):.4f}",
        "median distance to the nearest training image, samples": f"{median_distance(samples, known):.4f}",
        "the same of unseen images (RMS, [-1, 1])": f"{median_distance(unseen, known):.4f}",
        f"seconds per image, {args.steps} steps, batch 32": f"{seconds / len(samples):.3f}",
    }
    print("| measure | value |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    print("\n| σ | " + " | ".join(f"{sigma:.3g}" for sigma in errors) + " |")
    print("|---" * (len(errors) + 1) + "|")
    print("| validation loss | " + " | ".join(f"{error:.3f}" for error in errors.values()) + " |")


@torch.no_grad()
def label_response(pipeline: PetDiffusionPipeline, dataset: ImageDataset, sigma: float) -> float:
    """Root mean square difference of the network's outputs for each image's own class and the next one."""
    scheduler = pipeline.scheduler
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for images, labels in zip(dataset.images.split(64), dataset.labels.split(64)):
        images = to_model_range(images)
        noisy_images = images + sigma * torch.randn(images.shape, generator=generator)
        outputs = [
            pipeline.transformer(
                scheduler.precondition_inputs(noisy_images, sigma),
                scheduler.precondition_noise(sigma),
                class_labels,
            ).sample
            for class_labels in (labels, (labels + 1) % pipeline.transformer.config.num_classes)
        ]
        total += (outputs[0] - outputs[1]).square().mean((1, 2, 3)).sum().item()
    return (total / len(dataset)) ** 0.5


def median_distance(images: torch.Tensor, training_images: torch.Tensor) -> float:
    """Median over images of the distance to the nearest training image, mirrored or not."""
    return nearest_neighbors(images, training_images).distances.median().item()


if __name__ == "__main__":
    main()
