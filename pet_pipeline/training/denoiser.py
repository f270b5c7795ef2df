"""The denoiser that a training starts from: a new one, or that of a saved pipeline for fine-tuning."""

import argparse
import copy
from typing import Any

import torch

from ..pipeline_pet_diffusion import PetDiffusionPipeline
from ..scheduling_adaptive_edm import AdaptiveEDMScheduler
from ..transformer_pet import PRESETS, PetTransformer2DModel, dct_matrix, transform_patches
from .augmentation import NUM_AUGMENT_LABELS
from .data import ImageSet
from .streaming import StreamedImages


# The parts of a denoiser whose linear layers low-rank updates change.
LORA_PARTS = ("transformer_blocks", "encoder_blocks", "decoder_blocks", "time_embedding", "modulation")
# The spectrum of the images is measured on so many of them.
NUM_MEASURED = 10_000


def create_denoiser(
    args: argparse.Namespace,
    pretrained: PetDiffusionPipeline | None,
    train_set: ImageSet | StreamedImages,
    earlier_config: dict[str, Any] | None = None,
) -> tuple[PetTransformer2DModel, AdaptiveEDMScheduler]:
    """Creates the denoiser of a training, or adapts that of a saved pipeline, and creates its scheduler.

    `earlier_config` is the configuration of the denoiser in the checkpoint to continue: a new denoiser keeps
    the spectrum that was measured then, even if the data set has changed.
    """
    num_channels, resolution, _ = train_set.image_shape
    draw = {"adaptive": args.noise_schedule == "adaptive", "p_mean": args.p_mean, "p_std": args.p_std}
    if pretrained is not None:
        transformer = adapt_model(pretrained, train_set.class_names, resolution, num_channels)
        if args.augmentation_probability and not transformer.config.get("augment_dim"):
            raise ValueError(
                "--augmentation_probability needs a new model, or one that was trained with it before."
            )
        if args.objective == "consistency":
            if transformer is not pretrained.transformer:
                raise ValueError(
                    "The classes and the resolution of a student must be those of its teacher: leave out "
                    "--resolution, and give the classes of the saved pipeline in their order."
                )
            transformer = copy.deepcopy(transformer)
            # A teacher may be saved with churn or without a last step to σ = 0, which this solver refuses.
            draw |= {"solver": "consistency", "s_churn": 0.0, "final_sigmas_type": "zero"}
            teacher = AdaptiveEDMScheduler.from_config(pretrained.scheduler.config).config
            levels = [level for level in teacher.consistency_sigmas if level < teacher.sigma_max]
            draw["consistency_sigmas"] = levels
        elif pretrained.is_tuned:
            draw["solver"] = "multistep"
        if args.lora_rank is not None:
            known = pretrained.id2label.values()
            new = [name for name in train_set.class_names if name not in known]
            if known and new:
                raise ValueError(
                    "--lora_rank leaves the embeddings of the classes as they are, and so cannot learn the "
                    f"new {'class' if len(new) == 1 else 'classes'} {', '.join(new)}: leave it out."
                )
            add_low_rank_updates(transformer, args.lora_rank)
        scheduler = AdaptiveEDMScheduler.from_config(pretrained.scheduler.config, **draw)
        return transformer.train(), scheduler
    scheduler = AdaptiveEDMScheduler(prediction_type=args.prediction_type, **draw)
    config = {
        "sample_size": resolution,
        "in_channels": num_channels,
        "num_classes": len(train_set.class_names),
        "sigma_data": scheduler.config.sigma_data,
        "prediction_type": args.prediction_type,
        **args.model_config,
    }
    if args.augmentation_probability:
        config["augment_dim"] = NUM_AUGMENT_LABELS
    if args.frequency_preconditioning and "frequency_variances" not in config:
        patch_size = config.get("patch_size", PRESETS[args.preset]["patch_size"])
        measured = (earlier_config or {}).get("frequency_variances")
        config["frequency_variances"] = measured or frequency_variances(
            train_set.first(NUM_MEASURED).images, patch_size
        )
    return PetTransformer2DModel.from_preset(args.preset, **config), scheduler


