"""PetTransformer2DModel: a class-conditional linear-attention transformer that denoises small images.

The model is an hourglass (Crowson et al. 2024): a residual encoder of fine tokens, a stack of blocks at
half their resolution, each a linear attention (Katharopoulos et al. 2020) and a gated feed-forward with a
depth-wise convolution (Shi 2023, "TransNeXt"), and a residual decoder, which also takes the output of the
encoder. The noise level and the class modulate all blocks (adaLN-zero, Peebles and Xie 2022). Without
`outer_layers` there is only the stack. With `decoder_layers`, a convolutional decoder works beside all this.
With `frequency_variances`, the network learns only what the best linear denoiser does not know.

This file travels inside every saved checkpoint: it imports PyTorch, diffusers and the standard library only.
"""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import (
    PatchEmbed,
    TimestepEmbedding,
    get_2d_sincos_pos_embed,
    get_timestep_embedding,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


# Arguments of the sizes. The defaults of the model are of none of them: folders of 0.1 rely on the defaults.
HOURGLASS = {"patch_size": 2, "outer_layers": 1, "decoder_layers": 0}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(num_layers=2, num_attention_heads=1, **HOURGLASS),
    "small": dict(num_layers=4, num_attention_heads=3, **HOURGLASS),
    "base": dict(num_layers=12, num_attention_heads=6, **HOURGLASS),
}

# Smallest and largest value of each argument. The installed package also limits the memory of a loaded model.
INTEGERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("sample_size", "in_channels", "num_classes", "patch_size"), (1, 1e9)),
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "decoder_channels"), (1, 1e9)),
    "num_layers": (1, 1000),
    **dict.fromkeys(("outer_layers", "decoder_layers", "augment_dim"), (0, 1000)),
}
NUMBERS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("feed_forward_ratio", "sigma_data", "interpolation_scale"), (1e-3, 1e3)),
    "dropout": (0, 0.999),
}

# Options that earlier versions had, and the value of each that means what all models are now.
REMOVED = {"attention_type": "linear", "long_skips": False}


class PetAttention(nn.Module):
    r"""Multi-head attention over a grid of tokens, linear in their number.

    Per head, with $\phi$ = ReLU and RMS-normalised keys (Katharopoulos et al. 2020, equation 5):
    $o_i = \phi(q_i)^T \sum_j \phi(k_j) v_j^T \, / \, \phi(q_i)^T \sum_j \phi(k_j)$. Queries are not
    normalised, because their length cancels. A 3×3 depth-wise convolution of the values is added to the
    output and restores the locality that linear attention lacks (Han et al. 2023, "FLatten Transformer"). The
    sums are kept in float32.
    """

    def __init__(self, dim: int, num_attention_heads: int, dropout: float = 0.0, flat: bool = False) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.conv_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=flat), nn.Dropout(dropout)])

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int, perturbed: bool = False
    ) -> torch.Tensor:
        """Attends over `hidden_states` of shape `(batch, height * width, dim)`; returns the same shape.

        If `perturbed` is true, each token attends only to itself; see [`PetTransformer2DModel.forward`].
        """
        value = self.to_v(hidden_states)  # (N, T, dim)
        local = grid_to_tokens(self.conv_v(tokens_to_grid(value, height, width)))
        if perturbed:
            return self.to_out[1](self.to_out[0](value + local))
        query, key, value = (
            x.unflatten(-1, (self.num_attention_heads, -1))  # (N, T, H, D)
            for x in (self.to_q(hidden_states), self.to_k(hidden_states), value)
        )
        key = F.rms_norm(key.float(), key.shape[-1:], eps=1e-6)  # Zhang and Sennrich 2019
        attended = linear_attention(query, key, value)
        return self.to_out[1](self.to_out[0](attended.flatten(2).to(local.dtype) + local))


def without_autocast(device_type: str) -> AbstractContextManager:
    """Keeps autocast from sending float32 matrix products back to 16 bits."""
    is_cast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if is_cast else nullcontext()


