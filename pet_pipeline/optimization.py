"""The optimizer and the learning-rate schedule of training.

Muon (Jordan et al. 2024) orthogonalises the momentum of matrices; PyTorch's own takes matrices only, so AdamW
steps everything else beside it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the transformer blocks and AdamW for the rest, as one optimizer.

    One optimizer, because two break the loss scaling of fp16 and engines that expect one.

    Args:
        muon_parameters (`list` of 2D `nn.Parameter`): for `torch.optim.Muon`.
        adamw_parameters (`list` of `nn.Parameter`): for `torch.optim.AdamW`.
        muon_lr (`float`, defaults to 0.02), adamw_lr (`float`, defaults to 1e-3): learning rates.
        weight_decay (`float`, defaults to 0.0): decoupled weight decay of both.
        betas (`tuple`, defaults to `(0.9, 0.99)`), eps (`float`, defaults to 1e-8): of AdamW.
    """

    def __init__(
        self,
        muon_parameters: list[nn.Parameter],
        adamw_parameters: list[nn.Parameter],
        muon_lr: float = 0.02,
        adamw_lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        self.muon = torch.optim.Muon(muon_parameters, lr=muon_lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(
            adamw_parameters, lr=adamw_lr, weight_decay=weight_decay, betas=betas, eps=eps
        )
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})
        # `Optimizer.__init__` copies the groups: share the copies, so that one learning-rate schedule rules
        # them.
        self.muon.param_groups = self.param_groups[: len(self.muon.param_groups)]
        self.adamw.param_groups = self.param_groups[len(self.muon.param_groups) :]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Steps both optimizers; `closure` re-evaluates the loss, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both optimizers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`state_dict`] returned."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        # Loading replaces the groups of each.
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


def create_optimizer(
    model: nn.Module,
    loss: nn.Module,
    name: str = "muon",
    muon_learning_rate: float = 0.02,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Builds the optimizer over the parameters of the denoiser and of the loss.

    Args:
        model (`nn.Module`): the denoiser; the matrices in its `transformer_blocks` are Muon's.
        loss (`nn.Module`): the loss, whose learned weighting is trained beside it.
        name (`str`, defaults to `"muon"`): `"muon"` for [`MuonAdamW`], `"adamw"` for AdamW alone.
        muon_learning_rate (`float`, defaults to 0.02), learning_rate (`float`, defaults to 1e-3): for Muon
            and AdamW.
        weight_decay (`float`, defaults to 0.0), betas (`tuple`), eps (`float`): see [`MuonAdamW`].

    Raises:
        ValueError: if there is no such optimizer.
    """
    parameters = [p for module in (model, loss) for p in module.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps
        )
    if name != "muon":
        raise ValueError(f"There is no optimizer {name!r}; choose one of muon, adamw.")
    matrices = [p for p in model.transformer_blocks.parameters() if p.requires_grad and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    return MuonAdamW(matrices, rest, muon_learning_rate, learning_rate, weight_decay, betas, eps)


def learning_rate_factor(name: str, progress: float, step: int, warmup_steps: int) -> float:
    """Returns the factor on every learning rate: a linear warm-up by step, then a decay by progress.

    Args:
        name (`str`): `"constant"`; `"linear"` and `"cosine"` decay from the start; `"trapezoid"` is constant
            until 60 % and linear from there. All but `"constant"` are exactly 0 at progress 1.
        progress (`float`): how much of the training is done, by steps or by the clock, in [0, 1].
        step (`int`): optimizer steps done.
        warmup_steps (`int`): steps of warm-up.
    """
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    remaining = 1 - min(max(progress, 0.0), 1.0)
    decay = {
        "constant": 1.0,
        "linear": remaining,
        "cosine": math.sin(math.pi / 2 * remaining) ** 2,
        "trapezoid": min(1.0, remaining / 0.4),
    }[name]
    return warmup * decay
