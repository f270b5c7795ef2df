import json

import pytest
import torch
from conftest import FLAT, TINY, random_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pet_pipeline import AdaptiveEDMScheduler, PetTransformer2DModel
from pet_pipeline.training.denoiser import frequency_variances
from pet_pipeline.transformer_pet import (
    PetAttention,
    dct_matrix,
    linear_attention,
    restore_patches,
    transform_patches,
)


# Of 2×2 patches of three channels, from far above the variance 0.25 that EDM assumes to none at all.
VARIANCES = [*torch.logspace(1, -5, 11).tolist(), 0.0]


@pytest.fixture(params=[{}, FLAT], ids=["hourglass", "flat"])
def model(request) -> PetTransformer2DModel:
    """Both kinds: that of the presets, and that of the bundled model."""
    return random_model(**request.param)


def test_a_perturbed_layer_sees_only_what_is_near():
    model = random_model(num_layers=1, outer_layers=0, patch_size=1)
    images = torch.randn(1, 3, 8, 8)
    other = images.clone()
    other[..., 0, 0] += 1
    for perturbed_layers, sees_all in (([], True), ([0], False)):
        change = (
            (model(images, 0.0, perturbed_layers=perturbed_layers).sample)
            - (model(other, 0.0, perturbed_layers=perturbed_layers).sample)
        ).abs()
        # Two convolutions of 3×3 reach two tokens far.
        assert change[..., :3, :3].amin() > 0
        assert (change[..., 3:, :].amin() > 0) == (change[..., :, 3:].amin() > 0) == sees_all
        assert sees_all or change[..., 3:, :].amax() == change[..., :, 3:].amax() == 0


def test_a_lone_token_attends_to_itself_in_any_case():
    layer = PetAttention(16, 2)
    for projection in (layer.to_q, layer.to_k):
        projection.weight.data.abs_()  # linear attention of a token without positive features is zero
    token = torch.rand(3, 1, 16)
    torch.testing.assert_close(layer(token, 1, 1, perturbed=True), layer(token, 1, 1), rtol=1e-4, atol=1e-5)


def test_layers_that_do_not_exist_are_refused(model):
    for layers in ([2], [-1], [0, 5]):
        with pytest.raises(
            ValueError, match="`perturbed_layers` and `feature_layer` must be in .0, 1., but there is"
        ):
            model(torch.randn(1, 3, 8, 8), 0.0, perturbed_layers=layers)


def test_presets_are_of_the_stated_size():
    with torch.device("meta"):
        tiny, small, base = (PetTransformer2DModel.from_preset(name) for name in ("tiny", "small", "base"))
    assert tiny.num_parameters() <= 1e6
    assert 2e6 <= small.num_parameters() <= 6e6
    assert 20e6 <= base.num_parameters() <= 28e6
    with pytest.raises(ValueError, match="tiny, small, base"):
        PetTransformer2DModel.from_preset("huge")


def test_linear_attention_equals_its_quadratic_formula():
    query, key, value = torch.randn(3, 2, 20, 3, 8).unbind(0)
    query[..., 0], key[..., 0] = 1.0, 1.0  # no token may be without any positive feature
    scores = torch.einsum("nthd,nshd->nhts", query.relu(), key.relu())
    expected = torch.einsum("nhts,nshd->nthd", scores / scores.sum(-1, keepdim=True), value)
    torch.testing.assert_close(linear_attention(query, key, value), expected, rtol=1e-4, atol=1e-4)
    # The length of a query cancels.
    torch.testing.assert_close(linear_attention(5 * query, key, value), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "image_size"),
    [
        ({}, 8),
        ({"sample_size": 32}, 32),
        ({"sample_size": 64, "patch_size": 8}, 64),
        ({"sample_size": 6, "patch_size": 3, "in_channels": 1, "num_classes": 100}, 6),
        ({"in_channels": 4, "num_classes": 1}, 8),
        ({"patch_size": 1, "dropout": 0.1}, 8),
        ({"outer_layers": 3, "num_layers": 1}, 8),
        ({"outer_layers": 0}, 8),
        ({}, 16),  # trained at 8, used at 16
        (FLAT, 8),
        ({**FLAT, "sample_size": 9, "patch_size": 3}, 9),
        ({**FLAT, "outer_layers": 2}, 8),
        ({"frequency_variances": VARIANCES}, 16),
        ({"frequency_variances": [1.0, 0.1, 0.1, 0.01], "in_channels": 1}, 8),
    ],
)
def test_shapes_and_gradients(config, image_size):
    model = random_model(**config).train()
    images = torch.randn(3, model.config.in_channels, image_size, image_size)
    output = model(
        images, torch.randn(3), torch.tensor([0, model.config.num_classes - 1, model.config.num_classes])
    )
    assert output.sample.shape == (3, model.config.in_channels, image_size, image_size)
    output.sample.square().mean().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unused