def linear_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """ReLU linear attention in float32 (Katharopoulos et al. 2020, equation 5), O(T·D²) instead of O(T²·D).

    Takes tensors of shape `(batch, tokens, heads, head_dim)` in any floating dtype; returns the same shape.
    """
    # In 16 bits, a sum over many tokens would lose its small terms.
    with without_autocast(query.device.type):
        query, key, value = F.relu(query.float()), F.relu(key.float()), value.float()
        # Means give the same ratio as sums, and stay in range for any number of tokens.
        state = torch.einsum("nthd,nthe->nhde", key, value) / key.shape[1]
        normaliser = torch.einsum("nthd,nhd->nth", query, key.mean(1)).unsqueeze(-1)
        return torch.einsum("nthd,nhde->nthe", query, state) / (normaliser + 1e-6)


class PetFeedForward(nn.Module):
    """Gated feed-forward with a 3×3 depth-wise convolution of its gate (Shi 2023, "TransNeXt").

    Its projections have no biases, which would cost CPUs a pass over memory each. In a `flat` model, they
    have biases, and the projections to values and gates are one.
    """

    def __init__(self, dim: int, inner_dim: int, dropout: float = 0.0, flat: bool = False) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * inner_dim if flat else inner_dim, bias=flat)
        self.proj_gate = None if flat else nn.Linear(dim, inner_dim, bias=False)
        self.conv = nn.Conv2d(inner_dim, inner_dim, 3, padding=1, groups=inner_dim)
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(inner_dim, dim, bias=flat)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Maps `hidden_states` of shape `(batch, height * width, dim)` to the same shape."""
        if self.proj_gate is None:
            hidden_states, gate = self.proj_in(hidden_states).chunk(2, dim=-1)
        else:
            hidden_states, gate = self.proj_in(hidden_states), self.proj_gate(hidden_states)
        gate = grid_to_tokens(self.conv(tokens_to_grid(gate, height, width)))
        return self.proj_out(self.dropout(hidden_states * F.silu(gate)))


class PetTransformerBlock(nn.Module):
    """Attention, unless there are no heads, and feed-forward, modulated by the conditioning (adaLN-zero).

    All blocks share the matrix of their modulation, and each has a bias of its own (Chen et al. 2023,
    "PixArt-α", section 2.3). In a `flat` model, without encoder and decoder, each has its own matrix instead.
    """

    def __init__(
        self,
        dim: int,
        feed_forward_dim: int,
        num_attention_heads: int = 0,
        dropout: float = 0.0,
        flat: bool = False,
    ) -> None:
        super().__init__()
        modulation_dim = (6 if num_attention_heads else 3) * dim
        self.modulation = nn.Linear(dim, modulation_dim) if flat else None
        self.modulation_bias = None if flat else nn.Parameter(torch.zeros(modulation_dim))
        self.norm1, self.attn = None, None
        if num_attention_heads:
            self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.attn = PetAttention(dim, num_attention_heads, dropout, flat)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = PetFeedForward(dim, feed_forward_dim, dropout, flat)

    def forward(
        self,
        hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        height: int,
        width: int,
        perturbed: bool = False,
    ) -> torch.Tensor:
        """Maps `(batch, height * width, dim)` to the same shape.

        `modulation` is what the shared matrix gives, `(batch, 6 * dim)`, of which a block without heads takes
        the second half. A block of a flat model takes the conditioning `(batch, dim)`.
        """
        if self.modulation is not None:
            modulation = self.modulation(modulation)
        if self.modulation_bias is not None:
            # Autocast would leave the bias, and with it all that is modulated, in float32.
            bias = self.modulation_bias.to(modulation.dtype)
            modulation = modulation[:, -len(bias) :] + bias
        *attn_parts, shift, scale, gate = modulation.unsqueeze(1).split(hidden_states.shape[-1], dim=-1)
        if self.norm1 is not None and self.attn is not None:
            shift_attn, scale_attn, gate_attn = attn_parts
            attn_input = torch.addcmul(shift_attn, self.norm1(hidden_states), 1 + scale_attn)
            attended = self.attn(attn_input, height, width, perturbed)
            hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
        ff_input = torch.addcmul(shift, self.norm2(hidden_states), 1 + scale)
        return torch.addcmul(hidden_states, gate, self.ff(ff_input, height, width))


class PetDecoder(nn.Module):
    """Residual convolutional decoder from tokens to pixels, beside the model's direct linear path.

    With an even patch size it works at half the resolution of the image, as full-resolution convolutions
    would cost as much as the whole trunk. A skip connection brings it the noisy image.
    """

    def __init__(self, dim: int, in_channels: int, patch_size: int, channels: int, num_layers: int) -> None:
        super().__init__()
        self.pixel_factor = 2 if patch_size % 2 == 0 else 1
        self.token_factor = patch_size // self.pixel_factor
        self.proj_in = nn.Linear(dim, channels * self.token_factor**2)
        self.conv_skip = nn.Conv2d(in_channels * self.pixel_factor**2, channels, 3, padding=1)
        # Groups of at least 8 channels, at most 32 of them.
        groups = next(g for g in range(min(32, max(1, channels // 8)), 0, -1) if channels % g == 0)
        block = {"in_channels": channels, "temb_channels": None, "groups": groups, "eps": 1e-5}
        self.blocks = nn.ModuleList([ResnetBlock2D(**block) for _ in range(num_layers)])
        self.norm_out = nn.GroupNorm(groups, channels)
        self.conv_out = nn.Conv2d(channels, in_channels * self.pixel_factor**2, 3, padding=1)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Decodes `(batch, height * width, dim)` tokens and the noisy image to an image of the same shape."""
        hidden_states = tokens_to_grid(self.proj_in(tokens), height, width)
        hidden_states = F.pixel_shuffle(hidden_states, self.token_factor)
        hidden_states = hidden_states + self.conv_skip(F.pixel_unshuffle(image, self.pixel_factor))
        hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            hidden_states = block(hidden_states, None)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hidden_states))), self.pixel_factor)


