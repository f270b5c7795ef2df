"""Guidance by a worse prediction: perturbed attention, and a worse model as the guide of a pipeline."""

import pytest
import torch
from conftest import random_model
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from support.oracles import GaussianDenoiser, generators, oracle_pipeline

from pet_pipeline import PetClassificationPipeline, PetDiffusionPipeline


class PerturbedDenoiser(GaussianDenoiser):
    """Perturbed, it forgets the class."""

    @register_to_config
    def __init__(self, num_layers: int = 12):
        super().__init__()
        self.register_to_config(std=0.3, num_classes=2, in_channels=3, sample_size=8)
        self.perturbed = []

    def forward(self, hidden_states, timestep, class_labels=None, perturbed_layers=None, return_dict=True):
        self.perturbed.append(perturbed_layers)
        if perturbed_layers is not None:
            class_labels = torch.full_like(class_labels, 2)
        return super().forward(hidden_states, timestep, class_labels, return_dict)


def test_perturbed_attention_guidance_follows_its_formula():
    model = PerturbedDenoiser()
    pipe = oracle_pipeline(model)
    settings = {"guidance_interval": (0.0, 100.0), "output_type": "latent"}
    plain = pipe("dog", 20, guidance_scale=1.0, generator=generators(0), **settings).images
    assert model.perturbed == [None] * 20 and pipe.pag_scale == 0
    # A model that forgets the class makes of it what classifier-free guidance is, and the two add up.
    settings["pag_scale"] = 1.0
    guided = pipe("dog", 20, guidance_scale=1.0, generator=generators(0), **settings).images
    torch.testing.assert_close(guided, plain + 0.5, rtol=0, atol=2e-3)
    assert model.perturbed[20:] == [None, [3]] * 20 and pipe.pag_scale == 1
    settings |= {"guidance_schedule": "constant", "pag_applied_layers": [0, 9]}
    both = pipe("dog", 20, guidance_scale=2.0, generator=generators(0), **settings).images
    torch.testing.assert_close(both, plain + 1.0, rtol=0, atol=4e-3)
    assert model.perturbed[60:] == [None, [0, 9]] * 20
    # It acts in the interval alone.
    model.perturbed.clear()
    pipe("dog", 18, guidance_scale=1.0, pag_scale=1.0)
    inside = sum(0.05 <= sigma <= 5 for sigma in pipe.scheduler.sigmas[:-1].tolist())
    assert 0 < inside < 18 and len(model.perturbed) == 18 + inside
    # Both ends belong to the interval.
    model.perturbed.clear()
    pipe("dog", sigmas=[6.0, 5.0, 0.05, 0.01], guidance_scale=1.0, pag_scale=1.0)
    assert model.perturbed == [None, None, [3], None, [3], None]
    with pytest.raises(ValueError, match="`pag_scale` needs a model .* of the class GaussianDenoiser"):
        oracle_pipeline(GaussianDenoiser())("dog", pag_scale=1.0)


def test_perturbed_attention_guidance_of_our_model(pipeline):
    def draw(**kwargs):
        return pipeline("cat", 4, generator=generators(0), output_type="latent", **kwargs).images

    plain, guided = draw(), draw(pag_scale=1.0)
    assert not torch.equal(plain, guided)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert torch.equal(draw(pag_scale=1.0), guided)
    assert not torch.equal(draw(pag_scale=1.0, pag_applied_layers=(1,)), guided)
    for layers in ([2], [-1], 1, "blocks.1", ["1"]):
        with pytest.raises(ValueError, match="must be a list of blocks from 0 to 1, but is"):
            draw(pag_scale=1.0, pag_applied_layers=layers)


def test_the_perturbed_attention_guidance_that_suits_a_model_is_saved_with_it(pipeline, tmp_path):
    def draw(pipe, **kwargs):
        return pipe("cat", 4, generator=generators(0), output_type="latent", **kwargs).images

    pipeline.register_to_config(pag_scale=0.75)
    PetClassificationPipeline.from_pipe(pipeline).save_pretrained(tmp_path)
    suited = PetDiffusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(draw(suited), draw(pipeline, pag_scale=0.75), rtol=0, atol=1e-4)
    assert suited.pag_scale == 0.75
    assert PetDiffusionPipeline.from_pretrained(tmp_path, pag_scale=0.25).config.pag_scale == 0.25
    pipeline.register_to_config(pag_scale=0.0)
    torch.testing.assert_close(draw(suited, pag_scale=0.0), draw(pipeline), rtol=0, atol=1e-4)
    other = PetDiffusionPipeline.from_pipe(suited, transformer=GaussianDenoiser())
    draw(other)  # which cannot be perturbed
    assert other.config.pag_scale == 0.75 and other.pag_scale == 0
    suited.guider = ClassifierFreeGuidance(guidance_scale=1.0)  # in place of any other
    torch.testing.assert_close(draw(suited), draw(pipeline, guidance_scale=1.0), rtol=1e-4, atol=1e-5)
    for pipeline_class in (PetDiffusionPipeline, PetClassificationPipeline):
        for value in (float("inf"), "1", None, True, 1e30):
            with pytest.raises(ValueError, match="`pag_scale` must be "):
                pipeline_class(pipeline.transformer, pipeline.scheduler, pag_scale=value)


