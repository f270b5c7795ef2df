"""Saved pipelines in fresh processes, with this package and without it."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import random_model
from diffusers import AutoModel, DDPMScheduler, EDMEulerScheduler, SchedulerMixin
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.utils import logging
from safetensors.torch import save_file
from support.loading import DRAW, GENERIC, INSTALLED, ROOT, image_sum

from pet_pipeline import (
    AdaptiveEDMScheduler,
    PetClassificationPipeline,
    PetDiffusionPipeline,
    PetLinearProbe,
)


def run(code: str, tmp_path: Path, with_package: bool) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, with an empty cache of remote code, with or without this package."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    if not with_package:  # unavailable even where it is installed
        code = "import sys\nsys.modules['pet_pipeline'] = None\n" + code
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def saved_again(tmp_path_factory) -> tuple[Path, str]:
    """A folder that a process without this package saved, from one like `saved`, and what it printed."""
    folder = tmp_path_factory.mktemp("generic")
    pipeline = PetDiffusionPipeline(random_model(), AdaptiveEDMScheduler(), id2label={0: "cat", 1: "dog"})
    pipeline.save_pretrained(folder / "model")
    code = GENERIC.format(str(folder / "model")) + DRAW
    result = run(code + f"pipe.save_pretrained({str(folder / 'again')!r})\n", folder, with_package=False)
    assert result.returncode == 0, result.stderr
    return folder / "again", result.stdout


def test_a_saved_folder_has_weights_code_and_json_only(saved):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json",
        "pipeline_pet_classification.py",
        "pipeline_pet_diffusion.py",
        "pipeline_pet_loading.py",
        "guidance_pet.py",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_adaptive_edm.py",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/transformer_pet.py",
    }
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_pet_diffusion", "PetDiffusionPipeline"]
    assert index["transformer"] == ["transformer_pet", "PetTransformer2DModel"]
    assert index["auto_map"] == {"AutoModel": "transformer_pet.PetTransformer2DModel"}


def test_readme_lists_the_files_that_travel(pipeline, tmp_path):
    probed = PetDiffusionPipeline.from_pipe(pipeline, probe=PetLinearProbe(2, 16))
    probed.save_pretrained(tmp_path)
    files = re.findall(r"^  (\w+\.py) ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(files[:7]) == sorted(path.name for path in tmp_path.rglob("*.py"))


def test_without_the_package(saved_again, pipeline, tmp_path):
    # Loads, draws, saves again; the second folder is as good as the first.
    folder, first = saved_again
    assert first.startswith("diffusers_modules.") and "pet_pipeline" not in first
    second = run(GENERIC.format(str(folder)) + DRAW, tmp_path, with_package=False)
    assert second.returncode == 0, second.stderr
    assert "auto_map" not in second.stderr
    for output in (first, second.stdout):
        assert float(output.split()[-1]) == pytest.approx(image_sum(pipeline), rel=1e-5)


def test_classification_without_the_package(saved, saved_again, pipeline, tmp_path):
    code = """
from diffusers import DiffusionPipeline
import torch
for folder in {!r}:
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline="pipeline_pet_classification", trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    image = torch.linspace(0, 1, 192).view(3, 8, 8)
    output = pipe(image, 8, generator=torch.Generator().manual_seed(0))
    print(type(pipe).__module__, type(pipe).__name__, output.probabilities[0]["cat"])
pipe.save_pretrained({!r})
"""
    probe, calibration = PetLinearProbe(2, 16), {"weights": [1.0] * 8, "combination": [1.0, 1.0]}
    probed = PetClassificationPipeline.from_pipe(pipeline, probe=probe, calibration=calibration)
    probed.save_pretrained(tmp_path / "probed")
    # Also from what the generic pipelines saved: a drawing and a classifying one.
    folders = [str(folder) for folder in (saved, saved_again[0], tmp_path / "probed")]
    result = run(code.format(folders, str(tmp_path / "third")), tmp_path, with_package=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(folders)
    for folder, line in zip(folders, lines):
        classifier = PetClassificationPipeline.from_pretrained(folder)
        image, generator = torch.linspace(0, 1, 192).view(3, 8, 8), torch.Generator().manual_seed(0)
        expected = classifier(image, 8, generator=generator)
        assert expected.num_evaluations == [16 if classifier.probe is None else 18]
        module, name, probability = line.split()
        assert module.startswith("diffusers_modules.") and name == "PetClassificationPipeline"
        assert float(probability) == pytest.approx(expected.probabilities[0]["cat"], rel=1e-3, abs=1e-6)
    result = run(GENERIC.format(str(tmp_path / "third")) + "print(type(pipe).__name__)", tmp_path, False)
    assert result.stdout.split() == ["PetClassificationPipeline"], result.stderr


def test_auto_model_loads_the_denoiser_without_the_package(saved, model, tmp_path):
    # From the index of the pipeline, as on the Hub, and from the folder of the component.
    code = """
