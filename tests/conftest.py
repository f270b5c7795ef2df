import os


# Nothing here needs the network; without this, an unknown data set is looked for on the Hub. Read at import.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from support.hub_server import TOKEN, HubServer, use  # noqa: E402

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline, PetTransformer2DModel  # noqa: E402


# More threads would only wait for each other at these sizes.
torch.set_num_threads(1)

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "outer_layers": 1,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "decoder_layers": 0,
}
# The kind of the bundled model: patches of 4, without encoder and decoder, but with convolutions.
FLAT = {"patch_size": 4, "outer_layers": 0, "decoder_layers": 1, "decoder_channels": 8}


def random_model(seed: int = 0, **kwargs) -> PetTransformer2DModel:
    """A tiny model with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    model = PetTransformer2DModel(**{**TINY, **kwargs})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def model() -> PetTransformer2DModel:
    return random_model()


def tiny_pipeline(model: PetTransformer2DModel) -> PetDiffusionPipeline:
    pipe = PetDiffusionPipeline(model, AdaptiveEDMScheduler(), id2label={0: "cat", 1: "dog"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipeline(model) -> PetDiffusionPipeline:
    return tiny_pipeline(model)


@pytest.fixture
def saved(pipeline, tmp_path) -> Path:
    """The folder of a saved pipeline."""
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def hub_factory():
    """A function that starts a stand-in for the Hub."""
    servers = []

    def start() -> HubServer:
        servers.append(HubServer(TOKEN))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(hub_factory, monkeypatch) -> HubServer:
    """A stand-in for the Hub that this process uses, with a token in its environment."""
    return use(hub_factory(), monkeypatch)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """An image folder of 20 greenish birds, 20 reddish cats and 20 bluish dogs, 10×8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for channel, name in ((1, "bird"), (0, "cat"), (2, "dog")):
        (folder / name).mkdir()
        for index in range(20):
            pixels = rng.integers(0, 80, (8, 10, 3), dtype=np.uint8)
            pixels[..., channel] += 160
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def shuffled_files(image_folder, tmp_path_factory) -> Path:
    """The images of `image_folder` in a random order, in two Parquet files."""
    import datasets

    folder = tmp_path_factory.mktemp("files")
    images = datasets.load_dataset(str(image_folder), split="train", cache_dir=str(folder / "cache"))
    images = images.shuffle(seed=0)
    for number in range(2):
        images.shard(2, number).to_parquet(folder / f"train-{number:05}-of-00002.parquet")
    return folder


@pytest.fixture(scope="session")
def finished_run(image_folder, tmp_path_factory) -> Path:
    """The output folder of a finished training."""
    from support.training_process import finish_run  # which loads the training script

    return finish_run(image_folder, tmp_path_factory.mktemp("run") / "out")
