"""Export: the files draw and classify as PyTorch does, alone and in a browser, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import random_model
from diffusers import ClassifierFreeGuidance, EDMEulerScheduler
from onnxruntime import InferenceSession
from PIL import Image
from support.browser import chromium
from support.onnx_sampling import draw
from support.static_page import served

from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.export import onnx_models, web_page
from pet_pipeline.export.onnx_models import export_onnx
from pet_pipeline.export.plan import sampling_plan
from pet_pipeline.probe_pet import PetLinearProbe
from pet_pipeline.sampling import SampleSettings


def complete_pipeline() -> PetDiffusionPipeline:
    """A pipeline with a guide and a probe."""
    torch.manual_seed(0)
    probe = PetLinearProbe(token_dim=16, layer=1, sigmas=[0.1, 0.3])
    torch.nn.init.normal_(probe.linear.weight)
    pipe = PetDiffusionPipeline(
        random_model(),
        AdaptiveEDMScheduler(),
        id2label={0: "cat", 1: "<i>dog</i>"},
        guide=random_model(1),
        probe=probe,
        autoguidance_scale=1.5,
        num_inference_steps=4,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The exports `float32` and `int8` of a pipeline."""
    folder = tmp_path_factory.mktemp("export")
    pipe = complete_pipeline()
    export_onnx(pipe, folder / "float32", classifier=PetClassificationPipeline.from_pipe(pipe))
    # An export takes seconds; what it does to the matrices does not.
    shutil.copytree(folder / "float32", folder / "int8")
    for path in (folder / "int8").glob("*.onnx"):
        model = onnx.load(path)
        onnx_models._store_in_eight_bits(model.graph)
        onnx.save(model, path)
    return folder


@pytest.mark.parametrize(
    "scheduler",
    [
        {"solver": "multistep"},
        {"solver": "euler", "sigma_schedule": "exponential"},
        {"solver": "euler", "s_churn": 2.0, "s_noise": 1.003},
        {"solver": "consistency"},
        {"solver": "multistep", "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min"},
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        SampleSettings(),
        SampleSettings(autoguidance_scale=1.0, negative_class="cat", guidance_schedule="constant"),
        SampleSettings(guidance_scale=1.0, steps=1),
        SampleSettings(guidance_scale=1.0, autoguidance_scale=1.0),
    ],
)
def test_the_files_draw_what_the_pipeline_draws(exported, tmp_path, scheduler, settings):
    pipe = complete_pipeline()
    pipe.scheduler = AdaptiveEDMScheduler(**scheduler)
    if scheduler["solver"] == "consistency":
        settings = SampleSettings(steps=settings.steps, guidance_scale=1.0, autoguidance_scale=1.0)
    plan = sampling_plan(pipe, settings)
    networks = ["transformer.onnx", *(["guide.onnx"] if pipe.autoguidance_scale != 1 else [])]
    for name in networks:
        (tmp_path / name).symlink_to(exported / "float32" / name)
    (tmp_path / "sampling.json").write_text(json.dumps({**plan, "files": networks}))

    labels, generator = [0, 1, 1], torch.Generator().manual_seed(0)
    noises = [torch.randn(3, 3, 8, 8, generator=generator).numpy() for _ in range(5)]
    images = draw(tmp_path, labels, noises)
    expected = pipe(
        labels,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **settings.call_arguments(pipe),
    ).images.numpy()
    np.testing.assert_allclose(images, expected, atol=1e-4 * np.abs(expected).max())


def test_the_classifier_gives_the_log_odds_of_the_probe(exported):
    pipe = complete_pipeline()
    images = torch.rand(5, 3, 8, 8)
    session = InferenceSession(exported / "float32" / "classifier.onnx")
    log_odds = session.run(None, {"images": 2 * images.numpy() - 1})[0]
    output = PetClassificationPipeline.from_pipe(pipe)(images, method="features")
    expected = torch.tensor([[row[name] for name in pipe.class_names] for row in output.probabilities])
    torch.testing.assert_close(torch.tensor(log_odds).softmax(1), expected, atol=1e-5, rtol=0)


def test_int8_makes_smaller_files_that_draw_almost_the_same(exported):
    noises = [np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)]
    images = [draw(exported / weights, [0, 1], noises) for weights in ("float32", "int8")]
    assert 0 < np.abs(images[0] - images[1]).max() < 0.1 * np.abs(images[0]).max()
    for name in ("transformer.onnx", "classifier.onnx"):
        sizes = [(exported / weights / name).stat().st_size for weights in ("float32", "int8")]
        # Much of a tiny file describes the graph, which is not smaller.
        assert sizes[1] < sizes[0]