def test_untrained_output_is_zero_and_learns_at_once():
    for kind in ({}, FLAT):
        model = PetTransformer2DModel(**{**TINY, **kind})
        images = torch.randn(2, 3, 8, 8)
        output = model(images, torch.zeros(2), torch.zeros(2, dtype=torch.long)).sample
        assert output.abs().max() == 0
        (output - images).square().mean().backward()
        assert model.proj_out.weight.grad.abs().max() > 0
        assert model.decoder is None or model.decoder.conv_out.weight.grad.abs().max() > 0


def test_encoder_and_decoder_are_outside_the_core():
    model = random_model(outer_layers=2, num_layers=3)
    shapes = []
    for block in (*model.encoder_blocks, *model.transformer_blocks, *model.decoder_blocks):
        block.register_forward_hook(lambda block, args, output: shapes.append(tuple(output.shape)))
    images = torch.randn(2, 3, 8, 8)
    output = model(images, 0.1, torch.tensor([0, 1])).sample
    assert shapes == 2 * [(2, 16, 16)] + 3 * [(2, 4, 16)] + 2 * [(2, 16, 16)]
    # What the encoder knows reaches the decoder beside the core too.
    model.split.weight.data.zero_()
    model.split.bias.data.zero_()
    beside = model(images, 0.1, torch.tensor([0, 1])).sample
    assert beside.std() > 1e-3 and (beside - output).abs().max() > 1e-3
    other = images.clone()
    other[..., 0, 0] += 1
    change = (model(other, 0.1, torch.tensor([0, 1])).sample - beside).abs()
    assert change[..., :2, :2].amin() > 0


def test_a_block_of_the_encoder_is_a_modulated_feed_forward():
    block = random_model().encoder_blocks[0]
    hidden_states, modulation = torch.randn(2, 16, 16), torch.randn(2, 96)
    shift, scale, gate = (modulation[:, 48:] + block.modulation_bias).unsqueeze(1).chunk(3, dim=-1)
    normalized = torch.nn.functional.layer_norm(hidden_states, (16,), eps=1e-6)
    expected = hidden_states + gate * block.ff(normalized * (1 + scale) + shift, 4, 4)
    torch.testing.assert_close(block(hidden_states, modulation, 4, 4), expected, rtol=1e-4, atol=1e-5)


def test_positions_of_both_resolutions_span_the_image(monkeypatch):
    model, grids = random_model(), []

    def watched(hidden_states, height, width, pixels):
        grids.append((height, width, pixels))
        return hidden_states

    monkeypatch.setattr(model, "add_positions", watched)
    model(torch.randn(1, 3, 16, 8), 0.1)
    assert grids == [(8, 4, 2), (4, 2, 4)]


def test_autocast_keeps_the_tokens_in_its_precision(model):
    kinds = []
    for block in (*model.encoder_blocks, *model.transformer_blocks, *model.decoder_blocks):
        block.register_forward_hook(lambda block, args, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 3, 8, 8), 0.1)
    assert set(kinds) == {torch.bfloat16}


def test_a_convolution_of_the_encoder_reaches_one_token_far():
    model = random_model(sample_size=32, outer_layers=1)
    model.split.weight.data.zero_()  # the core is without effect
    model.decoder_blocks[0].ff.conv.weight.data[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[..., 16, 16] += 1
    change = (model(images, 0.1).sample - model(other, 0.1).sample).abs().amax((0, 1))
    assert change[14:20, 14:20].amin() > 0
    change[14:20, 14:20] = 0
    assert change.amax() < 1e-6


def test_cosine_transform_is_orthonormal_and_separates_brightness_from_colour():
    matrix = dct_matrix(3, 4)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(48), rtol=0, atol=1e-6)
    images = torch.randn(2, 3, 8, 12)
    coefficients = transform_patches(images, matrix, 4)
    assert coefficients.shape == (2, 48, 2, 3)
    torch.testing.assert_close(restore_patches(coefficients, matrix, 4), images)
    grey = transform_patches(images.mean(1, keepdim=True).expand(-1, 3, -1, -1), matrix, 4)
    assert grey[:, 16:].abs().max() < 1e-5 and grey[:, :16].abs().max() > 1
    flat = transform_patches(torch.ones(1, 3, 4, 4), matrix, 4).flatten()
    torch.testing.assert_close(flat, torch.tensor([48**0.5] + 47 * [0.0]), rtol=0, atol=1e-5)