from diffusers import AutoModel
import torch
for folder, options in (({0!r}, dict(subfolder="transformer")), ({0!r} + "/transformer", {{}})):
    model = AutoModel.from_pretrained(folder, **options, trust_remote_code=True)
    inputs = torch.linspace(-1, 1, 192).view(1, 3, 8, 8), torch.zeros(1), torch.ones(1, dtype=torch.long)
    with torch.no_grad():
        print(type(model).__module__, type(model).__name__, model(*inputs).sample.double().sum().item())
model.save_pretrained("again")
"""
    result = run(code.format(str(saved)), tmp_path, with_package=False)
    assert result.returncode == 0, result.stderr
    assert "auto_map" not in result.stderr
    with torch.no_grad():
        expected = model(torch.linspace(-1, 1, 192).view(1, 3, 8, 8), torch.zeros(1), torch.ones(1).long())
    for line in result.stdout.splitlines():
        module, name, total = line.split()
        assert module == "diffusers_modules.local.transformer_pet" and name == "PetTransformer2DModel"
        assert float(total) == pytest.approx(expected.sample.double().sum().item(), rel=1e-5)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "transformer_pet.PetTransformer2DModel"}


def test_auto_model_asks_for_trust(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(saved, subfolder="transformer")


def test_the_entry_for_auto_model_gives_no_warning(saved, caplog):
    logging.enable_propagation()
    for pipeline_class in (PetDiffusionPipeline, PetClassificationPipeline):
        pipeline_class.from_pretrained(saved)
    logging.disable_propagation()
    assert not [record for record in caplog.records if "auto_map" in record.getMessage()]


def test_with_the_package_no_code_of_the_checkpoint_runs(saved, pipeline, tmp_path):
    for path in saved.rglob("*.py"):
        path.write_text("raise SystemExit('code of the checkpoint was run')\n")
    result = run(INSTALLED.format(str(saved)) + DRAW, tmp_path, with_package=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:2] == [
        "pet_pipeline.pipeline_pet_diffusion",
        "pet_pipeline.transformer_pet",
    ]
    assert float(result.stdout.split()[-1]) == pytest.approx(image_sum(pipeline), rel=1e-5)


def test_strange_components_ask_for_trust(saved):
    index = json.loads((saved / "model_index.json").read_text())
    index["scheduler"] = ["evil", "Scheduler"]
    (saved / "model_index.json").write_text(json.dumps(index))
    (saved / "scheduler" / "evil.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        PetDiffusionPipeline.from_pretrained(saved)


def test_a_class_without_a_source_file_can_be_saved(pipeline, tmp_path, monkeypatch):
    # As in a notebook: the folder is saved, and names the class as diffusers would.
    module = types.ModuleType("notebook")
    module.SchedulerMixin = SchedulerMixin  # diffusers looks for a component's base class beside it
    module.NotebookScheduler = type("NotebookScheduler", (AdaptiveEDMScheduler,), {"__module__": "notebook"})
    monkeypatch.setitem(sys.modules, "notebook", module)
    pipeline.scheduler = module.NotebookScheduler()
    pipeline.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["scheduler"] == ["notebook", "NotebookScheduler"]
    assert (
        type(PetDiffusionPipeline.from_pretrained(tmp_path / "model").scheduler) is module.NotebookScheduler
    )


def test_another_scheduler_is_saved_and_loaded(pipeline, tmp_path):
    pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "euler")
    assert type(PetDiffusionPipeline.from_pretrained(tmp_path / "euler").scheduler) is EDMEulerScheduler
    result = run(GENERIC.format(str(tmp_path / "euler")) + DRAW, tmp_path, with_package=False)
    assert result.returncode == 0, result.stderr
    pipeline.scheduler = AdaptiveEDMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "euler")  # over the other
    assert type(PetDiffusionPipeline.from_pretrained(tmp_path / "euler").scheduler) is AdaptiveEDMScheduler


def test_a_guider_is_saved_and_loaded(pipeline, tmp_path):
    pipeline = PetDiffusionPipeline.from_pipe(pipeline, guider=ClassifierFreeGuidance(guidance_scale=1.5))
    pipeline.save_pretrained(tmp_path)
    guider = PetDiffusionPipeline.from_pretrained(tmp_path).guider
    assert type(guider) is ClassifierFreeGuidance and guider.guidance_scale == 1.5


@pytest.mark.parametrize("pipeline_class", [PetDiffusionPipeline, PetClassificationPipeline])
def test_pickled_weights_are_refused_and_not_opened(saved, tmp_path, pipeline_class):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "unpickled",)

    (saved / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weights": Evil()}, saved / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        pipeline_class.from_pretrained(saved)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("transformer", 5, "a library and a class"),
        ("transformer", ["transformer_pet"], "a library and a class"),
        ("scheduler", ["diffusers", None], "a library and a class"),
        (
            "transformer",
            ["os", "system"],
            "subclass of ModelMixin, but is 'system' of 'os'",
        ),
        ("id2label", ["cat", "dog"], "`id2label` must be a dict"),
        (
            "id2label",
            {"0": "cat", "1": "cat"},
            "names in `id2label` must differ, but two classes are 'cat'",
        ),
        ("id2label", {"1": "0"}, "two classes are '0'"),
        ("pag_scale", "much", "`pag_scale` must be a finite number"),
        ("guide", 5, "`guide` in model_index.json must be a library and a class"),
        ("guide", ["diffusers", "DDIMScheduler"], "`guide` must be an available subclass of ModelMixin"),
    ],
)
def test_an_index_is_checked(saved, entry, value, message):
    path = saved / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(ValueError, match=message):
        PetDiffusionPipeline.from_pretrained(saved)


def write_component(saved: Path, name: str, class_name: str, config: Any) -> None:
    """Replaces a component of a saved pipeline by one of diffusers, without weights."""
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", class_name]}))
    (saved / name).mkdir(exist_ok=True)
    config_name = {"transformer": "config.json"}.get(name, f"{name}_config.json")
    (saved / name / config_name).write_text(json.dumps(config))


DIT = {"sample_size": 8, "in_channels": 3, "num_classes": 2, "num_attention_heads": 2, "num_layers": 1}


@pytest.mark.parametrize(
    ("name", "class_name", "config", "message"),
    [
        ("scheduler", "EDMEulerScheduler", {"num_train_timesteps": 10**9}, "`num_train_timesteps` must be"),
        ("scheduler", "EDMEulerScheduler", {"sigma_max": "high"}, "`sigma_max` must be a number in"),
        (
            "scheduler",
            "EDMEulerScheduler",
            "user/pets",
            "the scheduler must be a JSON object",
        ),
        (
            "scheduler",
            "EDMDPMSolverMultistepScheduler",
            {"solver_order": 10**9},
            "`solver_order` must be a number",
        ),
        ("scheduler", "EDMDPMSolverMultistepScheduler", {"solver_order": 0}, r"must be a number in \[1, 3\]"),
        (
            "scheduler",
            "EDMDPMSolverMultistepScheduler",
            {"sample_max_value": 10**400},
            "must be at most 4,096",
        ),
        ("scheduler", "DDPMScheduler", {}, "must be an EDM scheduler .*, but is DDPMScheduler"),
        ("scheduler", "DiffusionPipeline", {}, "must be an available subclass of SchedulerMixin"),
        ("guider", "AutoGuidance", {"auto_guidance_layers": [0] * 10**6}, "must have at most 16 items"),
        (
            "transformer",
            "DiTTransformer2DModel",
            {**DIT, "sample_size": 6144},
            "`sample_size` must be",
        ),
        ("transformer", "DiTTransformer2DModel", {**DIT, "sample_size": 4096}, "must be at most 268,435,456"),
        (
            "transformer",
            "DiTTransformer2DModel",
            {**DIT, "num_layers": 4096},
            "must be at most 128",
        ),
        ("transformer", "DiTTransformer2DModel", {"sample_size": 8, "in_channels": 3}, "`num_classes` in"),
        ("transformer", "DiTTransformer2DModel", {**DIT, "sample_size": -8}, "must be a positive integer"),
        (
            "transformer",
            "SD3Transformer2DModel",
            {"pos_embed_max_size": 99999},
            "must take .*`class_labels`",
        ),
    ],
)
def test_classes_of_diffusers_are_checked_before_they_are_built(
    saved, name, class_name, config, message, monkeypatch
):
    component_class = getattr(diffusers, class_name)

    @functools.wraps(component_class.__init__)
    def build(self, *args, **kwargs):
        raise AssertionError("a component was built")

    monkeypatch.setattr(component_class, "__init__", build)
    write_component(saved, name, class_name, config)
    for pipeline_class in (PetDiffusionPipeline, PetClassificationPipeline):
        with pytest.raises(ValueError, match=message):
            pipeline_class.from_pretrained(saved)


def test_a_model_of_diffusers_can_be_loaded(saved):
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, in_channels=3, num_attention_heads=2, attention_head_dim=8, num_layers=1
    )
    transformer.register_to_config(num_classes=2)
    PetDiffusionPipeline(transformer, AdaptiveEDMScheduler()).save_pretrained(saved)
    assert type(PetDiffusionPipeline.from_pretrained(saved).transformer) is diffusers.DiTTransformer2DModel


def test_what_is_downloaded_is_checked_too(saved, monkeypatch):
    # diffusers downloads the files of a Hub id into a folder of its cache, and then reads the index again.
    write_component(saved, "scheduler", "EDMEulerScheduler", {"num_train_timesteps": 10**9})
    monkeypatch.setattr(PetDiffusionPipeline, "download", lambda *args, **kwargs: saved)
    with pytest.raises(ValueError, match="`num_train_timesteps` must be"):
        PetDiffusionPipeline.from_pretrained("user/pets")


@pytest.mark.parametrize(
    ("name", "class_name", "config", "message"),
    [
        (
            "transformer",
            "DiTTransformer2DModel",
            {**DIT, "attention_head_dim": 4096, "num_attention_heads": 16},
            r"at most 2,000,000,000 parameters, but this configuration has [\d,]+ \([\d,]+ GB in float32\)",
        ),
        ("transformer", "DiTTransformer2DModel", {**DIT, "patch_size": 0}, "ZeroDivisionError: integer"),
        (
            "transformer",
            "DiTTransformer2DModel",
            {**DIT, "norm_type": "layer"},
            "NotImplementedError: Forward",
        ),
        ("scheduler", "EDMDPMSolverMultistepScheduler", {"sigma_schedule": "linear"}, "UnboundLocalError"),
        ("guider", "ClassifierFreeGuidance", {"start": "late"}, "TypeError"),
    ],
)
def test_components_that_cannot_be_built_are_refused_before_their_weights_are_read(
    saved, name, class_name, config, message
):
    # Without weights of these names, diffusers allocates all parameters.
    save_file({"x": torch.zeros(1)}, saved / "transformer" / "diffusion_pytorch_model.safetensors")
    write_component(saved, name, class_name, config)
    with pytest.raises(ValueError, match=message) as error_info:
        PetDiffusionPipeline.from_pretrained(saved)
    assert "\n" not in str(error_info.value)


def diffusers_folder(tmp_path: Path) -> Path:
    """Returns a folder of a pipeline of diffusers whose weights are a pickle."""
    model = diffusers.UNet2DModel(
        8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    diffusers.DDPMPipeline(model, DDPMScheduler()).save_pretrained(
        tmp_path / "ddpm", safe_serialization=False
    )
    return tmp_path / "ddpm"


@pytest.mark.parametrize("library", ["diffusers", "ddpm"])
def test_a_pipeline_cannot_be_a_component(saved, tmp_path, monkeypatch, library):
    # diffusers passes `use_safetensors` to models, but not to pipelines inside of pipelines.
    inner = saved / "guider"
    shutil.copytree(diffusers_folder(tmp_path), inner)
    read = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args) or {})
    index = json.loads((saved / "model_index.json").read_text())
    # diffusers takes its own module `ddpm` even if the folder has a file of this name.
    (inner / "ddpm.py").write_text("")
    index["guider"] = [library, "DDPMPipeline"]
    (saved / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="`guider` must be an available subclass of BaseGuidance"):
        PetDiffusionPipeline.from_pretrained(saved)
    assert not read


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 40_000}, "must be at most 16,777,216, but is 4,800,000,000"),
        ({"num_classes": 10**9}, r"parameters, but this configuration has 16,000,0\d\d,\d\d\d \(64 GB"),
        ({"attention_head_dim": 10**6}, "parameters, but this configuration has"),
        ({"attention_head_dim": 10**9}, "cannot be built from its configuration: RuntimeError: Storage size"),
        ({"decoder_layers": 1, "decoder_channels": 10**6}, "parameters, but this configuration has"),
        (
            {"sample_size": 128, "patch_size": 64, "frequency_variances": 12288 * [1.0]},
            "must be at most 4,096, but is 12,288",
        ),
        ({"num_layers": "8"}, "`num_layers` must be an integer"),
    ],
)
def test_a_model_that_would_exhaust_memory_is_refused_with_the_figure(saved, config, message):
    path = saved / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(ValueError, match=message):
        PetDiffusionPipeline.from_pretrained(saved)
