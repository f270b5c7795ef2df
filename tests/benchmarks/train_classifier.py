"""Trains the small classifier that judges generated images, and states its accuracy.

    python tests/benchmarks/train_classifier.py --dataset_name uoft-cs/cifar10 --output_dir classifier

It sees the images that `train_pet.py` trains on; the validation part watches it, and with `--test`
the test split is measured at the end.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from pet_pipeline.evaluation.classifier import PetClassifier
from pet_pipeline.training.data import (
    ImageDataset,
    open_image_dataset,
    random_horizontal_flip,
    stratified_split,
    to_model_range,
)


def random_crop_and_erase(images: torch.Tensor, padding: int = 4, hole: int = 8) -> torch.Tensor:
    """Shifts each image by up to `padding` pixels, mirrored at the border, and blanks a square of it."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4, mode="reflect")
    crops = torch.empty_like(images)
    offsets = torch.randint(0, 2 * padding + 1, (len(images), 2)).tolist()
    centres = torch.randint(0, height, (len(images), 2)).tolist()
    for index, ((top, left), (row, column)) in enumerate(zip(offsets, centres)):
        crops[index] = padded[index, :, top : top + height, left : left + width]
        rows, columns = (slice(max(0, centre - hole // 2), centre + hole // 2) for centre in (row, column))
        crops[index, :, rows, columns] = 0
    return crops


@torch.no_grad()
def accuracy(classifier: PetClassifier, dataset: ImageDataset) -> float:
    """Share of images whose class is found."""
    classifier.eval()
    right = [
        classifier(to_model_range(images).to(classifier.device)).argmax(1).cpu() == labels
        for images, labels in zip(dataset.images.split(250), dataset.labels.split(250))
    ]
    classifier.train()
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--classes", nargs="+", default=["cat", "dog"])
    parser.add_argument("--cache_dir")
    parser.add_argument("--num_train_epochs", type=int, default=40)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--test", action="store_true", help="measure the test split")
    parser.add_argument("--output_dir", default="classifier")
    args = parser.parse_args()

    dataset = open_image_dataset(args.dataset_name, args.classes, cache_dir=args.cache_dir).load()
    train_set, validation_set = stratified_split(dataset, 0.1, seed=0)
    torch.manual_seed(args.seed)
    classifier = PetClassifier(args.classes).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = args.num_train_epochs * (len(train_set) // args.train_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    began = time.monotonic()
    for epoch in tqdm(range(args.num_train_epochs), desc="epochs"):
        order = torch.randperm(len(train_set))
        for rows in order.split(args.train_batch_size)[: len(train_set) // args.train_batch_size]:
            images = random_crop_and_erase(random_horizontal_flip(to_model_range(train_set.images[rows])))
            logits = classifier(images.to(args.device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, train_set.labels[rows].to(args.device), label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if (epoch + 1) % 5 == 0:
            tqdm.write(f"epoch {epoch + 1}: validation accuracy {accuracy(classifier, validation_set):.4f}")
    minutes = (time.monotonic() - began) / 60
    classifier = classifier.eval().to(torch.bfloat16)
    classifier.save_pretrained(args.output_dir)
    classifier = PetClassifier.from_pretrained(args.output_dir, dtype=torch.float32)
    print(f"{minutes:.1f} minutes, validation accuracy {accuracy(classifier, validation_set):.4f}")
    if args.test:
        test_set = open_image_dataset(
            args.dataset_name, args.classes, split="test", cache_dir=args.cache_dir
        ).load()
        print(f"test accuracy {accuracy(classifier, test_set):.4f}")


if __name__ == "__main__":
    main()