def pipeline_defaults(
    args: argparse.Namespace, pretrained: PetDiffusionPipeline | None, num_classes: int
) -> dict[str, Any]:
    """Returns the arguments of the trained pipeline that decide how it samples if a call does not."""
    if args.objective == "consistency":
        return {"guidance_scale": 1.0, "num_inference_steps": 2}
    defaults = {} if pretrained is None else {"pag_scale": pretrained.config.pag_scale}
    if num_classes == 1:  # guidance would have nothing to tell apart
        defaults["guidance_scale"] = 1.0
    return defaults


def add_low_rank_updates(transformer: PetTransformer2DModel, rank: int) -> None:
    """Freezes a denoiser, and adds trainable updates of low rank to its linear layers (LoRA, Hu et al. 2022).

    The layers are those of the blocks and of the conditioning. PEFT is needed.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    layers = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(LORA_PARTS)
    ]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))


def merge_low_rank_updates(transformer: PetTransformer2DModel) -> PetTransformer2DModel:
    """Returns a copy of a denoiser with its low-rank updates added to the weights."""
    merged = copy.deepcopy(transformer)
    merged.fuse_lora()
    merged.unload_lora()
    return merged


def frequency_variances(images: torch.Tensor, patch_size: int) -> list[float]:
    """Measures the configuration entry `frequency_variances` of [`PetTransformer2DModel`] on training images.

    The images are uint8, or floats in [-1, 1]. The result is the mean squares of the cosine coefficients of
    their patches, to four digits.
    """
    height, width = images.shape[2:]
    if not isinstance(patch_size, int) or patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"`patch_size` must divide the height and width of the images, but {patch_size!r} does not "
            f"divide {height}×{width}."
        )
    matrix = dct_matrix(images.shape[1], patch_size, images.device)
    total = torch.zeros(len(matrix), dtype=torch.float64, device=images.device)
    for batch in images.split(1000):
        batch = batch / 127.5 - 1 if batch.dtype == torch.uint8 else batch
        squares = transform_patches(batch, matrix, patch_size).square()
        total += squares.mean((2, 3)).sum(0, dtype=torch.float64)
    return [float(f"{variance:.4g}") for variance in (total / len(images)).tolist()]


def adapt_model(
    pipeline: PetDiffusionPipeline, class_names: list[str], resolution: int, num_channels: int = 3
) -> PetTransformer2DModel:
    """Returns the model of a saved pipeline, adapted to classes and an image size for further training.

    Classes that the pipeline knows by name keep their embedding, as does the null class. New classes start as
    in a new model. If the pipeline knows no names, the number of classes must stay the same, and so does
    their order. Positions span the same range on images of any size. If nothing has to change, the result is
    the model of the pipeline itself.
    """
    transformer = pipeline.transformer
    config = transformer.config
    if config.in_channels != num_channels:
        raise ValueError(
            f"The saved model has {config.in_channels} channels, but the images have {num_channels}: leave "
            "out --image_mode."
        )
    num_classes = config.num_classes
    known = {pipeline.id2label[index]: index for index in range(num_classes) if index in pipeline.id2label}
    if not known and num_classes != len(class_names):
        raise ValueError(
            f"The saved model has {num_classes} classes without names, but --classes names "
            f"{len(class_names)}."
        )
    same_classes = not known or (num_classes == len(class_names) and list(known) == class_names)
    if same_classes and resolution == config.sample_size:
        return transformer
    adapted = type(transformer).from_config(
        config,
        num_classes=len(class_names),
        sample_size=resolution,
        interpolation_scale=config.interpolation_scale * resolution / config.sample_size,
    )
    weights = transformer.state_dict()
    if not same_classes:
        rows = adapted.class_embedding.weight.detach().clone()
        rows[-1] = weights["class_embedding.weight"][-1]
        for row, name in enumerate(class_names):
            if name in known:
                rows[row] = weights["class_embedding.weight"][known[name]]
        weights["class_embedding.weight"] = rows
    adapted.load_state_dict(weights)
    return adapted
