import math

import accelerate
import numpy as np
import pytest
import torch
from conftest import random_model
from diffusers import DDPMScheduler, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from support.oracles import EmpiricalDenoiser, GaussianDenoiser, generators, oracle_pipeline

from pet_pipeline import (
    AdaptiveEDMScheduler,
    PetClassificationPipeline,
    PetDiffusionPipeline,
    guidance_weight,
)


def test_labels_in_every_form(pipeline):
    for labels, expected in [
        ("cat", [0]),
        (1, [1]),
        (["dog", 0], [1, 0]),
        ([[1], ["cat", "dog"]], [1, 0, 1]),
        (torch.tensor([[1], [0]]), [1, 0]),
        (np.int64(1), [1]),
        (np.array([1, 0]), [1, 0]),
    ]:
        assert pipeline.get_label_ids(labels) == expected
    for labels, message in [
        ("bird", "no class 'bird'; this pipeline knows cat, dog"),
        (2, "in .0, 1., but is 2"),
        (-1, "but is -1"),
        (0.5, "a name or an integer"),
        ([None], "a name or an integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipeline.get_label_ids(labels)
    assert len(pipeline(num_inference_steps=2).images) == 2  # one image of each class
    assert len(pipeline(["cat", "dog"], num_images_per_prompt=3, num_inference_steps=2).images) == 6


def test_output_types(pipeline):
    def call(output_type, **kwargs):
        return pipeline(
            "cat", num_inference_steps=3, generator=generators(0), output_type=output_type, **kwargs
        )

    latent, pt, array, pil = (call(name).images for name in ("latent", "pt", "np", "pil"))
    assert latent.shape == pt.shape == (1, 3, 8, 8) and latent.dtype == torch.float32
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    assert isinstance(call("pt", return_dict=False), tuple)


@pytest.mark.parametrize("schedule", ["adaptive", "constant", "interval"])
def test_an_image_does_not_depend_on_its_batch(pipeline, schedule):
    settings = {
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "guidance_schedule": schedule,
        "output_type": "latent",
    }
    together = pipeline(["cat", "dog", "cat"], generator=generators(1, 2, 3), **settings).images
    for index, (label, seed) in enumerate([("cat", 1), ("dog", 2), ("cat", 3)]):
        alone = pipeline(label, generator=generators(seed), **settings).images[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)


def test_guidance_off_evaluates_the_class_alone():
    model = GaussianDenoiser()
    pipe = oracle_pipeline(model)
    for schedule in ("adaptive", "constant", "interval"):
        model.calls = model.images = 0
        result = pipe(
            "dog",
            18,
            guidance_scale=1.0,
            guidance_schedule=schedule,
            generator=generators(0),
            output_type="pt",
        )
        assert (model.calls, model.images) == (18, 18)
        assert not pipe.do_classifier_free_guidance
    # Without guidance samples follow the class: N(0.5, 0.3²).
    x = pipe(
        "dog",
        60,
        guidance_scale=1,
        num_images_per_prompt=64,
        generator=generators(*range(64)),
        output_type="latent",
    )
    assert x.images.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.images.std().item() == pytest.approx(0.3, abs=0.02)
    assert result.images.shape == (1, 3, 8, 8)


def test_guided_steps_evaluate_both_in_one_batch():
    model = GaussianDenoiser()
    pipe = oracle_pipeline(model)
    pipe("dog", 18, guidance_scale=2.0)
    guided = sum(0.05 <= sigma < 5 for sigma in pipe.scheduler.sigmas[:-1].tolist())
    assert 0 < guided < 18
    assert (model.calls, model.images) == (18, 18 + guided)
    assert pipe.do_classifier_free_guidance and pipe.guidance_scale == 2.0 and pipe.num_timesteps == 18


def test_adaptive_schedule_is_off_at_both_ends_and_grows():
    def multiplier(sigma):
        return guidance_weight(sigma, 2.0, "adaptive") - 1

    assert [multiplier(s) for s in (80.0, 5.0, 0.049, 0.002)] == [0, 0, 0, 0]
    assert [multiplier(s) for s in (2.0, 1.0, 0.5, 0.2, 0.1, 0.05)] == pytest.approx([1, 1, 1, 1.5, 1.5, 1.5])
    assert multiplier(math.sqrt(10)) == pytest.approx(0.5)  # half way in ln σ
    assert multiplier(math.sqrt(0.1)) == pytest.approx(1.25)
    assert all(guidance_weight(s, 1.0, "adaptive") == 1 for s in (10.0, 3.0, 1.0, 0.3, 0.1, 0.01))


def test_other_schedules():
    assert guidance_weight(50.0, 3.0, "constant") == 3
    weights = [guidance_weight(s, 3.0, "interval", (0.1, 2.0)) for s in (2.1, 2.0, 0.1, 0.09)]
    assert weights == [1, 3, 3, 1]
    assert guidance_weight(0.5, 3.0, lambda sigma: 1 + sigma) == 1.5


def test_guidance_schedule_may_be_a_function(pipeline):
    seen = []
    constant = pipeline(
        "cat", 5, guidance_scale=2.5, guidance_schedule="constant", generator=generators(0), output_type="pt"
    )
    function = pipeline(
        "cat", 5, guidance_schedule=lambda s: seen.append(s) or 2.5, generator=generators(0), output_type="pt"
    )
    assert torch.equal(constant.images, function.images)
    assert seen == pipeline.scheduler.sigmas[:-1].tolist()
    with pytest.raises(ValueError, match="must be finite"):
        pipeline("cat", 5, guidance_schedule=lambda sigma: float("nan"))


def test_guidance_follows_its_formula():
    # For Gaussian classes the guided denoiser is that of the mean at w·mean_c.
    model = GaussianDenoiser()
    settings = {"guidance_scale": 2.0, "guidance_schedule": "constant", "output_type": "latent"}
    pipe = oracle_pipeline(model)
    dog = pipe("dog", 20, generator=generators(0), **settings).images
    plain = pipe("dog", 20, guidance_scale=1.0, generator=generators(0), output_type="latent").images
    torch.testing.assert_close(dog, plain + 0.5, rtol=0, atol=2e-3)
    # Against the other class instead of the null class the push is twice as large.
    against = pipe("dog", 20, negative_class_labels="cat", generator=generators(0), **settings).images
    torch.testing.assert_close(against, plain + 1.0, rtol=0, atol=4e-3)
    pipe.guider = ClassifierFreeGuidance(guidance_scale=2.0)
    against = pipe("dog", 20, negative_class_labels="cat", generator=generators(0), output_type="latent")
    torch.testing.assert_close(against.images, plain + 1.0, rtol=0, atol=4e-3)


def test_images_are_in_the_order_of_their_labels():
    pipe = oracle_pipeline(GaussianDenoiser(std=0.05))
    options = {"num_images_per_prompt": 3, "output_type": "latent", "guidance_schedule": "constant"}
    images = pipe(["cat", "dog"], 20, guidance_scale=1.0, **options).images
    assert images.mean((1, 2, 3)).sign().tolist() == [-1.0] * 3 + [1.0] * 3
    # Away from the other class, each from its own: 0.5 + 1·(0.5 - (-0.5)).
    options["negative_class_labels"] = ["dog", "cat"]
    images = pipe(["cat", "dog"], 20, guidance_scale=2.0, **options).images
    expected = torch.tensor([-1.5] * 3 + [1.5] * 3)
    torch.testing.assert_close(images.mean((1, 2, 3)), expected, rtol=0, atol=0.1)


def test_the_interval_is_that_of_the_call():
    model = GaussianDenoiser()
    pipe = oracle_pipeline(model)
    interval = {"guidance_schedule": "interval", "guidance_interval": (0.5, 2.0)}
    pipe("dog", 18, guidance_scale=2.0, **interval)
    inside = sum(0.5 <= sigma <= 2 for sigma in pipe.scheduler.sigmas[:-1].tolist())
    assert inside > 0 and model.images == 18 + inside


def test_a_callback_may_change_the_guidance():
    model = GaussianDenoiser()
    pipe = oracle_pipeline(model)

    def stop_guidance(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
        return {}

    options = {"guidance_scale": 2.0, "guidance_schedule": "constant"}
    pipe("dog", 5, callback_on_step_end=stop_guidance, **options)
    assert model.images == 2 * 3 + 2


def test_samples_of_the_empirical_denoiser_are_its_images_of_the_class():
    model = EmpiricalDenoiser()
    pipe = oracle_pipeline(model)
    for label in (0, 1):
        samples = pipe(label, 40, guidance_scale=1.0, num_images_per_prompt=8, output_type="latent").images
        distances = (samples.unsqueeze(1) - model.data).abs().amax((2, 3, 4))
        assert distances.min(1).values.max() < 0.02
        assert (model.labels[distances.argmin(1)] == label).all()


def test_model_offload_hooks_leave_the_images_as_they_are(pipeline):
    settings = {"num_inference_steps": 3, "output_type": "pt"}
    expected = pipeline("cat", generator=generators(0), **settings).images
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipeline("cat", generator=generators(0), **settings).images, expected)
    pipeline.remove_all_hooks()
    # `enable_sequential_cpu_offload` has no CPU to CPU form; these are the hooks it would set.
    accelerate.cpu_offload(pipeline.transformer, torch.device("cpu"))
    assert torch.equal(pipeline("cat", generator=generators(0), **settings).images, expected)


def test_callbacks_see_replace_and_steer(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append((step, timestep.item(), sorted(tensors)))
        assert tensors["pred_original_sample"].shape == tensors["latents"].shape
        if step == 2:
            pipe._guidance_scale = 1.0
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 4 else {}

    names = ["latents", "pred_original_sample"]
    result = pipeline(
        "cat",
        5,
        guidance_scale=4.0,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert [step for step, _, _ in steps] == [0, 1, 2, 3, 4]
    assert [t for _, t, _ in steps] == pipeline.scheduler.timesteps.tolist()
    assert all(keys == names for _, _, keys in steps)
    assert result.images.abs().max() == 0 and pipeline.guidance_scale == 1.0
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        pipeline(
            "cat", 2, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
    seen = []
    pipeline(
        "cat",
        1,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=None,
    )
    assert seen == [{}]


def test_last_prediction_is_the_image(pipeline):
    predictions = []
    result = pipeline(
        "cat",
        4,
        output_type="latent",
        callback_on_step_end=lambda p, i, t, tensors: (
            predictions.append(tensors["pred_original_sample"]) or {}
        ),
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    torch.testing.assert_close(predictions[-1], result.images)


def test_interrupt_skips_the_rest(pipeline):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    pipeline("cat", 6, callback_on_step_end=callback)
    assert steps == [0, 1] and pipeline.interrupt
    calls = []
    pipeline.transformer.register_forward_hook(lambda *args: calls.append(None))
    # The next call is not interrupted, and knows nothing of the one that was.
    images = pipeline("cat", 6, generator=generators(0), output_type="latent").images
    assert len(calls) == 6
    pipeline.scheduler = AdaptiveEDMScheduler()
    assert torch.equal(pipeline("cat", 6, generator=generators(0), output_type="latent").images, images)


def test_latents_and_other_sizes(pipeline):
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = pipeline("cat", 3, latents=noise, output_type="pt").images
    drawn = pipeline("cat", 3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(given, drawn)
    large = pipeline("cat", 3, latents=torch.randn(1, 3, 16, 16), output_type="pt").images
    assert large.shape == (1, 3, 16, 16)


def test_schedulers_of_another_kind_are_refused(pipeline):
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="of the class DDPMScheduler"):
        pipeline("cat", 3)


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_schedulers_of_diffusers_take_the_place_of_ours(pipeline, scheduler_class):
    solver = "euler" if scheduler_class is EDMEulerScheduler else "multistep"
    pipeline.scheduler = AdaptiveEDMScheduler(solver=solver)
    noise = torch.randn(1, 3, 8, 8)
    ours = pipeline("cat", 16, latents=noise, output_type="latent").images
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    theirs = pipeline("cat", 16, latents=noise, output_type="latent").images
    # Their noise starts at √(σ_max² + 1), ours at √(σ_max² + σ_data²): 6e-5 apart.
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)
    with pytest.raises(ValueError, match="sigmas"):
        pipeline("cat", sigmas=[10.0, 1.0, 0.1])


def test_explicit_sigmas(pipeline):
    pipeline("cat", sigmas=[40.0, 5.0, 1.0, 0.1])
    assert pipeline.num_timesteps == 4
    pipeline.scheduler = AdaptiveEDMScheduler(solver="heun", s_churn=10.0)
    pipeline("cat", sigmas=torch.tensor([40.0, 5.0, 1.0, 0.1]))
    assert pipeline.num_timesteps == 7
    pipeline("cat", num_inference_steps=np.int64(2))


def test_guiders_of_diffusers(pipeline):
    settings = {"num_inference_steps": 6, "output_type": "pt"}
    constant = pipeline(
        "cat", guidance_scale=2.5, guidance_schedule="constant", generator=generators(0), **settings
    )
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=2.5)
    guided = pipeline("cat", generator=generators(0), **settings)
    torch.testing.assert_close(guided.images, constant.images, rtol=1e-3, atol=1e-4)
    # A guider knows the step it is asked for.
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=2.5, stop=0.5)
    stopped = pipeline("cat", generator=generators(0), **settings)
    pipeline.guider = None
    weights = iter([2.5] * 3 + [1.0] * 3)
    expected = pipeline("cat", guidance_schedule=lambda _: next(weights), generator=generators(0), **settings)
    torch.testing.assert_close(stopped.images, expected.images, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(stopped.images, guided.images, rtol=1e-2, atol=1e-2)
    pipeline.guider = AdaptiveProjectedGuidance(guidance_scale=2.5)
    projected = pipeline("cat", generator=generators(0), **settings)
    assert projected.images.isfinite().all() and not torch.equal(projected.images, guided.images)
    assert pipeline.do_classifier_free_guidance


@pytest.mark.parametrize(
    "guider",
    [
        PerturbedAttentionGuidance(perturbed_guidance_layers=[1]),
        SmoothedEnergyGuidance(seg_guidance_layers=[1]),
        SkipLayerGuidance(skip_layer_guidance_layers=[1]),
        AutoGuidance(auto_guidance_layers=[1], dropout=0.1),
    ],
)
def test_guiders_that_change_layers_are_refused(pipeline, guider):
    calls = []
    pipeline.transformer.register_forward_hook(lambda *args: calls.append(None))
    pipeline.guider = guider
    with pytest.raises(ValueError, match=f"The guider {type(guider).__name__} changes .* use `pag_scale`"):
        pipeline("cat", 4)
    assert not calls


def test_numbers_and_generators_of_every_type(pipeline):
    def draw(**kwargs):
        return pipeline("cat", output_type="pt", **kwargs).images

    expected = draw(
        num_inference_steps=3, guidance_scale=2.0, num_images_per_prompt=2, generator=generators(0, 1)
    )
    other = draw(
        num_inference_steps=np.int64(3),
        guidance_scale=np.float32(2.0),
        num_images_per_prompt=np.int32(2),
        generator=tuple(generators(0, 1)),
        guidance_interval=[np.float64(0.05), 5],
    )
    assert torch.equal(other, expected)


@pytest.mark.parametrize("scheduler_class", [AdaptiveEDMScheduler, EDMEulerScheduler])
def test_the_sample_keeps_its_precision(pipeline, scheduler_class):
    # EDMEulerScheduler returns samples in the precision of the model's output.
    pipeline.scheduler = scheduler_class()
    pipeline.to(torch.bfloat16)
    images = pipeline("cat", 3, output_type="latent").images
    assert images.dtype == torch.float32 and not torch.equal(images, images.bfloat16().float())


def test_hooks_are_freed_after_the_call(pipeline, monkeypatch):
    freed = []
    for pipe in (pipeline, PetClassificationPipeline.from_pipe(pipeline)):
        monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(None))
    pipeline("cat", 2)
    pipe(torch.rand(3, 8, 8), 2, weighting="elbo")
    assert len(freed) == 2


def test_the_time_step_keeps_its_precision(pipeline):
    # In bfloat16, c_noise would be rounded to 3 digits.
    timesteps = []
    pipeline.to(torch.bfloat16)
    pipeline.transformer.register_forward_pre_hook(lambda module, args: timesteps.append(args[1]))
    pipeline("cat", 5)
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=1.0)
    pipeline("cat", 5)
    expected = pipeline.scheduler.timesteps.tolist()
    assert [timestep[0].item() for timestep in timesteps] == expected * 2
    assert len({timestep.bfloat16().item() for timestep in pipeline.scheduler.timesteps} & set(expected)) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_are_bit_exact(pipeline, dtype, tmp_path):
    pipeline.to(dtype)
    pipeline.save_pretrained(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]
    loaded = PetDiffusionPipeline.from_pretrained(tmp_path, dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.id2label == {0: "cat", 1: "dog"}
    weights = [p.transformer.state_dict() for p in (pipeline, loaded)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    images = [p("dog", 4, generator=generators(3), output_type="pt").images for p in (pipeline, loaded)]
    # Loaded weights lie elsewhere in the memory, where some versions of PyTorch round differently.
    torch.testing.assert_close(*images, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)
    assert images[0].dtype == torch.float32


def test_from_pipe_shares_components(pipeline):
    pipeline.to(torch.bfloat16)
    other = PetDiffusionPipeline.from_pipe(pipeline)
    assert other.dtype == torch.bfloat16
    assert other.transformer is pipeline.transformer and other.id2label == pipeline.id2label
    replaced = PetDiffusionPipeline.from_pipe(pipeline, transformer=random_model(), torch_dtype=torch.float32)
    assert replaced.dtype == torch.float32 and replaced.transformer is not pipeline.transformer
    assert PetDiffusionPipeline.from_pipe(pipeline, transformer=random_model()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": []}, "`class_labels` is empty"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"num_inference_steps": -5}, "`num_inference_steps`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a finite number"),
        ({"pag_scale": float("nan")}, "`pag_scale` must be a finite number"),
        ({"guidance_schedule": "linear"}, "must be one of adaptive, constant, interval, or"),
        ({"guidance_scale": "2"}, "`guidance_scale` must be a finite number, but is '2'"),
        ({"pag_scale": -101.0}, "`pag_scale` must be in .-100, 100., but is -101"),
        ({"guidance_interval": (3.0, 1.0)}, "`guidance_interval`"),
        ({"guidance_interval": None}, "`guidance_interval` must be two numbers .*, but is None"),
        ({"guidance_interval": ("a", "b")}, "`guidance_interval` must be two numbers"),
        ({"guidance_interval": (1.0,)}, "`guidance_interval` must be two numbers"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt`"),
        ({"num_images_per_prompt": True}, "`num_images_per_prompt` must be a positive integer, but is True"),
        ({"output_type": "jpeg"}, "`output_type`"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"`latents` must be of shape \(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 3, 10, 10)}, "a height and width that"),
        ({"latents": torch.zeros(1, 3, 0, 0)}, r"must be of shape \(1, 3, 8, 8\), but is \(1, 3, 0, 0\)"),
        ({"generator": generators(0, 1)}, "2 generators for 1 image"),
        ({"generator": tuple(generators(0, 1))}, "2 generators for 1 image"),
        ({"negative_class_labels": ["cat", "dog"]}, "`negative_class_labels`"),
        ({"negative_class_labels": "bird"}, "no class 'bird'"),
        ({"sigmas": [1.0, 2.0]}, "`sigmas`"),
    ],
)
def test_bad_arguments_are_one_clear_error(pipeline, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": "cat", **kwargs})


@pytest.mark.parametrize(
    "id2label",
    [
        {2: "bird"},
        {-1: "bird"},
        {"one": "bird"},
        {0: 5},
        {0: ""},
        {0: "two\nlines"},
        {0: "\x1b[2J"},
        {0: "x" * 1000},
        ["cat"],
    ],
)
def test_id2label_is_checked(id2label):
    with pytest.raises(ValueError, match="id2label"):
        PetDiffusionPipeline(random_model(), AdaptiveEDMScheduler(), id2label=id2label)
