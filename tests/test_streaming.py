"""Data sets that are read as a stream."""

from itertools import islice

import datasets
import pytest
import torch
from support.training_process import metrics, train
from test_data import save_rows

import train_pet
from pet_pipeline import PetDiffusionPipeline
from pet_pipeline.training.data import image_digests, open_image_dataset
from pet_pipeline.training.streaming import num_loading_processes, open_image_stream


def stream_of(folder, tmp_path, classes=None, **kwargs):
    return open_image_stream(str(folder), classes, 8, cache_dir=str(tmp_path / "cache"), **kwargs)


def test_a_pass_over_a_stream_has_every_image_once_but_those_held_out(shuffled_files, tmp_path):
    stream = stream_of(shuffled_files, tmp_path, ["dog", "cat"])
    in_order = list(stream)
    held_out = stream.hold_out(6, shuffle_buffer_size=8, seed=0)
    assert stream.class_names == ["dog", "cat"] and len(in_order) == 40
    assert torch.equal(held_out.images, torch.stack([image for image, _ in in_order[:6]]))

    def digests(examples):
        return image_digests(torch.stack([image for image, _ in examples]))

    passes = []
    for epoch in (0, 0, 1):
        stream.set_epoch(epoch)
        passes.append(digests(stream))
    assert passes[0] == passes[1] != passes[2]  # an epoch has an order of its own
    assert sorted(passes[0]) == sorted(passes[2]) == sorted(digests(in_order[6:]))
    known = open_image_dataset(
        str(shuffled_files), ["dog", "cat"], 8, cache_dir=str(tmp_path / "cache")
    ).load()
    label_of = dict(zip(image_digests(known.images), known.labels.tolist()))
    assert all(label_of[digests([example])[0]] == example[1] for example in islice(stream, 20))


def test_loading_processes_share_the_files_of_a_stream(shuffled_files, tmp_path):
    stream = stream_of(shuffled_files, tmp_path)
    stream.hold_out(6, shuffle_buffer_size=8, seed=0)
    assert num_loading_processes(stream, 3, is_main_process=True) == 2
    assert num_loading_processes(stream, 3, is_main_process=False) == 0
    loader = torch.utils.data.DataLoader(stream, 4, num_workers=2, collate_fn=stream.collate)
    images = torch.cat([images for images, _ in loader])
    assert sorted(image_digests(images)) == sorted(image_digests(torch.stack([image for image, _ in stream])))
    assert len(images) == 54


def test_streams_of_other_labels(image_folder, tmp_path):
    numbers = save_rows(tmp_path / "numbers", label=[10, 2, 10, 3])
    with pytest.raises(ValueError, match="'label' have no list of names, .* with --classes"):
        stream_of(numbers, tmp_path)
    assert [label for _, label in stream_of(numbers, tmp_path, ["2", "10"])] == [1, 0, 1]
    words = save_rows(tmp_path / "words", breed=["tabby", None, "beagle"])
    assert [label for _, label in stream_of(words, tmp_path, ["beagle", "tabby"], label_column="breed")] == [
        1,
        0,
    ]
    plain = stream_of(save_rows(tmp_path / "plain", caption=["x", "y"]), tmp_path, image_mode="L")
    assert plain.class_names == ["image"] and [image.shape for image, _ in plain] == [(1, 8, 8)] * 2
    folder = stream_of(image_folder / "cat", tmp_path)
    assert folder.class_names == ["image"] and len(list(folder)) == 20
    with pytest.raises(ValueError, match="no class 'cat'; it has no labels"):
        stream_of(tmp_path / "plain", tmp_path, ["cat"])


def stream_of_images(images, folder):
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [image and {"path": None, "bytes": image} for image in images]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return stream_of(folder, folder)


def test_images_that_cannot_be_decoded_are_left_out(image_folder, tmp_path):
    good = [(image_folder / "cat" / f"{number:02}.png").read_bytes() for number in range(2)]
    stream = stream_of_images([good[0], b"no image", None, good[1]], tmp_path / "some")
    with pytest.warns(UserWarning, match="The image of the stream cannot be used: .* It is left out."):
        assert len(list(stream)) == 2


