"""Classification by features of the denoiser, alone and combined with the errors of denoising."""

import json
from functools import partial

import pytest
import torch
from conftest import random_model
from safetensors.torch import save_file
from support.oracles import GaussianDenoiser

from pet_pipeline import (
    AdaptiveEDMScheduler,
    PetClassificationPipeline,
    PetDiffusionPipeline,
    PetLinearProbe,
)
from pet_pipeline.__main__ import main
from pet_pipeline.evaluation import calibration
from pet_pipeline.evaluation.calibration import (
    block_features,
    dataset_features,
    fit_linear,
    fit_probe,
    fit_weights,
)
from pet_pipeline.pipeline_pet_classification import METHODS
from pet_pipeline.training.data import ImageDataset


COMBINED = {"weights": [1.0] * 8, "combination": [0.5, 2.0]}


def random_probe(num_classes=2, **kwargs):
    torch.manual_seed(5)
    return PetLinearProbe(num_classes, 16, **{"layer": 1, "sigmas": [0.1, 0.5], **kwargs})


def probed_pipeline(model, **kwargs):
    pipe = PetClassificationPipeline(model, AdaptiveEDMScheduler(), probe=random_probe(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_block_returns_its_output(model):
    images, outputs = torch.randn(2, 3, 8, 8), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(images, 0.1, 1)
    first, second = outputs[0], outputs[1]
    outputs.clear()
    assert torch.equal(model(images, 0.1, 1, feature_layer=0).sample, first)
    assert len(outputs) == 1  # what follows is not evaluated
    assert torch.equal(model(images, 0.1, 1, feature_layer=1, return_dict=False)[0], second)
    compiled = torch.compile(model, backend="eager")
    for layer, expected in enumerate((first, second)):
        torch.testing.assert_close(compiled(images, 0.1, 1, feature_layer=layer).sample, expected)
    for layer in (2, -1):
        with pytest.raises(ValueError, match="`feature_layer` must be in .0, 1., but there is"):
            model(images, 0.1, feature_layer=layer)


def test_features_are_the_pooled_tokens_of_images_and_their_mirror_images(model):
    pipe = probed_pipeline(model)
    pixels = torch.rand(3, 3, 8, 8, generator=seeded(1)) * 2 - 1
    features = pipe.image_features(pixels, 1, [0.1, 0.5])
    expected = []
    for sigma in (0.1, 0.5):
        pooled = 0
        for images in (pixels, pixels.flip(-1)):
            labels = torch.full((3,), 2)  # the null class
            inputs = images / (sigma**2 + 0.25) ** 0.5
            tokens = model(inputs, torch.tensor(sigma).log() / 4, labels, feature_layer=1).sample
            centred = tokens - tokens.mean(2, keepdim=True)
            tokens = centred / centred.square().mean(2, keepdim=True).sqrt()
            pooled = pooled + torch.cat([tokens.mean(1), tokens.std(1, correction=0)], 1) / 2
        expected.append(pooled)
    torch.testing.assert_close(features, torch.cat(expected, 1), rtol=1e-3, atol=1e-4)
    alone = torch.cat([pipe.image_features(each[None], 1, [0.1, 0.5], 1) for each in pixels])
    torch.testing.assert_close(alone, features)
    torch.testing.assert_close(pipe.image_features(pixels.flip(-1), 1, [0.1, 0.5]), features)


def test_methods_and_their_combination(model):
    pipe = probed_pipeline(model, calibration=COMBINED)
    images = torch.rand(4, 3, 8, 8, generator=seeded(1))

    def log_odds(output):
        return torch.tensor([list(each.values()) for each in output.probabilities]).log().diff(dim=1)

    denoising = pipe(images, 8, generator=seeded(), method="denoising")
    features = pipe(images, method="features")
    combined = pipe(images, 8, generator=seeded(), method="combined")
    assert features.num_evaluations == [4] * 4 and combined.num_evaluations == [20] * 4
    expected = 0.5 * log_odds(features) + 2 * log_odds(denoising)
    torch.testing.assert_close(log_odds(combined), expected, rtol=1e-3, atol=1e-4)
    names = [[*each][torch.tensor([*each.values()]).argmax()] for each in combined.probabilities]
    assert combined.labels == names
    logits = pipe.probe(pipe.image_features(images * 2 - 1, 1, [0.1, 0.5]))
    torch.testing.assert_close(log_odds(features), logits.diff(dim=1), rtol=1e-3, atol=1e-4)
    # Without `method`, both count if they were calibrated together.
    assert pipe(images, 8, generator=seeded()).probabilities == combined.probabilities
    assert pipe(images, 8, generator=seeded(), weighting="elbo").num_evaluations == [16] * 4
    alone = probed_pipeline(model, calibration={"weights": [1.0] * 8})
    assert alone(images, 8, generator=seeded()).probabilities == denoising.probabilities
    explained = pipe(images, 8, generator=seeded(), return_evidence=True)  # of the denoising alone
    assert explained.probabilities == denoising.probabilities
    pipe.probe.linear.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="log-odds of the probe are not finite"):
        pipe(images, method="features")


def test_bad_methods_are_one_error(model):
    images = torch.rand(1, 3, 8, 8)
    plain = PetClassificationPipeline(model, AdaptiveEDMScheduler(), calibration=COMBINED)
    probed = probed_pipeline(model, calibration={"weights": [1.0] * 8})
    both = probed_pipeline(model, calibration=COMBINED)
    for pipe, settings, message in (
        (plain, {"method": "guess"}, "`method` must be one of denoising, features, combined"),
        (plain, {"method": "features"}, "needs a pipeline with a `probe`; `pet-pipeline calibrate` fits one"),
        (plain, {"method": "combined"}, "needs a pipeline with a `probe`"),
        (probed, {"method": "combined"}, "a calibration with a `combination`"),
        (both, {"method": "combined", "weighting": "elbo"}, "needs the weighting 'calibrated'"),
        (both, {"method": "features", "return_evidence": True}, "`return_evidence` needs the method"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(images, 8, **settings)
    both.probe = PetLinearProbe(2, 8, 1)
    with pytest.raises(ValueError, match="takes 16 features, but the model has 32: it is the probe of an"):
        both(images, 8)
    oracle = PetClassificationPipeline(GaussianDenoiser(), AdaptiveEDMScheduler(), probe=random_probe())
    with pytest.raises(ValueError, match="whose `forward` takes `feature_layer`"):
        oracle(images, method="features")
    for values in ([1.0], [1.0, -1.0], [1.0, float("nan")], "ab", None):
        with pytest.raises(ValueError, match="`calibration` must hold `combination`, 2 finite numbers"):
            probed_pipeline(model, calibration={"weights": [1.0] * 8, "combination": values})


def test_a_probe_is_a_component(pipeline, tmp_path):
    images = torch.rand(2, 3, 8, 8)

    def classify(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(images, method="features").probabilities

    probed = PetDiffusionPipeline.from_pipe(pipeline, probe=random_probe())
    expected = classify(PetClassificationPipeline.from_pipe(probed))
    probed.save_pretrained(tmp_path)
    loaded = PetClassificationPipeline.from_pretrained(tmp_path)
    assert classify(loaded) == expected
    assert PetClassificationPipeline.from_pretrained(tmp_path, probe=None).probe is None
    half = PetClassificationPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.probe.dtype == torch.bfloat16
    assert classify(half)[0]["cat"] == pytest.approx(expected[0]["cat"], abs=0.05)
    loaded.enable_model_cpu_offload(device="cpu")
    assert classify(loaded) == expected
    with pytest.raises(ValueError, match="`num_classes` of the probe must be that of the transf"):
        PetDiffusionPipeline.from_pipe(pipeline, probe=random_probe(3))
    # The folder is refused if the probe is another model, or would exhaust memory.
    index, path = json.loads((tmp_path / "model_index.json").read_text()), tmp_path / "probe" / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"token_dim": 10**9}, "`token_dim` must be at most 4,096"),
        ({"sigmas": [0.1] * 17}, "`sigmas` must have at most 16 items"),
        ({"sigmas": [0.0]}, "`sigmas` must be positive numbers"),
        ({"sigmas": []}, "`sigmas` must be positive numbers"),
        ({"layer": -1}, "`layer` must be an integer of at least 0"),
        ({"num_classes": "2"}, "`num_classes` must be an integer of at least 2"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            PetDiffusionPipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps(config))
    weights = path.parent / "diffusion_pytorch_model.safetensors"
    save_file({"linear.weight": probed.probe.linear.weight.data}, weights)
    with pytest.raises(ValueError, match="lack linear.bias"):
        PetDiffusionPipeline.from_pretrained(tmp_path)
    index["probe"] = ["transformer_pet", "PetTransformer2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="`probe` must be an available subclass of PetLinearProbe"):
        PetDiffusionPipeline.from_pretrained(tmp_path)


def test_logistic_regression_finds_the_log_odds():
    # Two Gaussian classes of unit variance, 2 apart along one of three axes: the log-odds are 2·x.
    labels = torch.arange(20_000) % 2
    features = torch.randn(20_000, 3, generator=seeded())
    features[:, 1] += 2.0 * labels - 1
    weight, bias = fit_linear(features * torch.tensor([1.0, 10.0, 1.0]) + 3, labels, 2, 1e-6)
    torch.testing.assert_close(weight.diff(dim=0)[0], torch.tensor([0.0, 0.2, 0.0]), atol=0.05, rtol=0)
    assert (weight.diff(dim=0) @ torch.full((3,), 3.0) + bias.diff()).item() == pytest.approx(0, abs=0.1)
    # Too sure by a factor of 4, and a second score that knows nothing.
    scores = torch.stack([torch.zeros(20_000), 4 * 2 * features[:, 1]], 1)
    useless = torch.randn(20_000, 2, generator=seeded(1))
    weights = fit_weights(torch.stack([scores, useless], -1), labels)
    assert weights[0] == pytest.approx(0.25, abs=0.02) and weights[1] < 0.05


def grey_images(num_images, seed):
    """Dark and bright images under noise."""
    labels = torch.arange(num_images) % 2
    grey = 116 + 24 * labels.view(-1, 1, 1, 1)
    noise = 60 * torch.randn(num_images, 3, 8, 8, generator=seeded(seed))
    return ImageDataset((grey + noise).clamp(0, 255).byte(), labels, ["cat", "dog"])


def search(informative, *args):
    """The features of the blocks, of which all but one are noise."""
    features = block_features(*args)
    return [
        each if layer == informative else torch.randn(each.shape, generator=seeded(layer))
        for layer, each in enumerate(features)
    ]


def test_a_fitted_probe_tells_unseen_images_apart(monkeypatch):
    model = random_model(attention_head_dim=16)  # wide enough for features that tell the classes apart
    pipe = PetClassificationPipeline(model, AdaptiveEDMScheduler(), id2label={0: "cat", 1: "dog"})
    train, validation, test = (grey_images(number, seed) for seed, number in enumerate((300, 100, 200)))
    features = block_features(pipe, test, 0.3, batch_size=16)
    for layer in range(2):  # one pass over all blocks gives what one pass for each block gives
        torch.testing.assert_close(features[layer], dataset_features(pipe, test, layer, [0.3]))
    assert not any(block._forward_hooks for block in model.transformer_blocks)
    chosen = []
    for informative in range(2):
        with monkeypatch.context() as patch:
            # Features of the other block that say nothing are not chosen.
            patch.setattr(calibration, "block_features", partial(search, informative))
            chosen.append(fit_probe(pipe, train, validation)[0].config.layer)
    assert chosen == [0, 1]
    probe, scores = fit_probe(pipe, train, validation)
    assert tuple(probe.config.sigmas) == calibration.PROBE_SIGMAS
    assert ((scores.argmax(1) == validation.labels).float().mean()) > 0.9
    pipe = PetClassificationPipeline.from_pipe(pipe, probe=probe)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(test.images, method="features")
    hits = torch.tensor([label == "dog" for label in found.labels]) == test.labels
    assert hits.float().mean() > 0.9
    certain = torch.tensor([max(each.values()) for each in found.probabilities])
    assert (certain.mean() - hits.float().mean()).abs() < 0.08


def test_calibrate_fits_the_probe_and_the_commands_use_it(saved, image_folder, tmp_path, capsys):
    words = [str(saved), "--reference", str(image_folder), "--cache_dir", str(tmp_path / "cache")]
    assert main(["calibrate", *words, "--num_evaluations", "16"]) == 0
    output = capsys.readouterr().out
    assert all(f"the accuracy of the method {name} is" in output for name in METHODS)
    pipe = PetClassificationPipeline.from_pretrained(saved)
    assert pipe.is_combined and min(pipe.config.calibration["combination"]) >= 0
    assert pipe.probe.config.sigmas == list(calibration.PROBE_SIGMAS)
    image = next(path for path in image_folder.rglob("*.png"))
    words[0:1] = ["--num_images", "4", "--out", str(tmp_path / "out")]
    for method, evaluations in (("features", 4), ("denoising", 8), ("combined", 12), (None, 12)):
        chosen = ["--num_evaluations", "4", *([] if method is None else ["--method", method])]
        assert main(["classify", str(image), "--model", str(saved), "--json", *chosen]) == 0
        assert json.loads(capsys.readouterr().out)["num_evaluations"] == evaluations
        assert main(["evaluate", str(saved), "--classification", *words, *chosen]) == 0
        record = json.loads((tmp_path / "out" / "classification.json").read_text())
        assert record["measures"]["evaluations_per_image"] == evaluations
        assert record["settings"]["method"] == (method or "combined")
        capsys.readouterr()