def tokens_to_grid(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(N, height * width, C)` to `(N, C, height, width)`, a view with channels last in memory."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def grid_to_tokens(grid: torch.Tensor) -> torch.Tensor:
    """The inverse of [`tokens_to_grid`]."""
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def dct_matrix(channels: int, patch_size: int, device: str | torch.device | None = None) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) of a patch over channels, rows and columns, `(K, K)` in float32.

    K is `channels * patch_size**2`. The transform of three channels separates brightness from colour.
    """
    matrices = []
    for size in (channels, patch_size):
        index = torch.arange(size, device=device, dtype=torch.float32)
        matrix = torch.cos(math.pi / size * (index + 0.5) * index.unsqueeze(1)) * math.sqrt(2 / size)
        matrix[0] /= math.sqrt(2)
        matrices.append(matrix)
    over_channels, over_pixels = matrices
    return torch.kron(over_channels, torch.kron(over_pixels, over_pixels))


def transform_patches(images: torch.Tensor, matrix: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Coefficients of every patch, `(N, K, rows, columns)` in float32, for a matrix of [`dct_matrix`]."""
    with without_autocast(images.device.type):
        return torch.einsum("kc,nchw->nkhw", matrix, F.pixel_unshuffle(images.float(), patch_size))


def restore_patches(coefficients: torch.Tensor, matrix: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images of shape `(N, channels, height, width)` from what [`transform_patches`] returned."""
    with without_autocast(coefficients.device.type):
        return F.pixel_shuffle(torch.einsum("kc,nkhw->nchw", matrix, coefficients), patch_size)


def check_config(config: FrozenDict) -> None:
    """Raises `ValueError` if an argument of [`PetTransformer2DModel`] is out of range, and names it."""
    for ranges, kind, kind_name in ((INTEGERS, int, "an integer"), (NUMBERS, (int, float), "a number")):
        for name, (low, high) in ranges.items():
            value = config[name]
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"`{name}` must be {kind_name} in [{low:g}, {high:g}], but is {value!r}.")
    prediction_type = config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"`prediction_type` must be epsilon or v_prediction, but is {prediction_type!r}.")
    if config.sample_size % (config.patch_size * (2 if config.outer_layers else 1)):
        raise ValueError(
            "`patch_size`, or with `outer_layers` twice the patch size, must divide `sample_size`, but "
            f"`patch_size` is {config.patch_size} and `sample_size` is {config.sample_size}."
        )
    dim = config.num_attention_heads * config.attention_head_dim
    if dim % 4:
        raise ValueError(
            "`num_attention_heads` × `attention_head_dim` must be a multiple of 4 for 2D sinusoidal "
            f"positions, but is {dim}."
        )
    variances, number = config.frequency_variances, config.in_channels * config.patch_size**2
    if variances is not None and not (
        isinstance(variances, (list, tuple))
        and len(variances) == number
        and all(type(value) in (int, float) and 0 <= value <= 1e6 for value in variances)
    ):
        raise ValueError(f"`frequency_variances` must be {number} numbers in [0, 1e6].")


class PetTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""Class-conditional denoiser: the network $F_\theta$ of EDM (Karras et al. 2022, equation 7).

    It is called with the preconditioned image $c_{in}(\sigma) x$ and the noise level $c_{noise} = \ln(\sigma)
    / 4$, as [`AdaptiveEDMScheduler`], `EDMEulerScheduler` and `EDMDPMSolverMultistepScheduler` supply them.
    Class `num_classes` is the null class of classifier-free guidance (Ho and Salimans 2022).

    Args:
        sample_size (`int`, defaults to 32): height and width of the training images in pixels. Images of
            other multiples of the patch size (twice the patch size with `outer_layers`) work too: their
            positions span the range of the training grid.
        in_channels (`int`, defaults to 3): channels of the noisy image and of the prediction.
        num_classes (`int`, defaults to 2): classes, the null class not counted.
        patch_size (`int`, defaults to 4): pixels per token side. It must divide `sample_size`, and with
            `outer_layers` twice the patch size must.
        outer_layers (`int`, defaults to 0): blocks of the encoder, and as many of the decoder.
        num_layers (`int`, defaults to 8): transformer blocks.
        num_attention_heads (`int`, defaults to 3): attention heads.
        attention_head_dim (`int`, defaults to 64): channels per head, so that tokens have heads × head_dim.
        feed_forward_ratio (`float`, defaults to 2.5): width of the feed-forward over that of the tokens.
        decoder_channels (`int`, defaults to 32): width of the convolutional decoder.
        decoder_layers (`int`, defaults to 1): residual blocks of that decoder; with 0 there is none.
        dropout (`float`, defaults to 0.0): dropout inside the blocks.
        frequency_variances (`list[float]`, *optional*): mean square of each cosine coefficient of the data's
            patches, `in_channels * patch_size**2` values that the training measures. The layers then see
            every frequency at unit variance, and their scaled output is added to the best estimate for
            Gaussian data: the preconditioning of EDM, with one variance for each frequency.
        sigma_data (`float`, defaults to 0.5): `sigma_data` of the scheduler; used by `frequency_variances`.
        prediction_type (`str`, defaults to `"epsilon"`): that of the scheduler; used by the same.
        interpolation_scale (`float`, defaults to 1.0): divisor of the positions. If training continues at
            another image size, the ratio of the sizes keeps the positions in the range that the model knows.
        augment_dim (`int`, defaults to 0): numbers that describe how a training image was augmented.

    Raises:
        ValueError: if an argument is out of range; the message names it.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["PetTransformerBlock", "PetDecoder"]
    _repeated_blocks = ["PetTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "class_embedding"]
    _auto_class = "AutoModel"  # the class of diffusers that loads a saved model with its source file
    takes_class_weights = True  # as `class_labels`

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 2,
        patch_size: int = 4,
        outer_layers: int = 0,
        num_layers: int = 8,
        num_attention_heads: int = 3,
        attention_head_dim: int = 64,
        feed_forward_ratio: float = 2.5,
        decoder_channels: int = 32,
        decoder_layers: int = 1,
        dropout: float = 0.0,
        frequency_variances: list[float] | None = None,
        sigma_data: float = 0.5,
        prediction_type: str = "epsilon",
        interpolation_scale: float = 1.0,
        augment_dim: int = 0,
    ) -> None:
        super().__init__()
        check_config(self.config)
        inner_dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False

        # Positions are added in `forward`. A buffer would be rounded by `.to(torch.bfloat16)`, but not by
        # loading in that precision.
        self.patch_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, embed_dim=inner_dim, pos_embed_type=None
        )
        self.time_embedding = TimestepEmbedding(256, inner_dim)
        self.class_embedding = nn.Embedding(num_classes + 1, inner_dim)
        self.augment_embedding = nn.Linear(augment_dim, inner_dim, bias=False) if augment_dim else None

        def blocks(number: int, num_heads: int) -> nn.ModuleList:
            options = (inner_dim, int(inner_dim * feed_forward_ratio), num_heads, dropout, not outer_layers)
            return nn.ModuleList([PetTransformerBlock(*options) for _ in range(number)])

        self.encoder_blocks = blocks(outer_layers, 0)
        self.transformer_blocks = blocks(num_layers, num_attention_heads)
        self.decoder_blocks = blocks(outer_layers, 0)
        if outer_layers:
            self.modulation = nn.Linear(inner_dim, 6 * inner_dim, bias=False)
            self.merge = nn.Linear(4 * inner_dim, inner_dim)
            self.split = nn.Linear(inner_dim, 4 * inner_dim)
        self.norm_out = nn.LayerNorm(inner_dim, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(inner_dim, 2 * inner_dim)
        self.proj_out = nn.Linear(inner_dim, patch_size**2 * in_channels)
        self.decoder = None
        if decoder_layers:
            self.decoder = PetDecoder(inner_dim, in_channels, patch_size, decoder_channels, decoder_layers)
        self.initialize_weights()

    @classmethod
    def from_preset(cls, preset: str, **kwargs: Any) -> "PetTransformer2DModel":
        """Builds an untrained model of a named size, or raises `ValueError` if there is no such preset.

        The presets are `"tiny"` for trials, `"small"` for two CPU cores and `"base"` for a GPU. `kwargs`
        override their arguments.
        """
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[preset], **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Loads a saved model from safetensors; see [`ModelMixin.from_pretrained`].

        Raises:
            ValueError: if the file lacks weights, which would otherwise be random.
        """
        kwargs.setdefault("use_safetensors", True)
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **kwargs
        )
        missing = info["missing_keys"]
        if missing:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} lack {len(missing)} tensors, among "
                f"them {min(missing)}."
            )
        return (model, info) if return_info else model

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)
        if not isinstance(config, dict):  # a string would be taken for a repository to ask for another one
            raise ValueError(f"{str(json_file)!r} must hold a JSON object.")
        config.pop("auto_map", None)  # for `AutoModel`; written anew when the model is saved
        for name, value in REMOVED.items():
            if config.pop(name, value) != value:
                raise ValueError(
                    f"{str(json_file)!r} sets `{name}`, which only earlier versions know: load the folder "
                    "with its own code, by `DiffusionPipeline.from_pretrained` and `trust_remote_code=True`."
                )
        return config

    def initialize_weights(self) -> None:
        """Initialises all weights: Xavier for matrices, adaLN-zero, zero for both paths to the pixels."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        # Classes that start too close are distinguished late. The null class starts between them.
        nn.init.normal_(self.class_embedding.weight, std=0.5)
        nn.init.zeros_(self.class_embedding.weight[-1])
        for name, parameter in self.named_parameters():
            if re.search(r"modulation|^proj_out|augment|decoder.*(conv2|conv_out)\.", name):
                nn.init.zeros_(parameter)

    def add_positions(self, tokens: torch.Tensor, height: int, width: int, pixels: int) -> torch.Tensor:
        """Adds 2D sinusoidal positions, in the range of the training grid's, to tokens `pixels` wide."""
        positions = get_2d_sincos_pos_embed(
            tokens.shape[-1],
            (height, width),
            interpolation_scale=self.config.interpolation_scale,
            base_size=self.config.sample_size // pixels,
            device=tokens.device,
        )
        return tokens + positions.to(tokens.dtype)

    def run_block(self, block: nn.Module, *inputs: Any) -> torch.Tensor:
        """Calls a block, and keeps no activations inside it if gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def precondition(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""Scales of each frequency: EDM's preconditioning (Karras et al. 2022, equation 7) for its variance.

        With $\lambda$ of `frequency_variances` and $\sigma = e^{4 c_{noise}}$, the layers are given
        $x / \sqrt{\lambda + \sigma^2}$, and the denoised image is the best linear estimate
        $x \lambda / (\lambda + \sigma^2)$ (Wiener 1949) plus their output times
        $\sigma \sqrt{\lambda / (\lambda + \sigma^2)}$, the error of that estimate on Gaussian data. The
        scales apply to $c_{in} x$ and $F$ of EDM; if all $\lambda = \sigma_d^2$, they change nothing.

        Takes $c_{noise}$ of shape `(batch,)`. Returns the scales of the image as the input of the layers, of
        the image as a part of $F$, and of the output of the layers, `(batch, frequencies, 1, 1)`, float32.
        """
        variances = torch.tensor(self.config.frequency_variances, dtype=torch.float32, device=timestep.device)
        # A frequency that does not vary in the data is known to a fraction of a grey level, not exactly.
        variances = variances.clamp(min=1e-6).reshape(-1, 1, 1)
        sigmas = (4 * timestep.float()).exp().reshape(-1, 1, 1, 1)
        sigma_data = self.config.sigma_data
        sign = 1 if self.config.prediction_type == "epsilon" else -1
        totals = variances + sigmas**2
        scale_in = ((sigmas**2 + sigma_data**2) / totals).sqrt()
        scale_skip = sign * sigmas * (variances - sigma_data**2) / (sigma_data * totals)
        return scale_in, scale_skip, scale_in * variances.sqrt() / sigma_data

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        perturbed_layers: Sequence[int] | None = None,
        feature_layer: int | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""Predicts the EDM network output $F_\theta$.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): preconditioned
                noisy images $c_{in} x$; height and width must be multiples of the patch size, or of twice the
                patch size with `outer_layers`.
            timestep (`torch.Tensor` of shape `(batch,)` or scalar): $c_{noise} = \ln(\sigma) / 4$, best in
                float32.
            class_labels (`torch.Tensor` of shape `(batch,)` or scalar, *optional*): integers in
                [0, num_classes]; `num_classes`, or `None`, is the null class. A floating tensor of shape
                `(batch, num_classes + 1)` gives weights of the embeddings of all these classes.
            return_dict (`bool`, defaults to `True`): return a `Transformer2DModelOutput` instead of a tuple.
            perturbed_layers (`list[int]`, *optional*): indices of blocks whose attention map is replaced by
                the identity, for perturbed-attention guidance (Ahn et al. 2024, section 4).
            feature_layer (`int`, *optional*): index of a block whose output is returned as `sample`, of shape
                `(batch, tokens, dim)`. What follows it is not evaluated.
            augment_labels (`torch.Tensor` of shape `(batch, augment_dim)`, *optional*): how the training
                images were augmented; zeros, or `None`, mean that they were not.

        Returns:
            `Transformer2DModelOutput` or `tuple`: `sample` of shape `(batch, in_channels, height, width)`.

        Raises:
            ValueError: if the image has another number of channels or is not a whole number of patches, or a
                layer does not exist.
        """
        batch, channels, image_height, image_width = hidden_states.shape
        patch_size = self.config.patch_size
        multiple = patch_size * (2 if self.config.outer_layers else 1)
        if channels != self.config.in_channels or image_height % multiple or image_width % multiple:
            raise ValueError(
                f"`hidden_states` must have {self.config.in_channels} channels, and a height and width that "
                f"{multiple} divides, but is of shape {tuple(hidden_states.shape)}."
            )
        perturbed_layers, last = perturbed_layers or (), len(self.transformer_blocks) - 1
        for layer in (*perturbed_layers, *([] if feature_layer is None else [feature_layer])):
            if not 0 <= layer <= last:
                raise ValueError(
                    f"`perturbed_layers` and `feature_layer` must be in [0, {last}], but there is {layer}."
                )
        height, width = image_height // patch_size, image_width // patch_size
        timestep = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1).expand(batch)
        if self.config.frequency_variances is not None:
            dct = dct_matrix(channels, patch_size, hidden_states.device)
            coefficients = transform_patches(hidden_states, dct, patch_size)  # (N, K, rows, columns)
            scale_in, scale_skip, scale_out = self.precondition(timestep)
            hidden_states = restore_patches(coefficients * scale_in, dct, patch_size).to(hidden_states.dtype)
        image = hidden_states

        # c_noise spans about [-1.6, 1.1], which 0.25 to 25 radians per unit resolve without aliasing.
        encoded = get_timestep_embedding(timestep, 256, downscale_freq_shift=0, scale=25.0, max_period=100)
        conditioning = self.time_embedding(encoded.to(hidden_states.dtype))
        class_labels = self.config.num_classes if class_labels is None else class_labels
        labels = torch.as_tensor(class_labels, device=hidden_states.device)
        is_mixed = labels.is_floating_point()
        ids = torch.arange(self.config.num_classes + 1, device=labels.device) if is_mixed else labels
        embedded = self.class_embedding(ids.reshape(-1)).to(conditioning)
        embedded = labels.to(conditioning) @ embedded if is_mixed else embedded.expand(batch, -1)
        if augment_labels is not None:
            if self.augment_embedding is None:
                raise ValueError("`augment_labels` are for models with an `augment_dim`.")
            embedded = embedded + self.augment_embedding(augment_labels.to(conditioning))
        conditioning = F.silu(conditioning + embedded)  # (N, D)

        hidden_states = self.add_positions(self.patch_embed(hidden_states), height, width, patch_size)
        modulation, grid = conditioning, (height, width)
        if self.config.outer_layers:
            modulation, grid = self.modulation(conditioning), (height // 2, width // 2)
            for block in self.encoder_blocks:
                hidden_states = self.run_block(block, hidden_states, modulation, height, width)
            skip_states = hidden_states
            hidden_states = F.pixel_unshuffle(tokens_to_grid(hidden_states, height, width), 2)
            hidden_states = self.add_positions(self.merge(grid_to_tokens(hidden_states)), *grid, multiple)
        for index, block in enumerate(self.transformer_blocks):
            hidden_states = self.run_block(block, hidden_states, modulation, *grid, index in perturbed_layers)
            if index == feature_layer:
                return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)
        if self.config.outer_layers:
            hidden_states = F.pixel_shuffle(tokens_to_grid(self.split(hidden_states), *grid), 2)
            hidden_states = grid_to_tokens(hidden_states) + skip_states.to(hidden_states.device)
            for block in self.decoder_blocks:
                hidden_states = self.run_block(block, hidden_states, modulation, height, width)

        # `.to`: a device map may have put these tensors on several devices.
        hidden_states = self.norm_out(hidden_states)
        modulation = self.modulation_out(conditioning).to(hidden_states.device)
        shift, scale = modulation.unsqueeze(1).chunk(2, dim=-1)
        hidden_states = hidden_states * (1 + scale) + shift
        sample = F.pixel_shuffle(tokens_to_grid(self.proj_out(hidden_states), height, width), patch_size)
        if self.decoder is not None:
            sample = sample + self.decoder(hidden_states, image, height, width).to(sample.device)
        if self.config.frequency_variances is not None:
            refinement = transform_patches(sample.to(image.device), dct, patch_size)
            output = restore_patches(coefficients * scale_skip + refinement * scale_out, dct, patch_size)
            sample = output.to(sample.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
