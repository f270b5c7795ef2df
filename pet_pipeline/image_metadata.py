"""PNG files that keep the settings which made them."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn


KEY = "pet_pipeline"


def save_image(image: Image.Image, file: str | Path | BinaryIO, settings: dict[str, Any]) -> None:
    """Saves an image as a PNG that keeps `settings`, which JSON has to be able to hold."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))
    image.save(file, format="PNG", pnginfo=info)


def image_settings(path: str | Path) -> dict[str, Any]:
    """Returns the settings that a PNG of [`save_image`] keeps; they come from a file and are not checked.

    Raises:
        ValueError: if it is no PNG, or keeps no settings.
        OSError: if it cannot be read.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # the settings may follow the pixels
            text = image.text.get(KEY)
    except (OSError, MemoryError) as error:
        if isinstance(error, Image.UnidentifiedImageError):
            raise ValueError(f"{str(path)!r} is no PNG image.") from None
        raise
    except Exception as error:  # of damaged files Pillow raises nearly anything
        raise ValueError(f"{str(path)!r} cannot be read as a PNG image: {error}") from None
    try:
        settings = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{str(path)!r} keeps no settings; the images of `pet-pipeline generate` do.")
    return settings


def weights_digest(model: nn.Module) -> str:
    """Returns a short hash of a model's parameters, to tell whether two models are the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
