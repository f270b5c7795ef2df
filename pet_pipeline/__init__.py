"""Generate cats and dogs: a diffusers-style pipeline around a linear-attention transformer denoiser."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.2.0.dev0"

# Public names by module, imported on first use: `import pet_pipeline` alone does not load PyTorch.
_MODULES = {
    "PetTransformer2DModel": "transformer_pet",
    "PetLinearProbe": "probe_pet",
    "AdaptiveEDMScheduler": "scheduling_adaptive_edm",
    "BalancedAdaptiveLoss": "training.losses",
    "PetDiffusionPipeline": "pipeline_pet_diffusion",
    "guidance_weight": "guidance_pet",
    "PetClassificationPipeline": "pipeline_pet_classification",
}
__all__ = [
    "AdaptiveEDMScheduler",
    "BalancedAdaptiveLoss",
    "PetClassificationPipeline",
    "PetDiffusionPipeline",
    "PetLinearProbe",
    "PetTransformer2DModel",
    "guidance_weight",
]

if TYPE_CHECKING:
    from .guidance_pet import guidance_weight
    from .pipeline_pet_classification import PetClassificationPipeline
    from .pipeline_pet_diffusion import PetDiffusionPipeline
    from .probe_pet import PetLinearProbe
    from .scheduling_adaptive_edm import AdaptiveEDMScheduler
    from .training.losses import BalancedAdaptiveLoss
    from .transformer_pet import PetTransformer2DModel


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
