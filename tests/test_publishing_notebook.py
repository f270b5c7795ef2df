"""The notebook of a trained pipeline: its cells run, without Jupyter."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import random_model
from diffusers import DiffusionPipeline
from PIL import Image
from support.hub_server import TOKEN
from support.loading import ROOT

from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.publishing.notebook import render_notebook
from pet_pipeline.publishing.push import push_folder


def code_of(notebook: str) -> list[str]:
    """Returns the cells of code; the notebook must be one of the format 4.5, as nbformat checks it."""
    content = json.loads(notebook)
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5) and "metadata" in content
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in content["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        is_code = cell["cell_type"] == "code"
        assert set(cell) == common | ({"execution_count", "outputs"} if is_code else set())
        assert is_code or cell["cell_type"] == "markdown"
        assert "{{" not in "".join(cell["source"]) and "```" not in "".join(cell["source"])
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def displayed(cell: str, namespace: dict) -> object:
    """Runs a cell, and returns what Jupyter would show: the value of its last line."""
    *lines, last = cell.splitlines()
    try:
        compile(last, "last", "eval")
    except SyntaxError:
        return exec(cell, namespace)
    exec("\n".join(lines), namespace)
    return eval(last, namespace)


@pytest.mark.parametrize("kind", ["class-conditional", "unconditional", "tuned"])
def test_the_notebook_shows_what_the_model_can_do(kind, pipeline, monkeypatch):
    if kind == "unconditional":
        model = random_model(num_classes=1)
        pipeline = PetDiffusionPipeline(model, AdaptiveEDMScheduler(), guidance_scale=1.0)
    if kind == "tuned":
        pipeline.scheduler = AdaptiveEDMScheduler(solver="consistency")
        pipeline.register_to_config(guidance_scale=1.0, num_inference_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    loaded = []

    def load(name: str, trust_remote_code: bool, custom_pipeline: str | None = None) -> DiffusionPipeline:
        loaded.append((name, trust_remote_code))
        return pipeline if custom_pipeline is None else PetClassificationPipeline.from_pipe(pipeline)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
    namespace: dict = {}
    cells = code_of(render_notebook("pets", pipeline))
    shown = [displayed(cell, namespace) for cell in cells]
    rows = 1 if kind == "unconditional" else 2
    assert shown[0] is None and shown[1].size == (4 * 128, rows * 128)
    assert set(loaded) == {("pets", True)}
    if kind == "unconditional":
        assert len(shown) == 2
    elif kind == "tuned":
        assert len(shown) == 3 and shown[2].size == (4 * 128, 3 * rows * 128)
    else:
        assert shown[2].size == (4 * 128, 3 * rows * 128)
        halves = [shown[2].crop((0, top, 512, top + 256)).tobytes() for top in (0, 256, 512)]
        assert len(set(halves)) == 3  # the strengths differ
        (probabilities,) = shown[3]
        assert set(probabilities) == {"cat", "dog"} and sum(probabilities.values()) == pytest.approx(1)


def test_a_pushed_notebook_runs_without_the_package(hub, saved, pipeline, tmp_path):
    (saved / "notebook.ipynb").write_text(render_notebook(saved.name, pipeline))
    push_folder(saved, "pets")
    repository = hub.repositories["user/pets"]
    code = "\n".join(code_of(repository.files["notebook.ipynb"].decode()))
    assert code.count(f'"user/pets", revision="{repository.hashes[1]}", trust_remote_code=True') == 2
    # A later commit with other code does not reach what is pinned.
    for name in list(repository.files):
        if name.endswith(".py"):
            repository.files[name] = b"raise SystemExit('code of a later commit was run')\n"
    without = "import sys\nsys.modules['pet_pipeline'] = None\n"
    end = f"""
from diffusers import AutoModel
grid(images).save("grid.png")
print(type(classify).__module__, classify(images[0]).labels)
options = dict(revision={repository.hashes[1]!r}, trust_remote_code=True)
print(type(AutoModel.from_pretrained("user/pets", subfolder="transformer", **options)).__name__)
"""
    result = subprocess.run(
        [sys.executable, "-c", without + code + end],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("diffusers_modules.") and re.search(r"\['(cat|dog)'\]", result.stdout)
    assert result.stdout.split()[-1] == "PetTransformer2DModel"
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (512, 256)