def test_frequency_variances_are_those_of_the_images():
    generator = torch.Generator().manual_seed(0)
    variances = torch.tensor(VARIANCES)
    coefficients = torch.randn(1100, 12, 4, 4, generator=generator) * variances.sqrt().reshape(-1, 1, 1)
    images = restore_patches(coefficients, dct_matrix(3, 2), 2)
    measured = torch.tensor(frequency_variances(images, 2))
    torch.testing.assert_close(measured, variances, rtol=0.1, atol=1e-9)
    pixels = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8, generator=generator)
    assert frequency_variances(pixels, 2) == frequency_variances(pixels / 127.5 - 1, 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_untrained_model_is_the_best_linear_denoiser_of_its_frequencies(sigma, prediction_type):
    model = PetTransformer2DModel(**TINY, frequency_variances=VARIANCES, prediction_type=prediction_type)
    scheduler = AdaptiveEDMScheduler(prediction_type=prediction_type)
    variances = torch.tensor(VARIANCES).reshape(-1, 1, 1)
    coefficients = torch.randn(4, 12, 4, 4) * variances.sqrt()
    images = restore_patches(coefficients, dct_matrix(3, 2), 2)
    noisy = images + sigma * torch.randn_like(images)
    sigmas = torch.tensor([sigma]).reshape(1, 1, 1, 1)
    with torch.no_grad():
        output = model(
            scheduler.precondition_inputs(noisy, sigmas), scheduler.precondition_noise(sigmas), 0
        ).sample
    denoised = scheduler.precondition_outputs(noisy, output, sigmas)
    variances = variances.clamp(min=1e-6)  # no frequency counts as free of noise
    expected = transform_patches(noisy, dct_matrix(3, 2), 2) * variances / (variances + sigma**2)
    expected = restore_patches(expected, dct_matrix(3, 2), 2)
    torch.testing.assert_close(denoised, expected, rtol=1e-3, atol=1e-5 * max(1, sigma))


def test_layers_work_at_unit_variance_at_every_noise_level():
    model = PetTransformer2DModel(**TINY, frequency_variances=VARIANCES)
    variances = torch.tensor(VARIANCES).clamp(min=1e-6).reshape(-1, 1, 1)
    coefficients = torch.randn(2000, 12, 2, 2) * variances.sqrt()
    for sigma in (0.002, 0.1, 1.0, 80.0):
        noisy = coefficients + sigma * torch.randn_like(coefficients)
        c_in, c_out = (sigma**2 + 0.25) ** -0.5, 0.5 * sigma * (sigma**2 + 0.25) ** -0.5
        target = (coefficients - 0.25 / (sigma**2 + 0.25) * noisy) / c_out
        scale_in, scale_skip, scale_out = model.precondition(torch.tensor([sigma]).log() / 4)
        for values in (c_in * noisy * scale_in, (target - scale_skip * c_in * noisy) / scale_out):
            torch.testing.assert_close(values.square().mean((0, 2, 3)), torch.ones(12), rtol=0.1, atol=0)


def test_equal_frequency_variances_change_nothing():
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    timestep = torch.tensor([-1.5, 0.0, 1.0])
    expected = random_model()(images, timestep, labels).sample
    output = random_model(frequency_variances=12 * [0.25])(images, timestep, labels).sample
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_conditioning_reaches_the_output(model):
    images = torch.randn(1, 3, 8, 8)
    outputs = [model(images, 0.1, torch.tensor([label])).sample for label in range(3)]
    assert all((outputs[i] - outputs[j]).abs().max() > 1e-3 for i in range(3) for j in range(i))
    torch.testing.assert_close(
        model(images, torch.tensor([0.1])).sample, outputs[2]
    )  # None is the null class
    assert (model(images, 0.5, torch.tensor([0])).sample - outputs[0]).abs().max() > 1e-3


def test_positions_tell_rows_from_columns():
    model = random_model(sample_size=16)
    positions = model.add_positions(torch.zeros(1, 16, 8), 4, 4, pixels=4)[0]  # (T, D)
    distances = torch.cdist(positions, positions) + 100 * torch.eye(len(positions))
    assert distances.min() > 0.1
    grid = positions.unflatten(0, (4, 4))
    assert (grid - grid.transpose(0, 1)).abs().max() > 0.5
    finer = model.add_positions(torch.zeros(1, 64, 8), 8, 8, pixels=4)[0].unflatten(0, (8, 8))
    torch.testing.assert_close(finer[::2, ::2], grid)  # an image of twice the size spans the same range


def test_layers_are_not_shared():
    model = PetTransformer2DModel(**TINY)
    assert len({id(block) for block in model.transformer_blocks}) == len(model.transformer_blocks) > 1
    pointers = [p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False)]
    assert len(set(pointers)) == len(pointers)