def test_copies_of_held_out_images_are_left_out(image_folder, tmp_path, monkeypatch):
    images = [(image_folder / "cat" / f"{number:02}.png").read_bytes() for number in (0, 1, 0, 2, 1)]
    stream = stream_of_images(images, tmp_path / "copies")
    stream.hold_out(2, shuffle_buffer_size=8, seed=0)
    assert len(list(stream)) == len(stream.sample) == 1
    assert not stream.has_images(2)
    monkeypatch.setattr("pet_pipeline.training.streaming.NUM_SAMPLED", 2)
    longer = stream_of_images(images, tmp_path / "longer")
    longer.hold_out(2, shuffle_buffer_size=8, seed=0)
    assert longer.has_images(2)  # as far as is known: it was not read to its end


def test_another_number_of_loading_processes_is_warned_of(shuffled_files, tmp_path):
    options = {"streaming": True, "validation_images": 4, "checkpointing_steps": 1}
    train(shuffled_files, tmp_path / "out", **options, max_train_steps=1, dataloader_num_workers=1)
    options |= {"max_train_steps": 2, "dataloader_num_workers": 0, "resume_from_checkpoint": "latest"}
    with pytest.warns(
        UserWarning, match="with 1 loading processes: with 0 .* Use --dataloader_num_workers 1"
    ):
        train(shuffled_files, tmp_path / "out", **options)


def test_loading_processes_that_would_fill_no_batch_are_replaced_by_one(shuffled_files, tmp_path):
    # Each of the two files has less than a batch of 32.
    options = {"streaming": True, "validation_images": 4, "train_batch_size": 32, "dataloader_num_workers": 2}
    train(shuffled_files, tmp_path / "out", max_train_steps=2, **options)
    assert [record["images"] for record in metrics(tmp_path / "out") if "train/loss" in record] == [32, 64]


def test_streams_that_cannot_be_trained_on_are_one_clear_error(image_folder, shuffled_files, tmp_path):
    with pytest.raises(ValueError, match="begins with 6 images of one class, .* in random order"):
        stream_of(image_folder, tmp_path).hold_out(6, 8, 0)
    with pytest.raises(ValueError, match="has 0 images of the classes unicorn, but"):
        stream_of(save_rows(tmp_path / "few", label=[1]), tmp_path, ["unicorn"]).hold_out(6, 8, 0)
    with pytest.raises(ValueError, match="--validation_images must be at least 2, the number of classes"):
        stream_of(shuffled_files, tmp_path, ["cat", "dog"]).hold_out(1, 8, 0)
    options = {"streaming": True, "train_batch_size": 8}
    for number, message in (
        (40, "40 images of the classes cat, dog, but .* holds out 40"),
        (33, "too few images"),
    ):
        with pytest.raises(ValueError, match=message):
            train(shuffled_files, tmp_path / "out", validation_images=number, **options)
    assert not (tmp_path / "out").exists()
    for words in (
        ["--num_train_epochs", "1"],
        ["--max_train_samples", "9"],
        ["--validation_fraction", "0.2"],
    ):
        with pytest.raises(SystemExit):
            train_pet.parse_args(["--streaming", "--max_train_steps", "1", *words])


def test_a_training_on_a_stream_knows_what_it_held_out_and_is_fine_tuned(shuffled_files, tmp_path):
    options = {"streaming": True, "validation_images": 4, "max_train_steps": 2, "checkpointing_steps": 2}
    out = tmp_path / "out"
    train(shuffled_files, out, **options)
    assert "A stream of the images of a local data set" in (out / "README.md").read_text()
    assert [record["images"] for record in metrics(out) if "train/loss" in record] == [8, 16]
    options |= {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="other held-out images than the first of this stream"):
        train(shuffled_files, out, **{**options, "validation_images": 5})
    options |= {"resume_from_checkpoint": None, "pretrained_model_name_or_path": out, "model_config": None}
    train(shuffled_files, tmp_path / "more", **options, classes=["bird", "cat"], resolution=16)
    assert PetDiffusionPipeline.from_pretrained(tmp_path / "more").class_names == ["bird", "cat"]
