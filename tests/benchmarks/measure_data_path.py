"""Measures how many images a second the data path of `train_pet.py` delivers, ready for the model.

python tests/benchmarks/measure_data_path.py
"""

import time

import torch

from pet_pipeline.training.data import ImageDataset, random_horizontal_flip, to_model_range


def main() -> None:
    images = torch.randint(0, 256, (9000, 3, 32, 32), dtype=torch.uint8)
    dataset = ImageDataset(images, torch.arange(9000) % 2, ["cat", "dog"])
    print("| batch | fetched, images/s | fetched, in [-1, 1] and flipped, images/s |\n|---|---|---|")
    for batch_size in (64, 256, 1024):
        loader = torch.utils.data.DataLoader(
            dataset, batch_size, shuffle=True, drop_last=True, collate_fn=dataset.collate
        )
        rates = []
        for prepare in (lambda x: x, lambda x: random_horizontal_flip(to_model_range(x))):
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < 3:
                for batch, _ in loader:
                    count += len(prepare(batch))
            rates.append(count / (time.perf_counter() - began))
        print(f"| {batch_size} | {rates[0]:,.0f} | {rates[1]:,.0f} |")


if __name__ == "__main__":
    main()