def test_what_a_plan_cannot_describe_is_refused(saved, tmp_path, capsys):
    pipe = complete_pipeline()
    for scheduler in (AdaptiveEDMScheduler(solver="heun"), EDMEulerScheduler()):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match="multistep, euler or consistency"):
            export_onnx(pipe, tmp_path / "new")
    pipe.scheduler = AdaptiveEDMScheduler()
    with pytest.raises(ValueError, match="cannot describe perturbed-attention guidance: use --pag_scale 0"):
        export_onnx(pipe, tmp_path / "new", SampleSettings(pag_scale=0.5))
    pipe.guider = ClassifierFreeGuidance()
    with pytest.raises(ValueError, match="cannot describe a guider"):
        export_onnx(pipe, tmp_path / "new", SampleSettings(autoguidance_scale=1.0))
    words = ["export", str(saved), "--scheduler", "heun", "--out", str(tmp_path / "new")]
    assert main(words) == 1
    assert "multistep, euler or consistency" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_file_that_differs_from_pytorch_is_an_error(pipeline, tmp_path, monkeypatch):
    export, programs = torch.onnx.export, []

    def export_once(*args, **kwargs):
        if not programs:
            programs.append(export(*args, **kwargs))
        return programs[0]

    monkeypatch.setattr(torch.onnx, "export", export_once)
    for value, difference in ((1, "[0-9.]+"), (np.nan, "nan")):

        def spoil(graph: onnx.GraphProto, value: float = value) -> None:
            (bias,) = (tensor for tensor in graph.initializer if tensor.name.endswith("model.proj_out.bias"))
            bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, value, np.float32), bias.name))

        monkeypatch.setattr(onnx_models, "_store_in_eight_bits", spoil)
        with pytest.raises(ValueError, match=f"differs from PyTorch by {difference} of the root mean square"):
            export_onnx(pipeline, tmp_path, weights="int8")
        assert not any(tmp_path.iterdir())


def test_a_probe_of_a_block_that_does_not_exist_is_one_error(tmp_path):
    pipe = complete_pipeline()
    pipe.register_modules(probe=PetLinearProbe(token_dim=16, layer=7))
    with pytest.raises(ValueError, match="must be in .0, 1., but there is 7"):
        networks = onnx_models._Classifier(PetClassificationPipeline.from_pipe(pipe))
        onnx_models._write(
            networks, {"images": torch.zeros(2, 3, 8, 8)}, "log_odds", tmp_path / "c.onnx", "int8"
        )


def test_other_files_are_not_touched(saved, tmp_path, capsys):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    assert main(["export", str(saved), "--web", "--out", str(saved)]) == 1
    assert "holds other files; choose a folder that is new or empty" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}