def test_gradient_checkpointing_changes_nothing(model):
    model.train()
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(images, torch.zeros(2), labels).sample.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    checkpoint, blocks = model._gradient_checkpointing_func, []

    def watched_checkpoint(block, *args):
        blocks.append(block)
        return checkpoint(block, *args)

    model._gradient_checkpointing_func = watched_checkpoint
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))
    assert blocks == [*model.encoder_blocks, *model.transformer_blocks, *model.decoder_blocks]


def test_dropout_drops():
    model = random_model(dropout=0.5).train()
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    first, second = (model(images, torch.zeros(2), labels).sample for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("variances", [None, VARIANCES])
@pytest.mark.parametrize("timestep", [-1.55, 0.0, 1.09])  # σ = 0.002, 1, 80
def test_bfloat16_is_close_to_float32(timestep, variances):
    model = random_model(frequency_variances=variances)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        expected = model(images, timestep, labels).sample
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(images, timestep, labels).sample.float()
        cast = model.to(torch.bfloat16)(images.bfloat16(), timestep, labels).sample.float()
    for output in (autocast, cast):
        assert (output - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"patch_size": 3}, "must divide `sample_size`, but `patch_size` is 3"),
        ({"num_layers": 0}, "`num_layers`"),
        ({"num_classes": -1}, "`num_classes`"),
        ({"in_channels": 1.5}, "`in_channels`"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "multiple of 4"),
        ({"dropout": 1.0}, "`dropout`"),
        ({"decoder_layers": -1}, "`decoder_layers`"),
        ({"feed_forward_ratio": 0}, "`feed_forward_ratio`"),
        ({"feed_forward_ratio": "2"}, r"`feed_forward_ratio` must be a number in .*, but is '2'"),
        ({"outer_layers": True}, "`outer_layers` must be an integer"),
        ({"sample_size": 10}, "twice the patch size, must divide `sample_size`"),
        ({"sigma_data": 0}, "`sigma_data` must be a number in"),
        ({"prediction_type": "sample"}, "`prediction_type`"),
        ({"frequency_variances": 11 * [1.0]}, "`frequency_variances` must be 12 numbers"),
        ({"frequency_variances": 11 * [1.0] + [-1.0]}, "`frequency_variances` must be 12 numbers"),
        ({"frequency_variances": 11 * [1.0] + ["1"]}, "`frequency_variances` must be 12 numbers"),
        ({"frequency_variances": 1.0}, "`frequency_variances` must be 12 numbers"),
        ({"num_layers": 1001}, r"`num_layers` must be an integer in \[1, 1000\], but is 1001"),
    ],
)
def test_bad_configurations_name_the_argument(config, message):
    with pytest.raises(ValueError, match=message):
        PetTransformer2DModel(**{**TINY, **config})


def test_bad_images_are_refused(model):
    with pytest.raises(ValueError, match="must have 3 channels"):
        model(torch.randn(1, 1, 8, 8), 0.0)
    with pytest.raises(ValueError, match="that 4 divides"):  # the patch size, or twice the patch size
        model(torch.randn(1, 3, 10, 8), 0.0)


def test_save_and_load_are_bit_exact(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = PetTransformer2DModel.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(images, 0.3).sample, loaded(images, 0.3).sample)


def output_of(model: PetTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(2, 3, 8, 8, generator=generator), 0.1, torch.tensor([0, 1])).sample


