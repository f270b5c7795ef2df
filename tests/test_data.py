import io
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pet_pipeline.training.data import (
    ImageDataset,
    UnusableImageError,
    describe_split,
    image_mode,
    image_to_tensor,
    load_if_small,
    open_image_dataset,
    random_horizontal_flip,
    stratified_split,
    to_model_range,
)


def load(image_folder, tmp_path, **kwargs):
    return open_image_dataset(
        str(image_folder), cache_dir=str(tmp_path / "cache"), **{"resolution": 8, **kwargs}
    ).load()


def test_classes_by_name_and_in_order(image_folder, tmp_path):
    dataset = load(image_folder, tmp_path, classes=["dog", "cat"])
    assert dataset.class_names == ["dog", "cat"] and len(dataset) == 40
    assert dataset.images.shape == (40, 3, 8, 8) and dataset.images.dtype == torch.uint8
    means = dataset.images.float().mean((2, 3))
    assert (means[dataset.labels == 0].argmax(1) == 2).all()  # dogs are blue here
    assert (means[dataset.labels == 1].argmax(1) == 0).all()  # cats red
    assert load(image_folder, tmp_path).class_names == ["bird", "cat", "dog"]
    few = load(image_folder, tmp_path, max_samples=10)
    assert torch.bincount(few.labels).tolist() == [3, 3, 3]


def test_parquet_with_columns_of_other_names(tmp_path):
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog", "bird"]),
            "author": datasets.Value("string"),
        }
    )
    images = [Image.new("L", (20, 12), color=50 * i) for i in range(4)]
    rows = {"photo": images, "kind": [0, 1, 0, 1], "author": ["a"] * 4}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    dataset = load(tmp_path / "data", tmp_path, classes=["cat", "dog"])
    assert dataset.labels.tolist() == [0, 1, 0, 1]
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 50, 100, 150]
    with pytest.raises(ValueError, match="no image of class 'bird'"):
        load(tmp_path / "data", tmp_path, classes=["cat", "bird"])
    with pytest.raises(
        ValueError, match="`image_column` must be a column .* is 'picture'; .* photo .Image., kind"
    ):
        load(tmp_path / "data", tmp_path, image_column="picture")
    with pytest.raises(ValueError, match="`label_column` must be .* ClassLabel or Value, but is 'photo'"):
        load(tmp_path / "data", tmp_path, label_column="photo")
    assert load(tmp_path / "data", tmp_path, label_column="author").class_names == ["a"]


def save_rows(folder, split="train", **columns):
    """A data set of small images of one shade each, and columns of plain values."""
    images = [Image.new("L", (8, 8), color=10 * index) for index in range(len(next(iter(columns.values()))))]
    rows = datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / f"{split}.parquet")
    return folder


def test_labels_may_be_integers_or_strings(tmp_path):
    numbers = load(save_rows(tmp_path / "numbers", label=[10, 2, 10, 2]), tmp_path)
    assert numbers.class_names == ["2", "10"] and numbers.labels.tolist() == [1, 0, 1, 0]
    folder = save_rows(tmp_path / "words", breed=["tabby", "beagle", "tabby"], caption=["x", "y", "z"])
    words = load(folder, tmp_path, label_column="breed")
    assert words.class_names == ["beagle", "tabby"] and words.labels.tolist() == [1, 0, 1]
    assert load(folder, tmp_path, label_column="breed", classes=["tabby"]).labels.tolist() == [0, 0]
    for labels, found in (([1, None], "row 1 has None"), ([0.5, 1.0], "row 0 has 0.5")):
        with pytest.raises(ValueError, match=f"'label' must have an integer or a string .* {found}"):
            load(save_rows(tmp_path / "bad", label=labels), tmp_path, label_column="label")
    for labels in ([0.5, 1.0], [[1], [2]]):  # which are no labels
        assert load(save_rows(tmp_path / "other", label=labels), tmp_path).class_names == ["image"]


def test_images_without_labels_are_one_class(tmp_path):
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (50 * index,) * 3).save(folder / f"{index}.png")
    dataset = load(folder, tmp_path)
    assert dataset.class_names == ["image"] and dataset.labels.tolist() == [0, 0, 0]
    assert load(save_rows(tmp_path / "captions", caption=["x", "y"]), tmp_path).class_names == ["image"]
    with pytest.raises(ValueError, match="no class 'cat', 'dog'; it has no labels, use `--classes all`"):
        load(folder, tmp_path, classes=["cat", "dog"])