def guided_by_oracle(**kwargs):
    """A pipeline of an exact denoiser, guided by one of wider classes that are closer to each other."""

    class Worse(GaussianDenoiser):
        def mean(self, class_labels):
            return super().mean(class_labels) * 0.8

    pipe = oracle_pipeline(GaussianDenoiser())
    return PetDiffusionPipeline.from_pipe(pipe, guide=Worse(std=0.5), **kwargs)


def test_autoguidance_follows_its_formula():
    pipe = guided_by_oracle()
    pipe.set_progress_bar_config(disable=True)
    settings = {"guidance_schedule": "constant", "output_type": "latent"}
    noise = torch.randn(1, 3, 8, 8, generator=generators(0)[0])
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["pred_original_sample"])
        return {}

    names = ["pred_original_sample"]
    for sigma, scale, weight in ((2.0, 3.0, 1.0), (2.0, 1.5, 2.5), (2.0, 1.0, 2.5), (9.0, 3.0, 2.5)):
        pipe(
            "dog",
            sigmas=[sigma],
            guidance_scale=weight,
            autoguidance_scale=scale,
            latents=noise,
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=names,
            **settings,
        )
        x, level = pipe.scheduler.init_noise_sigma * noise.double(), torch.full((1, 1, 1, 1), sigma).double()
        good, bad = (
            [model.denoise(x, level, torch.tensor([label])) for label in (1, 2)]
            for model in (pipe.transformer, pipe.guide)
        )
        difference = good[0] - good[1] if scale == 1 else bad[0] - bad[1]
        expected = good[0] + (weight - 1) * difference
        if sigma <= 5:  # the end of the interval
            expected = expected + (scale - 1) * (good[0] - bad[0])
        torch.testing.assert_close(seen.pop(), expected.float(), rtol=1e-4, atol=1e-4)


def test_autoguidance_evaluates_the_denoiser_once_a_step():
    pipe = guided_by_oracle(autoguidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    pipe(["cat", "dog"], 18)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    inside = sum(0.05 <= sigma <= 5 for sigma in sigmas)
    assert pipe.transformer.images == 36 and pipe.autoguidance_scale == 2
    assert pipe.guide.calls == inside < 18
    pipe.guide.calls = 0
    pipe("cat", 18, autoguidance_scale=1.0)
    assert pipe.guide.calls == 0 and pipe.autoguidance_scale == 1
    pipe.guider = ClassifierFreeGuidance()  # in place of any other
    pipe("cat", 18)
    assert pipe.guide.calls == 0 and pipe.autoguidance_scale == 1


def test_a_guide_is_a_component(pipeline, tmp_path):
    def draw(pipe, **kwargs):
        return pipe(["cat", "dog"], 4, generator=generators(0, 1), output_type="latent", **kwargs).images

    guide = random_model(1, num_layers=1)
    plain = draw(pipeline)
    with pytest.raises(ValueError, match="`autoguidance_scale` needs a pipeline with a `guide`"):
        draw(pipeline, autoguidance_scale=2.0)
    guided = PetDiffusionPipeline.from_pipe(pipeline, guide=guide, autoguidance_scale=1.5)
    assert guided.guide is guide and torch.equal(draw(guided, autoguidance_scale=1.0), plain)
    expected = draw(guided)
    assert torch.equal(draw(guided, autoguidance_scale=1.5), expected) and not torch.equal(expected, plain)
    # It is shared, saved, loaded, cast, moved and offloaded with the pipeline.
    PetClassificationPipeline.from_pipe(guided).save_pretrained(tmp_path)
    loaded = PetDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded), expected) and loaded.config.autoguidance_scale == 1.5
    without = PetDiffusionPipeline.from_pretrained(tmp_path, guide=None)
    assert without.guide is None and torch.equal(draw(without), plain)
    half = PetDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.guide.dtype == torch.bfloat16 and draw(half).isfinite().all()
    assert PetDiffusionPipeline.from_pretrained(tmp_path).to("meta").guide.device.type == "meta"
    loaded.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(loaded), expected)
    for changes in ({"num_classes": 3}, {"in_channels": 1}):
        with pytest.raises(ValueError, match=f"`{[*changes][0]}` of the guide must be that of the transf"):
            PetDiffusionPipeline.from_pipe(pipeline, guide=random_model(**changes))
    for value in (float("inf"), "1", None, True, 1e30):
        with pytest.raises(ValueError, match="`autoguidance_scale` must be "):
            PetDiffusionPipeline(pipeline.transformer, pipeline.scheduler, autoguidance_scale=value)
