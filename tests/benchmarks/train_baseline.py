"""Trains a baseline, diffusers' DiT or UNet, exactly as `train_pet.py` trains the denoiser of this package.

    python tests/benchmarks/train_baseline.py dit --dataset_name uoft-cs/cifar10 --max_train_minutes 20
    python tests/benchmarks/train_baseline.py unet --optimizer adamw …

The first argument chooses the model; all others are those of `train_pet.py`: same data, noise, loss,
optimizer, EMA. Both models need about seven eighths of the FLOPs of the preset `small`, as
`measure_speed.py baselines` shows.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pet_pipeline import PetTransformer2DModel
from pet_pipeline.training import denoiser


sys.path.insert(0, str(Path(__file__).parents[2]))  # train_pet.py is no part of the package
import train_pet  # noqa: E402


class Baseline(ModelMixin, ConfigMixin):
    """What the two have in common: called and configured like `PetTransformer2DModel`."""

    network: nn.Module

    @classmethod
    def from_preset(cls, preset: str, sigma_data: float, prediction_type: str, **kwargs) -> "Baseline":
        return cls(**kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        # c_noise in [-1.6, 1.1]: the fastest of their sinusoids then turns as fast as that of our denoiser.
        timestep = (timestep.float().expand(len(hidden_states)) + 2) * 25
        return (self.network(hidden_states, timestep, class_labels=class_labels, return_dict=False)[0],)


class DiTBaseline(Baseline):
    """diffusers' `DiTTransformer2DModel`, 8 layers × 192, patch 4: Peebles and Xie (2022)."""

    @register_to_config
    def __init__(
        self, sample_size: int = 32, in_channels: int = 3, num_classes: int = 2, num_layers: int = 8
    ) -> None:
        super().__init__()
        self.network = DiTTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=in_channels,
            out_channels=in_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=4,
            num_embeds_ada_norm=num_classes,
        )
        for name, parameter in self.network.named_parameters():
            # As in the paper: modulations and the output start at zero.
            if name.endswith(("norm1.linear.weight", "norm1.linear.bias")) or name.startswith("proj_out"):
                nn.init.zeros_(parameter)
        for block in self.network.transformer_blocks:
            # Labels are dropped by train_pet.py, at the rate asked for.
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def transformer_blocks(self) -> nn.ModuleList:
        """Where Muon looks for matrices: not in the embeddings that every block has."""
        blocks = self.network.transformer_blocks
        return nn.ModuleList(m for block in blocks for m in (block.norm1.linear, block.attn1, block.ff))


class UNetBaseline(Baseline):
    """diffusers' `UNet2DModel` with class labels, attention at 8×8: Ho et al. (2020)."""

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64, 64),
    ) -> None:
        super().__init__()
        self.network = UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            block_out_channels=block_out_channels,
            layers_per_block=1,
            attention_head_dim=32,
            norm_num_groups=16,
            num_class_embeds=num_classes + 1,
        )
        nn.init.zeros_(self.network.conv_out.weight)
        nn.init.zeros_(self.network.conv_out.bias)


BASELINES = {"dit": DiTBaseline, "unet": UNetBaseline}


def load_denoiser(folder: Path) -> PetTransformer2DModel | Baseline:
    """Loads the denoiser from the output folder of a training, of whichever of the three kinds it is."""
    folder = folder / "transformer"
    class_name = json.loads((folder / "config.json").read_text())["_class_name"]
    kinds = {kind.__name__: kind for kind in (PetTransformer2DModel, *BASELINES.values())}
    return kinds[class_name].from_pretrained(folder)


def forward_flops(model: ModelMixin) -> int:
    """FLOPs of a forward pass of one 32×32 image.

    Not of the backward, where PyTorch counts depth-wise convolutions as if they were dense.
    """
    batch = torch.randn(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    # Of PyTorch's own softmax attention on a CPU nothing would be counted.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        model(*batch, return_dict=False)
    return counter.get_total_flops()


def main(name: str, arguments: list[str]) -> None:
    """Trains a baseline with these options of `train_pet.py`."""
    denoiser.PetTransformer2DModel = BASELINES[name]
    # The preconditioning by frequency is of our denoiser.
    args = train_pet.parse_args([*arguments, "--no-frequency_preconditioning"])
    train_pet.main(args, train_pet.TrainingState())


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BASELINES:
        sys.exit(f"train_baseline.py: the first argument must be one of {', '.join(BASELINES)}")
    main(sys.argv[1], sys.argv[2:])