def test_splits_and_modes(tmp_path):
    folder = save_rows(tmp_path / "splits", label=[0, 0])
    save_rows(folder, "test", label=[0, 0, 0])
    assert len(load(folder, tmp_path)) == 2 and len(load(folder, tmp_path, split="test")) == 3
    grey = load(folder, tmp_path, image_mode="L")
    assert grey.images.shape == (2, 1, 8, 8) and grey.images[1].unique().tolist() == [10]
    assert load(folder, tmp_path, image_mode="RGBA").images[1, :, 0, 0].tolist() == [10, 10, 10, 255]
    clear = image_to_tensor(Image.new("RGBA", (8, 8), (10, 20, 30, 40)), 8, "RGBA")
    assert clear[:, 0, 0].tolist() == [10, 20, 30, 40]
    assert [image_mode(number) for number in (1, 3, 4)] == ["L", "RGB", "RGBA"]
    with pytest.raises(ValueError, match="1, 3 or 4 channels, but the model has 2"):
        image_mode(2)


def test_parquet_with_undecoded_and_missing_images(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(file, "PNG")
    image = {"bytes": file.getvalue(), "path": None}
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    for name, images in (("undecoded", [image, image]), ("missing", [image, None])):
        (tmp_path / name).mkdir()
        rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
        rows.to_parquet(tmp_path / name / "train.parquet")
    assert load(tmp_path / "undecoded", tmp_path).images.eq(255).all()
    with pytest.raises(ValueError, match="The image of row 1 cannot be used: it is missing"):
        load(tmp_path / "missing", tmp_path)


def test_bad_requests_are_one_clear_error(image_folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no class 'unicorn'; it has bird, cat, dog"):
        load(image_folder, tmp_path, classes=["cat", "unicorn"])
    with pytest.raises(ValueError, match="once"):
        load(image_folder, tmp_path, classes=["cat", "cat"])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(ValueError, match="60 decoded images take 0.0 GB of memory, but only 0.0 GB are free"):
        load(image_folder, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path / "nowhere", tmp_path)
    damaged = tmp_path / "damaged"
    for name in ("cat", "dog"):
        (damaged / name).mkdir(parents=True)
        Image.effect_noise((64, 64), 50).save(damaged / name / "a.jpg")
    path = damaged / "dog" / "a.jpg"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="The image of row 1 cannot be used: image file is truncated"):
        load(damaged, tmp_path)


def test_images_are_upright_and_cropped_at_the_centre():
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    tensor = image_to_tensor(wide, 10)
    assert (tensor == torch.tensor([0, 0, 255]).view(3, 1, 1)).all()
    turned = Image.new("RGB", (8, 8), "black")
    turned.paste("white", (0, 0, 8, 4))
    turned.getexif()[0x0112] = 6  # to be turned clockwise by 90°
    assert image_to_tensor(turned, 8)[0, :, 7].min() == 255
    for mode in ("L", "P", "RGBA", "1"):
        assert image_to_tensor(Image.new(mode, (9, 9)), 4).shape == (3, 4, 4)


def test_sixteen_bits_and_transparency():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    tensor = image_to_tensor(Image.fromarray(ramp), 8)
    assert (tensor[0].float() - torch.from_numpy(ramp / 257.0)).abs().max() <= 1
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (image_to_tensor(clear, 8) == 255).all()
    with pytest.raises(ValueError, match="floating-point"):
        image_to_tensor(Image.new("F", (8, 8)), 8)


def test_split_is_stratified_disjoint_and_seeded():
    labels = torch.cat([torch.zeros(50), torch.ones(30)]).long()
    images = torch.arange(80, dtype=torch.uint8).view(80, 1, 1, 1).expand(80, 3, 2, 2)
    dataset = ImageDataset(images, labels, ["cat", "dog"])
    train, validation = stratified_split(dataset, 0.1, seed=1)
    assert torch.bincount(train.labels).tolist() == [45, 27]
    assert torch.bincount(validation.labels).tolist() == [5, 3]
    ids = [set(part.images[:, 0, 0, 0].tolist()) for part in (train, validation)]
    assert ids[0] | ids[1] == set(range(80)) and not ids[0] & ids[1]
    # Each image is held out by some seed, so that the first images of a class are not preferred.
    by_seed = [stratified_split(dataset, 0.1, seed=seed)[1].images[:, 0, 0, 0].tolist() for seed in range(80)]
    assert {number for numbers in by_seed for number in numbers} == set(range(80))
    few = dataset.subset(torch.tensor([0, 1, 2, 60, 61, 62]))
    assert torch.bincount(stratified_split(few, 0.1)[1].labels).tolist() == [1, 1]  # one image at least
    half = stratified_split(dataset, 0.5)[1].labels  # shuffled, so that the first of it are of both classes
    assert 4 <= half[:16].sum() <= 12
    again = stratified_split(dataset, 0.1, seed=1)[1]
    other = stratified_split(dataset, 0.1, seed=2)[1]
    assert torch.equal(again.images, validation.images) and not torch.equal(other.images, validation.images)
    # What is held out of a class does not depend on the others.
    dogs = ImageDataset(images[50:], torch.zeros(30).long(), ["dog"])
    held_out = stratified_split(dogs, 0.1, seed=1)[1].images[:, 0, 0, 0]
    assert set(held_out.tolist()) == {number for number in ids[1] if number >= 50}
    with pytest.raises(ValueError, match="'dog' has 1 image"):
        stratified_split(dataset.subset(torch.tensor([0, 1, 60])))
    with pytest.raises(ValueError, match="validation_fraction"):
        stratified_split(dataset, 1.5)


def test_a_batch_is_one_fetch():
    dataset = ImageDataset(
        torch.zeros(10, 3, 2, 2, dtype=torch.uint8), torch.arange(10), [str(i) for i in range(10)]
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=ImageDataset.collate)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))