def test_the_command_prints_the_differences(saved, tmp_path, capsys):
    out = tmp_path / "new" / "exported"
    out.mkdir(parents=True)
    for name in ("sampling.json", "guide.onnx"):  # of an earlier export
        (out / name).write_text("{}")
    assert main(["export", str(saved), "--weights", "int8", "--steps", "3", "--out", str(out)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "transformer.onnx: 0." in first and first.endswith("(tolerance 0.1)")
    assert second.startswith("The model has no probe")
    plan = json.loads((out / "sampling.json").read_text())
    assert len(plan["steps"]) == 3
    assert plan["files"] == {"transformer.onnx": (out / "transformer.onnx").stat().st_size}
    assert not (out / "guide.onnx").exists()


def test_a_page_without_npm_is_one_error(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(web_page.shutil, "which", lambda name: None)
    assert main(["export", str(saved), "--web", "--out", str(tmp_path / "out")]) == 1
    assert "needs `npm`" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())


# The page


@pytest.fixture(scope="module")
def page_files(tmp_path_factory) -> Path:
    """The files of the page without those of a model."""
    folder = tmp_path_factory.mktemp("page")
    try:
        web_page.write_page(folder)
    except OSError as error:
        assert "404" not in str(error)  # the runtime does not exist
        pytest.skip(str(error))
    return folder


@pytest.fixture
def address(exported, page_files):
    """The address of the page of the int8 export, served by this machine."""
    shutil.copytree(page_files, exported / "int8", dirs_exist_ok=True)
    with served(exported / "int8") as url:
        yield url


def page_noise(seed: int, number: int) -> np.ndarray:
    """The normal numbers of the page: mulberry32 and the Box-Muller transform."""
    state, uniform = seed, []
    for _ in range(number):
        state = (state + 0x6D2B79F5) % 2**32
        bits = (state ^ state >> 15) * (state | 1) % 2**32
        bits ^= (bits + (bits ^ bits >> 7) * (bits | 61)) % 2**32
        uniform.append(((bits ^ bits >> 14) + 0.5) / 2**32)
    radius = np.sqrt(-2 * np.log(uniform[0::2]))
    angle = 2 * np.pi * np.array(uniform[1::2])
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).flatten()


def test_the_page_draws_and_classifies_on_its_own(exported, address, tmp_path):
    from playwright.sync_api import expect

    seconds = 60_000
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        requests, problems = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        # The name of a class is no HTML.
        page.get_by_label("<i>dog</i>").check(timeout=seconds)
        page.get_by_label("Images").fill("2")
        page.get_by_label("Seed").fill("7")
        page.get_by_label("Seed").press("Enter")
        expect(page.locator("#status")).to_have_text(re.compile("^2 images in .* s"), timeout=seconds)
        assert page.evaluate("crossOriginIsolated")
        shown = page.evaluate(
            "[...document.querySelectorAll('#images canvas')].map(canvas => "
            "[...canvas.getContext('2d').getImageData(0, 0, 8, 8).data])"
        )
        shown = np.array(shown, np.uint8).reshape(2, 8, 8, 4)
        noises = [np.stack([page_noise(7 + i, 192).reshape(3, 8, 8) for i in range(2)]).astype(np.float32)]
        expected = (draw(exported / "int8", [1, 1], noises).clip(-1, 1) + 1) * 127.5
        assert (shown[..., 3] == 255).all()
        difference = np.abs(shown[..., :3] - expected.transpose(0, 2, 3, 1))
        assert difference.max() < 2 and expected.std() > 20

        page.get_by_role("button", name="What is it?").nth(1).click()
        expect(page.locator("#answer")).to_have_text(re.compile("^This is a"), timeout=seconds)
        pixels = shown[1:, ..., :3].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        session = InferenceSession(exported / "int8" / "classifier.onnx")
        log_odds = torch.tensor(session.run(None, {"images": pixels})[0][0])
        texts = [f"{100 * share:.1f} %" for share in log_odds.softmax(0).tolist()]
        assert [text.strip() for text in page.locator("#probabilities td").all_inner_texts()] == texts

        (tmp_path / "no.png").write_bytes(b"no image")
        page.locator("#file").set_input_files(tmp_path / "no.png")
        expect(page.locator("#answer")).to_have_text("no.png is not an image that this browser can read.")
        Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
        page.evaluate(
            "hidden = [];"
            "new MutationObserver(() => hidden.push(result.hidden)).observe(result, { attributes: true })"
        )
        page.locator("#file").set_input_files(tmp_path / "red.png")
        expect(page.locator("#answer")).to_have_text(re.compile("^This is a"), timeout=seconds)
        assert page.evaluate("hidden") == [True, False]  # no image stands beside the result of another
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert all(url.startswith((address, "blob:" + address)) for url in requests)
        assert problems == []


def test_the_page_adds_fresh_noise_and_shows_grey_images(page_files, tmp_path):
    from playwright.sync_api import expect

    pipe = PetDiffusionPipeline(
        random_model(in_channels=1),
        AdaptiveEDMScheduler(solver="consistency"),
        guidance_scale=1.0,
        num_inference_steps=2,
    )
    export_onnx(pipe, tmp_path)
    shutil.copytree(page_files, tmp_path, dirs_exist_ok=True)
    with served(tmp_path) as url, chromium() as browser:
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("Images").fill("1")
        page.get_by_role("button", name="Generate", exact=True).click(timeout=60_000)
        expect(page.locator("#status")).to_have_text(re.compile("^1 image in"), timeout=60_000)
        shown = page.evaluate(
            "[...document.querySelector('#images canvas').getContext('2d').getImageData(0, 0, 8, 8).data]"
        )
        assert not page.locator("#classification").is_visible()
    shown = np.array(shown, np.uint8).reshape(8, 8, 4)
    noises = list(page_noise(0, 128).reshape(2, 1, 1, 8, 8).astype(np.float32))
    expected = (draw(tmp_path, [0], noises)[0, 0].clip(-1, 1) + 1) * 127.5
    assert (shown[..., 3] == 255).all()
    assert np.abs(shown[..., :3] - expected[..., None]).max() < 2 and expected.std() > 20


def test_a_job_of_the_page_can_be_cancelled_and_fail(exported, address):
    from playwright.sync_api import expect

    with chromium() as browser:
        page = browser.new_page()
        held = []
        page.context.route("**/guide.onnx", lambda route: held.append(route))  # a download that does not come
        page.goto(address)
        page.get_by_label("cat").check(timeout=60_000)
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_disabled()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_have_text("Cancelled.")
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_focused()
        assert page.locator("#images figure").count() == 0
        page.context.unroute("**/guide.onnx")
        page.context.route("**/guide.onnx", lambda route: route.fulfill(status=404))
        page.get_by_role("button", name="Generate", exact=True).click()
        failed = re.compile("^This did not work: guide.onnx could not be downloaded: 404")
        expect(page.locator("#status")).to_have_text(failed, timeout=60_000)
        page.context.unroute("**/guide.onnx")
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(page.locator("#status")).to_have_text(re.compile("^4 images in"), timeout=60_000)
