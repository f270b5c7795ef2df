import inspect
import itertools
import math

import pytest
import torch

from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
from pet_pipeline.__main__ import build_parser
from pet_pipeline.pipeline_pet_loading import MAX_SCALE, MAX_STEPS
from pet_pipeline.sampling import (
    SCHEDULERS,
    SampleSettings,
    generate,
    image_generators,
    scheduler_by_name,
    seeds_by_class,
)


def test_defaults_are_those_of_the_pipeline():
    call = inspect.signature(PetDiffusionPipeline.__call__).parameters
    settings = SampleSettings()
    for name, option in SampleSettings.options().items():
        if option.argument is not None:
            assert getattr(settings, name) == call[option.argument].default
    assert SampleSettings.options()["steps"].high == MAX_STEPS
    for name in ("pag_scale", "autoguidance_scale"):
        option = SampleSettings.options()[name]
        assert (option.low, option.high) == (-MAX_SCALE, MAX_SCALE)


def test_every_setting_is_an_option_of_the_command_line():
    parser = build_parser()
    for words in (["generate"], ["evaluate", "--reference", "data"]):
        args = parser.parse_args(words)
        for name, default in vars(SampleSettings()).items():
            assert getattr(args, name) == default


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1001},
        {"steps": "4"},
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"guidance_scale": "2"},
        {"pag_scale": math.inf},
        {"guidance_schedule": "strong"},
        {"guidance_schedule": None},
        {"scheduler": "ddim"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        SampleSettings(**wrong)


def test_settings_become_the_arguments_of_a_call(pipeline):
    settings = SampleSettings(steps=3, pag_scale=0.5, negative_class="dog", scheduler="heun")
    assert settings.call_arguments(pipeline) == {
        "num_inference_steps": 3,
        "guidance_scale": None,
        "guidance_schedule": "adaptive",
        "pag_scale": 0.5,
        "autoguidance_scale": None,
        "negative_class_labels": [1],
    }
    assert SampleSettings().call_arguments(pipeline)["negative_class_labels"] is None
    assert str(settings).startswith("steps 3, guidance schedule adaptive, perturbed attention 0.5")


def test_images_are_drawn_when_they_are_wanted_and_depend_on_their_seeds_alone(pipeline):
    endless = ((0, seed) for seed in itertools.count())
    first = list(itertools.islice(generate(pipeline, endless, 2, num_inference_steps=2, output_type="pt"), 3))
    assert [(label, seed) for label, seed, _ in first] == [(0, 0), (0, 1), (0, 2)]
    assert next(endless) == (0, 4)  # two batches of two have been taken
    again = generate(pipeline, [(1, 2), (0, 2)], num_inference_steps=2, output_type="pt")
    (_, _, other), (_, _, same) = again
    torch.testing.assert_close(same, first[2][2], atol=1e-4, rtol=0)
    assert not torch.allclose(other, same, atol=1e-2)


def test_every_class_has_the_same_seeds():
    assert list(seeds_by_class([3, 1], 2, seed=7)) == [(3, 7), (3, 8), (1, 7), (1, 8)]
    a, b = image_generators(2, seed=7)
    assert torch.equal(
        torch.randn(3, generator=b), torch.randn(3, generator=torch.Generator().manual_seed(8))
    )
    assert not torch.equal(torch.randn(3, generator=a), torch.randn(3, generator=b))


@pytest.mark.parametrize("name", [None, *SCHEDULERS])
def test_schedulers_by_name_keep_the_configuration_and_no_state(pipeline, name):
    pipeline.scheduler.set_timesteps(3)
    scheduler = scheduler_by_name(name, pipeline.scheduler)
    assert scheduler is not pipeline.scheduler
    assert scheduler.config.sigma_max == pipeline.scheduler.config.sigma_max
    assert name in (None, type(scheduler).__name__, scheduler.config.get("solver"))
    assert len(scheduler.sigmas) != 4
    churned = AdaptiveEDMScheduler(solver="euler", s_churn=5.0)
    assert scheduler_by_name("multistep", churned).config.s_churn == 0  # which it cannot have
    assert scheduler_by_name("heun", churned).config.s_churn == 5
    with pytest.raises(ValueError, match="must be one of multistep, .*, but is 'ddim'"):
        scheduler_by_name("ddim", pipeline.scheduler)