def test_stored_images_are_those_in_memory(image_folder, tmp_path):
    options = {"classes": ["dog", "cat"], "resolution": 8, "cache_dir": str(tmp_path / "cache")}
    stored = open_image_dataset(str(image_folder), **options)
    loaded = stored.load()
    assert stored.image_shape == loaded.image_shape == (3, 8, 8) and stored.num_bytes == loaded.images.nbytes
    assert describe_split(*reversed(stratified_split(stored))) == describe_split(
        *reversed(stratified_split(loaded))
    )
    # Of a part, out of order; in memory and by two processes.
    rows = torch.randperm(40)[:30]
    stored, loaded = (part.subset(rows) for part in (stored, loaded))
    batches = []
    for dataset, num_workers in ((stored, 2), (stored, 0), (stored.load(), 0), (loaded, 0)):
        loader = torch.utils.data.DataLoader(
            dataset,
            7,
            shuffle=True,
            generator=torch.Generator().manual_seed(0),
            num_workers=num_workers,
            collate_fn=dataset.collate,
        )
        batches.append([torch.cat(parts) for parts in zip(*loader)])
    for images, labels in batches[1:]:
        assert torch.equal(images, batches[0][0]) and torch.equal(labels, batches[0][1])


def test_an_unusable_image_is_one_clear_error_in_a_process_of_its_own(tmp_path):
    folder = save_rows(tmp_path / "rows", label=[0, 0, 0])
    stored = open_image_dataset(str(folder), resolution=8, cache_dir=str(tmp_path / "cache"))
    images = list(stored.encoded["image"])
    stored.encoded = datasets.Dataset.from_dict({"image": [images[0], None, images[2]]})
    loader = torch.utils.data.DataLoader(stored, 3, num_workers=1, collate_fn=stored.collate)
    with pytest.raises(UnusableImageError) as caught:
        next(iter(loader))
    assert str(caught.value) == "The image of row 1 cannot be used: it is missing."


def test_memory_stays_the_same_over_a_pass_of_a_large_data_set(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 8000, "label": [0] * 8000}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    stored = open_image_dataset(str(tmp_path / "data"), resolution=64, cache_dir=str(tmp_path / "cache"))
    limit = stored.num_bytes / 5
    assert isinstance(load_if_small([stored])[0], ImageDataset)
    assert load_if_small([stored], max_memory_gb=limit / 1e9) == [stored]
    loader = torch.utils.data.DataLoader(stored, 64, shuffle=True, collate_fn=stored.collate)
    memory = []
    for step, (images, _) in enumerate(loader):
        assert images.eq(255).all()
        if step >= 10:
            memory.append(own_memory())
    growth = max(memory) - memory[0]
    print(f"{stored.num_bytes / 1e6:.0f} MB were decoded, and the memory grew by {growth / 1e6:.1f} MB")
    assert growth < limit / 4


def own_memory() -> int:
    """The memory of this process in bytes, without that of mapped files."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def test_flips_are_half_and_mirror():
    images = torch.arange(8.0).expand(1000, 1, 2, 8)
    torch.manual_seed(0)
    flipped = random_horizontal_flip(images)
    mirrored = (flipped == images.flip(-1)).all(-1).all(-1).all(-1)
    assert 440 < mirrored.sum() < 560
    assert torch.equal(flipped[~mirrored], images[~mirrored])


def test_model_range():
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
