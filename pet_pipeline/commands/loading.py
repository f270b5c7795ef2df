"""Loading of models and data sets for the commands, with errors of one line."""

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..sampling import scheduler_by_name


if TYPE_CHECKING:
    from ..evaluation.reference import Reference
    from ..pipeline_pet_classification import PetClassificationPipeline
    from ..pipeline_pet_diffusion import PetDiffusionPipeline


def load_pipeline(
    model: str | None,
    scheduler: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
) -> "PetDiffusionPipeline":
    """Loads a saved pipeline, or the model of the package.

    Args:
        model (`str`, *optional*): folder or Hub id; `None` for the model of the package.
        scheduler (`str`, *optional*): see [`scheduler_by_name`].
        device (`str`, *optional*): the default is a GPU where there is one.
        dtype (`str`, defaults to `"float32"`): precision of the weights.
        revision (`str`, *optional*): branch, tag or commit of a model on the Hub.

    Raises:
        ValueError: if the pipeline cannot be loaded, the device or the scheduler cannot be used, or a model
            that is not on the Hub has a revision.
    """
    if revision is not None and (model in (None, "fast") or Path(model).is_dir()):
        raise ValueError("--revision needs the Hub id of a model.")
    import torch
    from diffusers.utils import logging

    from ..pipeline_pet_diffusion import PetDiffusionPipeline

    logging.disable_progress_bar()  # loading is fast, and sampling has a progress bar of its own
    try:
        options = {"dtype": getattr(torch, dtype), "revision": revision}
        pipeline = PetDiffusionPipeline.from_pretrained(model, **options)
    except MemoryError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds of exceptions for damaged files
        message = textwrap.shorten(str(error) or type(error).__name__, 500)
        raise ValueError(f"The model {model!r} cannot be loaded: {message}") from error
    if scheduler is not None:
        pipeline.scheduler = scheduler_by_name(scheduler, pipeline.scheduler)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no data.")
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def load_classifier_pipeline(
    model: str | None,
    device: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
) -> "PetClassificationPipeline":
    """Loads a saved pipeline as a classifier; see [`load_pipeline`]."""
    from ..pipeline_pet_classification import PetClassificationPipeline

    return PetClassificationPipeline.from_pipe(load_pipeline(model, None, device, dtype, revision))


def load_reference_of(args: argparse.Namespace, pipeline: "PetDiffusionPipeline", split: str) -> "Reference":
    """Loads the data set of the options of [`add_reference_options`] for the classes of a pipeline."""
    from ..evaluation.reference import load_reference
    from ..training.data import image_mode

    config = pipeline.transformer.config
    return load_reference(
        args.reference,
        pipeline.class_names,
        config.sample_size,
        split,
        args.validation_fraction,
        args.max_train_samples,
        args.train_split,
        image_mode=image_mode(config.in_channels),
        dataset_config_name=args.dataset_config_name,
        image_column=args.image_column,
        label_column=args.label_column,
        cache_dir=args.cache_dir,
    )