def test_lora_adds_trains_saves_loads_fuses_and_deletes(model, tmp_path):
    plain, weights = output_of(model), model.state_dict()
    model.requires_grad_(False)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.proj_in", "ff.proj_gate", "ff.proj_out"]
    model.add_adapter(LoraConfig(r=4, target_modules=layers))
    torch.testing.assert_close(output_of(model), plain)  # a new adapter starts at zero
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Two matrices for each of 2 × 4 layers of attention, and of 4 × 3 layers of feed-forwards, or 2 × 2.
    num_feed_forward = 4 * 3 if model.config.outer_layers else 2 * 2
    assert len(trained) == 2 * (2 * 4 + num_feed_forward) and all("lora" in name for name in trained)
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    for _ in range(5):
        model(torch.randn(2, 3, 8, 8), 0.1, torch.tensor([0, 1])).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = output_of(model)
    assert (adapted - plain).abs().max() > 1e-3
    model.save_lora_adapter(tmp_path)

    other = PetTransformer2DModel.from_config(model.config).eval()
    other.load_state_dict(weights)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(output_of(other), adapted)
    other.fuse_lora()
    torch.testing.assert_close(output_of(other), adapted, rtol=1e-4, atol=1e-5)
    other.unfuse_lora()
    other.unload_lora()
    torch.testing.assert_close(output_of(other), plain, rtol=1e-4, atol=1e-5)
    model.delete_adapters("default")
    torch.testing.assert_close(output_of(model), plain)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_compile_without_graph_breaks(model, backend):
    expected = output_of(model)
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(output_of(model), expected, rtol=1e-4, atol=1e-5)


def test_layerwise_casting(model):
    expected = output_of(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {p.dtype for name, p in model.named_parameters() if name.endswith("to_q.weight")}
    assert stored == {torch.float8_e4m3fn} and model.class_embedding.weight.dtype == torch.float32
    error = (output_of(model) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading(model, options):
    expected = output_of(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    assert torch.equal(output_of(model), expected)


def test_sharded_variant_saves_and_device_maps(model, tmp_path):
    expected = output_of(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    assert len(list(tmp_path.glob("*.fp16-*.safetensors"))) > 1
    loaded = PetTransformer2DModel.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(output_of(loaded), expected)
    # Too little memory for the whole model: the blocks are split off to disk, none of them in the middle.
    offload = {"device_map": "auto", "max_memory": {"cpu": "30KB"}, "offload_folder": tmp_path / "disk"}
    mapped = PetTransformer2DModel.from_pretrained(tmp_path, variant="fp16", **offload)
    assert {"cpu", "disk"} <= set(mapped.hf_device_map.values())
    assert torch.equal(output_of(mapped), expected)


def test_training_a_model_keeps_classes_apart():
    # Two classes, two constant images: after a few steps the class alone decides the output.
    torch.manual_seed(0)
    model = PetTransformer2DModel(**TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels = torch.arange(8) % 2
    targets = (labels * 2.0 - 1).view(8, 1, 1, 1).expand(8, 3, 8, 8)
    for _ in range(60):
        loss = (model(torch.randn(8, 3, 8, 8), 1.0, labels).sample - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_shapes_are_inferred_on_the_meta_device():
    with torch.device("meta"):
        model = PetTransformer2DModel(**TINY)
        output = model(torch.empty(2, 3, 8, 8), torch.empty(2), torch.empty(2, dtype=torch.long)).sample
    assert output.shape == (2, 3, 8, 8)


def test_weights_that_are_missing_or_pickled_are_refused(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if "to_q" not in name}, path)
    with pytest.raises(ValueError, match="lack 2 tensors, among them transformer_blocks.0.attn.to_q.weight"):
        PetTransformer2DModel.from_pretrained(tmp_path)
    path.unlink()
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        PetTransformer2DModel.from_pretrained(tmp_path)


def test_options_of_earlier_versions_are_read_or_refused(tmp_path):
    random_model(**FLAT).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "attention_type": "linear", "long_skips": False}))
    loaded = PetTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded), output_of(random_model(**FLAT)))
    for option in ({"attention_type": "softmax"}, {"long_skips": True}):
        path.write_text(json.dumps({**config, **option}))
        with pytest.raises(
            ValueError, match=f"`{next(iter(option))}`, which only earlier versions know: load"
        ):
            PetTransformer2DModel.from_pretrained(tmp_path)
