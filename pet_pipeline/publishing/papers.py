"""The papers whose methods a pipeline uses; the Hub tags a model with the papers that its card links."""

from typing import TYPE_CHECKING, Any, NamedTuple

from ..transformer_pet import PetTransformer2DModel


if TYPE_CHECKING:
    from ..pipeline_pet_diffusion import PetDiffusionPipeline


class Paper(NamedTuple):
    """A paper, and its method that a pipeline uses."""

    arxiv_id: str
    authors: str
    title: str
    method: str


EDM = Paper(
    "2206.00364",
    "Karras et al. 2022",
    "Elucidating the Design Space of Diffusion-Based Generative Models",
    "noise levels and preconditioning",
)
LINEAR_ATTENTION = Paper(
    "2006.16236",
    "Katharopoulos et al. 2020",
    "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    "attention",
)
DIT = Paper(
    "2212.09748",
    "Peebles and Xie 2022",
    "Scalable Diffusion Models with Transformers",
    "conditioning by adaLN-zero",
)
TRANSNEXT = Paper(
    "2311.17132",
    "Shi 2023",
    "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    "feed-forward with a convolution of its gate",
)
HOURGLASS = Paper(
    "2401.11605",
    "Crowson et al. 2024",
    "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers",
    "blocks of fine tokens around those of coarse tokens",
)
EDM2 = Paper(
    "2312.02696",
    "Karras et al. 2024",
    "Analyzing and Improving the Training Dynamics of Diffusion Models",
    "learned weights of the noise levels",
)
CONSISTENCY = Paper("2303.01469", "Song et al. 2023", "Consistency Models", "drawing in few steps")
LORA = Paper(
    "2106.09685",
    "Hu et al. 2022",
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "training of low-rank updates",
)
DPM_SOLVER = Paper(
    "2211.01095",
    "Lu et al. 2022",
    "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    "solver",
)
GUIDANCE = Paper("2207.12598", "Ho and Salimans 2022", "Classifier-Free Diffusion Guidance", "guidance")
AUTOGUIDANCE = Paper(
    "2406.02507",
    "Karras et al. 2024",
    "Guiding a Diffusion Model with a Bad Version of Itself",
    "autoguidance",
)
PERTURBED_ATTENTION = Paper(
    "2403.17377",
    "Ahn et al. 2024",
    "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance",
    "perturbed-attention guidance",
)
CLASSIFIER = Paper(
    "2303.16203",
    "Li et al. 2023",
    "Your Diffusion Model is Secretly a Zero-Shot Classifier",
    "classification",
)


def papers_of(pipeline: "PetDiffusionPipeline", options: dict[str, Any]) -> list[Paper]:
    """Returns the papers whose methods a pipeline uses; `options` are those of its training."""
    defaults, has_classes = pipeline.config, len(pipeline.class_names) > 1
    is_transformer = isinstance(pipeline.transformer, PetTransformer2DModel)  # and no model of one's own
    uses = {
        EDM: True,
        LINEAR_ATTENTION: is_transformer,
        DIT: is_transformer,
        TRANSNEXT: is_transformer,
        HOURGLASS: is_transformer and pipeline.transformer.config.outer_layers > 0,
        EDM2: options["learned_weighting"],
        CONSISTENCY: pipeline.is_tuned,
        LORA: options["lora_rank"] is not None,
        DPM_SOLVER: pipeline.scheduler.config.solver == "multistep",
        GUIDANCE: defaults.guidance_scale != 1,
        AUTOGUIDANCE: pipeline.guide is not None and defaults.autoguidance_scale != 1,
        PERTURBED_ATTENTION: defaults.pag_scale != 0,
        CLASSIFIER: has_classes and not pipeline.is_tuned,
    }
    return [paper for paper, is_used in uses.items() if is_used]
