"""Measures what the class tells a denoiser, on held-out images; prints a Markdown table.

    python tests/benchmarks/measure_conditioning.py --dataset_name uoft-cs/cifar10

The images are those that `train_pet.py` holds out.
"""

import argparse

import torch

from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.evaluation.metrics import validation_loss
from pet_pipeline.training.data import ImageDataset, open_image_dataset, stratified_split, to_model_range


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="saved pipeline; the bundled one if not given")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--cache_dir")
    parser.add_argument("--validation_images", type=int, default=512)
    args = parser.parse_args()

    pipeline = PetDiffusionPipeline.from_pretrained(args.model)
    names = pipeline.class_names
    resolution = pipeline.transformer.config.sample_size
    dataset = open_image_dataset(args.dataset_name, names, resolution, cache_dir=args.cache_dir).load()
    held_out = stratified_split(dataset, 0.1, seed=0)[1]
    held_out = held_out.subset(torch.arange(min(args.validation_images, len(held_out))))
    response = label_response(pipeline, held_out, sigma=4.0)
    print("| measure | value |\n|---|---|")
    print(f"| RMS difference of the outputs for the true and the wrong label, σ = 4 | {response:.3f} |")

    num_classes = len(names)
    for name, class_labels in {
        "true": held_out.labels,
        "null": torch.full_like(held_out.labels, num_classes),
        "wrong": (held_out.labels + 1) % num_classes,
    }.items():
        labelled = ImageDataset(held_out.images, class_labels, names)
        losses = validation_loss(
            pipeline.transformer, pipeline.scheduler, labelled, sigmas=(0.5, 1.5, 4.0)
        ).values()
        print(f"| loss with the {name} label, σ = 0.5, 1.5, 4 | {', '.join(f'{x:.4f}' for x in losses)} |")


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


if __name__ == "__main__":
    main()
