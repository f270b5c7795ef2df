"""The optimizer and the learning-rate schedule of training.

Muon (Jordan et al. 2024) orthogonalises the momentum of matrices; it takes matrices only, so AdamW steps
everything else beside it.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


# Where Muon finds the matrices of a denoiser.
MATRIX_BLOCKS = ("encoder_blocks", "transformer_blocks", "decoder_blocks")


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` that steps all matrices of one shape together, and computes in float32 on CPUs.

    `torch.optim.Muon` orthogonalises one matrix after the other in bfloat16. On a GPU, this launches a kernel
    for each small product, and many CPUs are slower in bfloat16. The arguments and the state are those of
    `torch.optim.Muon`. Learning rates are adjusted to the shapes of the matrices in its default way only.

    Raises:
        ValueError: if `adjust_lr_fn` is not the default.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if any(group["adjust_lr_fn"] not in (None, "original") for group in self.param_groups):
            raise ValueError("`adjust_lr_fn` must be None or 'original'.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps every matrix that has a gradient; `closure` re-evaluates the loss, once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape, parameter.device, parameter.dtype].append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group)
        return loss

    def _step_together(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Steps matrices of one shape, which have gradients."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch.stack(momenta)
        if group["nesterov"]:
            updates = torch.stack(gradients).lerp(updates, group["momentum"])
        # Where FSDP shards the matrices, every process gathers them whole, and keeps its part of the result.
        whole = updates.full_tensor() if isinstance(updates, DTensor) else updates
        orthogonal = orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        steps = [
            distribute_tensor(step, p.device_mesh, p.placements, src_data_rank=None)
            if isinstance(p, DTensor)
            else step
            for step, p in zip(orthogonal.to(parameters[0].dtype).unbind(), parameters)
        ]
        rows, columns = parameters[0].shape
        rate = group["lr"] * math.sqrt(max(1, rows / columns))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-rate)


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """Moves the singular values of matrices near 1 by Newton-Schulz iterations (Jordan et al. 2024).

    `matrices` has the shape `(N, rows, columns)`. Each iteration applies an odd polynomial of degree 5 with
    the given coefficients to the singular values. A norm below `eps` counts as `eps`. The result is in
    bfloat16 on GPUs and in float32 elsewhere.
    """
    a, b, c = coefficients
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the transformer blocks and AdamW for the rest, as one optimizer.

    Both are one optimizer, because the loss scaling of fp16 and some engines expect a single one. The weight
    decay is decoupled and of both; `betas` and `eps` are of AdamW.
    """

    def __init__(
        self,
        muon_parameters: list[nn.Parameter],
        adamw_parameters: list[nn.Parameter],
        muon_lr: float = 0.02,
        adamw_lr: float = 3e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        self.muon = BatchedMuon(muon_parameters, lr=muon_lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(
            adamw_parameters, lr=adamw_lr, weight_decay=weight_decay, betas=betas, eps=eps
        )
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Lets both optimizers work on the groups and the state of this one, which checkpoints keep."""
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps both optimizers; `closure` re-evaluates the loss, once."""
        loss = self.muon.step(closure)
        self.adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()  # loading replaces the groups and the state


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable matrices in the lists of `MATRIX_BLOCKS` that a denoiser has."""
    blocks = [getattr(model, name) for name in MATRIX_BLOCKS if hasattr(model, name)]
    return [p for part in blocks for p in part.parameters() if p.requires_grad and p.ndim == 2]


def create_optimizer(
    args: argparse.Namespace, model: nn.Module, loss: nn.Module
) -> MuonAdamW | torch.optim.AdamW:
    """Creates the optimizer that the options of `train_pet.py` describe.

    Muon steps the [`block_matrices`] of the denoiser. AdamW steps its other parameters, the shared modulation
    among them, and the learned weighting of the loss.

    Raises:
        ValueError: if Muon is asked for and finds no matrix.
    """
    parameters = [p for module in (model, loss) for p in module.parameters() if p.requires_grad]
    adamw_options = {
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.learning_rate, **adamw_options)
    matrices = block_matrices(model)
    if not matrices:
        raise ValueError(
            f"Muon finds no matrix to step, since the model has none of {', '.join(MATRIX_BLOCKS)}. Use "
            "--optimizer adamw."
        )
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    return MuonAdamW(matrices, rest, args.muon_learning_rate, args.learning_rate, **adamw_options)


def learning_rate_factor(name: str, progress: float, step: int, warmup_steps: int) -> float:
    """Returns the factor on every learning rate: a linear warm-up by step, then a decay by progress.

    `progress` is the fraction of the training that is done, by steps or by the clock. `"trapezoid"` is
    constant until 60 %. All schedules but `"constant"` are exactly 0 at progress 1.
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
