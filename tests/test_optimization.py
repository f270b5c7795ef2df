import copy
import math

import pytest
import torch
from conftest import random_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import train_pet
from pet_pipeline import BalancedAdaptiveLoss
from pet_pipeline.training.losses import DenoiserWithLoss
from pet_pipeline.training.optimization import (
    BatchedMuon,
    MuonAdamW,
    create_optimizer,
    learning_rate_factor,
    orthogonalize,
)


def options(**values):
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return train_pet.parse_args(["--max_train_steps", "1", *words])


def test_every_parameter_has_one_optimizer():
    model, loss = random_model(), BalancedAdaptiveLoss()
    settings = {"muon_learning_rate": 0.5, "learning_rate": 0.25, "weight_decay": 0.125}
    settings |= {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1e-5}
    optimizers = {
        name: create_optimizer(options(optimizer=name, **settings), model, loss) for name in ("adamw", "muon")
    }
    for optimizer in optimizers.values():
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(stepped) == len({id(p) for p in stepped})
        assert {id(p) for p in stepped} == {id(p) for module in (model, loss) for p in module.parameters()}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.125}
    both = optimizers["muon"]
    blocks = [*model.encoder_blocks, *model.transformer_blocks, *model.decoder_blocks]
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    assert len(matrices) == 2 * 7 + 2 * 3
    assert {id(p) for p in both.muon.param_groups[0]["params"]} == {id(p) for p in matrices}
    assert [group["lr"] for group in both.muon.param_groups] == [0.5]
    for adamw in (both.adamw, optimizers["adamw"]):
        (group,) = adamw.param_groups
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-5)


def test_muon_without_matrices_is_one_error():
    with pytest.raises(ValueError, match="Muon finds no matrix to step.* Use --optimizer adamw"):
        create_optimizer(options(optimizer="muon"), torch.nn.Linear(2, 2), BalancedAdaptiveLoss())


def test_equals_its_two_parts_and_survives_saving():
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 6), (5,))]

    def step(optimizers, matrix, vector, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in (matrix, vector):
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()

    matrix, vector = parameters()
    joint = MuonAdamW([matrix], [vector], muon_lr=0.02, adamw_lr=1e-3)
    expected_matrix, expected_vector = parameters()
    parts = [
        BatchedMuon([expected_matrix], lr=0.02, weight_decay=0.0),
        torch.optim.AdamW([expected_vector], lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99)),
    ]
    for seed in range(3):
        for group in [*joint.param_groups, *(g for part in parts for g in part.param_groups)]:
            group["lr"] *= 0.5
        step([joint], matrix, vector, seed)
        step(parts, expected_matrix, expected_vector, seed)
    assert torch.equal(matrix, expected_matrix) and torch.equal(vector, expected_vector)

    copies = [torch.nn.Parameter(p.detach().clone()) for p in (matrix, vector)]
    restored = MuonAdamW([copies[0]], [copies[1]])
    restored.load_state_dict(copy.deepcopy(joint.state_dict()))
    for group in [*joint.param_groups, *restored.param_groups]:
        group["lr"] *= 0.5
    step([joint], matrix, vector, 7)
    step([restored], *copies, 7)
    assert torch.equal(matrix, copies[0]) and torch.equal(vector, copies[1])


@pytest.mark.parametrize("nesterov", [True, False])
def test_batched_muon_steps_as_muon_does(nesterov):
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 6), (9, 4), (6, 6), (4, 9))
    ours, theirs = (
        [
            torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
            for shape in shapes
        ]
        for _ in range(2)
    )
    optimizers = [
        cls(parameters, lr=0.1, weight_decay=0.2, nesterov=nesterov)
        for cls, parameters in ((BatchedMuon, ours), (torch.optim.Muon, theirs))
    ]
    start = [p.detach().clone() for p in ours]
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - before).norm() > 0.1
        # PyTorch's rounds to bfloat16.
        assert (p - q).norm() < 0.02 * (p - before).norm()
    state, expected = (optimizer.state_dict() for optimizer in optimizers)
    assert state["state"].keys() == expected["state"].keys()
    assert state["param_groups"] == expected["param_groups"]
    with pytest.raises(ValueError, match="adjust_lr_fn"):
        BatchedMuon(ours, adjust_lr_fn="match_rms_adamw")


def test_orthogonalize_brings_singular_values_near_one():
    for shape in ((3, 8, 5), (3, 5, 8)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        result = orthogonalize(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5 and values.max() < 1.3
        # The singular vectors stay.
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        core = u.mT @ result @ v.mT
        off_diagonal = core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))
        assert off_diagonal.abs().max() < 1e-4


def test_learning_rate_factor():
    for name in ("linear", "cosine", "trapezoid"):
        assert learning_rate_factor(name, 1.0, 1000, 10) == 0
        values = [learning_rate_factor(name, i / 100, 1000, 10) for i in range(101)]
        assert values == sorted(values, reverse=True) and values[0] == 1
    assert learning_rate_factor("cosine", 0.5, 1000, 0) == pytest.approx(0.5)
    assert learning_rate_factor("linear", 0.25, 1000, 0) == 0.75
    assert learning_rate_factor("trapezoid", 0.8, 1000, 0) == pytest.approx(0.5)
    assert learning_rate_factor("constant", 1.0, 1000, 0) == 1
    warmup = [learning_rate_factor("constant", 0.0, step, 4) for step in range(6)]
    assert warmup == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert math.isfinite(learning_rate_factor("cosine", 2.0, 0, 0))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_fully_sharded_parameters_step_as_plain_ones_do(name):
    # One process only: that the training module and its optimizer run sharded, not that several agree.
    batch = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = []
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for is_sharded in (False, True):
            module = DenoiserWithLoss(random_model(), BalancedAdaptiveLoss())
            if is_sharded:
                mesh = init_device_mesh("cpu", (1,))
                for block in module.transformer.transformer_blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(module, mesh=mesh)
            optimizer = create_optimizer(options(optimizer=name), module.transformer, module.loss_function)
            for _ in range(2):
                inputs = batch[0], torch.zeros(4), torch.tensor([0, 1, 2, 0]), batch[1], torch.ones(4)
                module(*inputs).loss.backward()
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            weights.append([getattr(p, "full_tensor", p.detach)() for p in module.parameters()])
    finally:
        distributed.destroy_process_group()
    for plain, sharded in zip(*weights, strict=True):
        torch.testing.assert_close(sharded, plain, rtol=1e-4, atol=1e-5)
