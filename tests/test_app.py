"""What the web page does: drawing, classifying, reading uploads, and HTML."""

import io
import math
import os
import re
import sys
import threading
import time

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DDPMScheduler
from PIL import Image
from support.page import decoded, image_bytes, join_queue, pixels

import pet_pipeline
from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.sampling import (
    GUIDANCE_SCHEDULES,
    SCHEDULERS,
    SampleSettings,
    generate,
    image_settings,
    scheduler_by_name,
)
from pet_pipeline.training.data import ImageDataset


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")

gradio = pytest.importorskip("gradio", reason="Gradio is not installed")
from pet_pipeline.app import handlers, html, tasks  # noqa: E402
from pet_pipeline.app.page import build_app  # noqa: E402
from pet_pipeline.app.server import serve  # noqa: E402


def download_links(text: str) -> list[tuple[str, str]]:
    return re.findall(r'href="([^"]*)" download="([^"]*)"', text)


# Sampling


def test_a_downloaded_image_can_be_made_again(pipeline, tmp_path):
    # With churn, which draws from the generators after the starting noise.
    pipeline.scheduler = AdaptiveEDMScheduler(solver="euler", s_churn=10.0)
    pipeline.save_pretrained(tmp_path / "model")
    settings = SampleSettings(4, 2.5, "constant", 0.5, negative_class="dog")
    samples = tasks.sample(pipeline, ["cat"], 3, 5, settings)
    links = download_links(html.samples_html(samples, model=html.model_settings(pipeline)))
    assert [name for _, name in links] == ["cat-5.png", "cat-6.png", "cat-7.png"]
    (tmp_path / "cat-6.png").write_bytes(decoded(links[1][0]))
    words = ["generate", "--model", str(tmp_path / "model"), "--like", str(tmp_path / "cat-6.png")]
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    with Image.open(tmp_path / "again" / "cat-6.png") as again:
        assert (pixels(samples.rows["cat"][1]) - pixels(again)).abs().max() <= 1
    assert image_settings(tmp_path / "cat-6.png") == image_settings(tmp_path / "again" / "cat-6.png")


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_evaluations_are_counted_as_the_model_sees_them(pipeline, scheduler):
    seen = []
    pipeline.transformer.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    for schedule in GUIDANCE_SCHEDULES:
        seen.clear()
        settings = SampleSettings(6, 2.0, schedule, pag_scale=0.5, scheduler=scheduler)
        assert sum(seen) == 0
        samples = tasks.sample(pipeline, ["cat", "dog"], 2, 0, settings)
        assert samples.evaluations * 4 == sum(seen)
        assert samples.step == samples.num_steps


def test_a_model_that_was_tuned_to_few_steps_takes_its_own_and_no_guidance(pipeline):
    tuned = PetDiffusionPipeline(
        pipeline.transformer,
        AdaptiveEDMScheduler(solver="consistency"),
        id2label=pipeline.id2label,
        guidance_scale=1.0,
        num_inference_steps=2,
    )
    page = handlers.Handlers(tuned)
    about = page.guidance_html(page.settings)
    assert page.settings.steps == 2 and "2 evaluations" in about and "takes no other" in about
    assert tasks.sample(tuned, ["cat"], 1, 0, page.settings).evaluations == 2
    components = build_app(tuned).config["components"]
    values = [item["props"].get("value") for item in components]
    assert "Compare 1, 2, 3 and 4 steps" in values and "Classify" not in values
    assert [value for value in values if "predictions no longer tell classes apart" in str(value)]
    shown = [
        item["props"]["label"] for item in components if item["type"] == "slider" and item["props"]["visible"]
    ]
    assert set(shown) == {"Images of each class", "Steps", "Strength", "Variants"}
    *_, (_, grid, pictures, _) = page.edit(
        Image.new("RGB", (8, 8)), "dog", 0.5, 3, 0, False, *values_of(page)
    )
    assert len(pictures) == 3 and 'data-event="edit"' in grid and 'data-event="classify"' not in grid


def values_of(page: handlers.Handlers) -> list:
    """The values of the inputs at the start."""
    return [
        option.none_label if getattr(page.settings, name) is None else getattr(page.settings, name)
        for name, option in SampleSettings.options().items()
    ]


def test_classes_without_a_name_go_by_their_id(pipeline):
    unnamed = PetDiffusionPipeline(pipeline.transformer, pipeline.scheduler, id2label={0: "cat"})
    settings = SampleSettings(3, negative_class="1")
    samples = tasks.sample(unnamed, ["cat", "1"], 1, 0, settings)
    expected = tasks.sample(pipeline, ["cat", "dog"], 1, 0, SampleSettings(3, negative_class="dog"))
    assert samples.rows["1"][0].tobytes() == expected.rows["dog"][0].tobytes()
    build_app(PetDiffusionPipeline(pipeline.transformer, pipeline.scheduler))


def test_each_step_is_reported_and_the_last_one_is_the_image(pipeline):
    reports = []
    samples = tasks.sample(pipeline, ["dog", "cat"], 2, 3, SampleSettings(5), reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert list(samples.rows) == ["dog", "cat"] and len(samples.rows["cat"]) == 2
    for name, row in samples.rows.items():
        for image, denoised in zip(row, reports[-1].rows[name]):
            assert (pixels(image) - pixels(denoised)).abs().max() <= 1
    for picture, strip in zip(samples.pictures, samples.strips, strict=True):
        assert strip.size == (5 * 8, 2 * 8)
        assert (pixels(strip)[-8:, -8:] - pixels(picture.image)).abs().max() <= 1


@pytest.mark.parametrize(("steps", "width"), [(1, 1), (12, 12), (40, 12)])
def test_a_strip_has_a_bounded_number_of_steps_with_the_first_and_the_last(pipeline, steps, width):
    reports = []
    samples = tasks.sample(pipeline, ["dog"], 1, 3, SampleSettings(steps), reports.append)
    strip = pixels(samples.strips[0])
    assert samples.strips[0].size == (width * 8, 16)
    for column, report in ((0, reports[0]), (-1, reports[-1])):
        denoised = strip[8:].unflatten(1, (width, 8))[:, column]
        assert (denoised - pixels(report.rows["dog"][0])).abs().max() <= 1


@pytest.mark.parametrize("scheduler", [None, "heun", "consistency"])
def test_an_edit_is_that_of_the_pipeline(pipeline, scheduler):
    image = Image.effect_noise((8, 8), 80).convert("RGB")
    if scheduler == "consistency":  # saved with a model that was tuned to few steps
        tuned, scheduler = AdaptiveEDMScheduler(solver="consistency"), None
        pipeline = PetDiffusionPipeline.from_pipe(pipeline, scheduler=tuned)
        settings = SampleSettings(4, 1.0)
    else:
        settings = SampleSettings(10, 2.0, scheduler=scheduler)
    seen = []
    pipeline.transformer.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    reports = []
    samples = tasks.sample(pipeline, ["dog"], 2, 7, settings, reports.append, image=image, strength=0.3)
    assert samples.evaluations * 2 == sum(seen) and samples.original is image
    assert len(reports) == reports[0].num_steps == samples.num_steps
    pipeline.scheduler = scheduler_by_name(scheduler, pipeline.scheduler)
    expected = generate(
        pipeline, [(1, 7), (1, 8)], image=image, strength=0.3, **settings.call_arguments(pipeline)
    )
    for picture, (_, seed, edited) in zip(samples.pictures, expected, strict=True):
        assert picture.seed == seed
        assert (pixels(picture.image) - pixels(edited)).abs().max() <= 1
    # The PNG of an edit keeps no settings: without its original, it could not be made again.
    text = html.samples_html(samples, model=html.model_settings(pipeline))
    links = download_links(text)
    assert [name for _, name in links] == ["dog-7-edited.png", "dog-8-edited.png"]
    assert b"weights" not in decoded(links[0][0])
    assert text.index("The original") < text.index("dog, seed 7")


def test_the_strip_of_an_edit_begins_with_the_image_under_noise(pipeline):
    image = Image.new("RGB", (8, 8), "red")
    samples = tasks.sample(pipeline, ["dog"], 8, 0, SampleSettings(20), image=image, strength=0.05)
    noisy = torch.stack([pixels(strip)[:8, :8] for strip in samples.strips]).float()
    red, green, blue = noisy.mean((0, 1, 2)).tolist()
    assert red > 200 and max(green, blue) < 60


@pytest.mark.parametrize(
    ("image", "name", "strength", "message"),
    [
        (None, "dog", 0.5, "Choose an image first"),
        (Image.new("RGB", (8, 8)), None, 0.5, "no class None"),
        (Image.new("RGB", (8, 8)), ["dog"], 0.5, "no class"),
        (Image.new("RGB", (8, 8)), "dog", 0, "strength must be from 0.05 to 1"),
        (Image.new("RGB", (8, 8)), "dog", None, "strength must be from 0.05 to 1"),
        (Image.new("RGB", (8, 8)), "dog", 1.5, "strength must be from 0.05 to 1"),
    ],
)
def test_an_edit_that_is_out_of_bounds_is_explained(pipeline, image, name, strength, message):
    page = handlers.Handlers(pipeline)
    edit = handlers.explained(page.edit, 4)
    ((status, *rest),) = edit(image, name, strength, 1, 0, False, *values_of(page))
    assert re.search(message, status) and "pet-error" in status
    assert all(item == gradio.skip() for item in rest)


def test_an_error_of_the_server_is_told_without_its_secrets_and_logged(caplog):
    def handler():
        raise RuntimeError("/secret/path")
        yield

    ((status, _),) = handlers.explained(handler, 2)()
    assert "its log says why" in status and "secret" not in status
    assert "/secret/path" in caplog.text


def test_requests_share_the_weights_and_nothing_else(pipeline):
    before = dict(vars(pipeline.scheduler))
    alone = tasks.sample(pipeline, ["cat"], 1, 0, SampleSettings(6))
    steps = tasks.stream(lambda report: tasks.sample(pipeline, ["cat"], 1, 0, SampleSettings(6), report))
    next(steps)
    tasks.sample(pipeline, ["dog"], 1, 9, SampleSettings(3, scheduler="heun"))  # in the middle of the other
    *_, between = steps
    assert between.rows["cat"][0].tobytes() == alone.rows["cat"][0].tobytes()
    assert vars(pipeline.scheduler).keys() == before.keys()
    assert pipeline.scheduler.config.solver == "multistep"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], 1, 0), "Choose at least one class"),
        ((["cat", "dog"], 9, 0), "9 images of 2 classes are 18 images, but this page draws at most 16"),
        ((["cat"], None, 0), "from 1 to 16, but is None"),
        ((["cat"], 0, 0), "from 1 to 16"),
        ((["cat"], 1, -1), "seed must be from 0"),
        ((["cat"], 1, None), "seed must be from 0"),
        ((["bird"], 1, 0), "no class 'bird'"),
        (("cat", 1, 0), "Choose at least one class"),
        (([["cat"]], 1, 0), "no class"),
        ((["cat"], "1", 0), "from 1 to 16, but is '1'"),
        ((["cat"], 1, math.nan), "seed must be from 0"),
    ],
)
def test_what_is_out_of_bounds_is_refused(pipeline, request_, message):
    with pytest.raises(ValueError, match=message):
        tasks.sample(pipeline, *request_, SampleSettings(1))


def test_values_of_inputs_become_settings_or_are_refused():
    good = [7, 2.5, "adaptive", 0.5, 1.5, "no class", "as saved"]
    names = ["cat", "dog"]
    settings = handlers.settings_from_inputs(good, names)
    assert settings == SampleSettings(7, 2.5, pag_scale=0.5, autoguidance_scale=1.5)
    assert handlers.settings_from_inputs([7.0, *good[1:5], "dog", "heun"], names) == SampleSettings(
        7, 2.5, pag_scale=0.5, autoguidance_scale=1.5, negative_class="dog", scheduler="heun"
    )
    numbers = (None, "7", [7], math.nan, math.inf, -1, 101, 10**400)
    texts = (None, 1, "x", ["adaptive"], {}, "bird")
    for index, wrong in enumerate([numbers, numbers, texts, numbers, numbers, texts, texts]):
        for value in wrong:
            with pytest.raises(ValueError, match="must be from|has no choice"):
                handlers.settings_from_inputs([*good[:index], value, *good[index + 1 :]], names)


def test_work_that_nobody_waits_for_ends():
    steps = []

    def work(report):
        for step in range(1000):
            report(step)
            steps.append(step)
            time.sleep(0.01)

    running = tasks.stream(work)
    assert [next(running), next(running)] == [0, 1]
    running.close()
    time.sleep(0.05)
    count = len(steps)
    assert count < 10
    time.sleep(0.05)
    assert len(steps) == count


def test_who_cancels_does_not_wait_for_the_work():
    may_go_on = threading.Event()

    def work(report):
        report(1)
        may_go_on.wait(10)
        report(2)

    running = tasks.stream(work)
    assert next(running) == 1
    began = time.perf_counter()
    running.close()
    assert time.perf_counter() - began < 5
    may_go_on.set()


def test_a_page_that_is_not_served_any_more_stops_its_work(pipeline):
    evaluations = []
    pipeline.transformer.register_forward_hook(lambda module, args, output: evaluations.append(None))
    values = [["cat"], 1, 0, False, 100, 1.0, "constant", 0.0, 1.0, "no class", "as saved"]
    with serve(pipeline) as url:
        pipeline.transformer.register_forward_hook(lambda module, args, output: time.sleep(0.05))
        evaluations.clear()
        join_queue(url, "generate", values, "session")
        while not evaluations:
            time.sleep(0.01)
    time.sleep(0.2)
    count = len(evaluations)
    time.sleep(0.2)
    assert len(evaluations) == count < 90


def test_work_gives_its_result_or_its_error():
    assert list(tasks.stream(lambda report: [report(1), report(2), 3][-1])) == [1, 2, 3]
    with pytest.raises(ValueError, match="wrong"):
        list(
            tasks.stream(lambda report: int("x") if report(1) else (_ for _ in ()).throw(ValueError("wrong")))
        )


# Classification


def test_classification_tells_how_far_it_is_and_can_be_ended(pipeline):
    classifier = PetClassificationPipeline.from_pipe(pipeline)
    image, reports = Image.effect_noise((8, 8), 50), []
    output = tasks.classify(classifier, image, 32, 3, reports.append)
    assert reports == list(range(0, output.num_evaluations[0], tasks.CLASSIFIER_BATCH))
    alone = classifier(
        image, num_evaluations=32, generator=torch.Generator().manual_seed(3), return_evidence=True
    )
    assert output.probabilities[0] == pytest.approx(alone.probabilities[0], abs=1e-4)
    assert "pixel_errors" not in vars(classifier)
    evaluations = []
    pipeline.transformer.register_forward_hook(lambda *args: evaluations.append(time.sleep(0.05)))
    running = tasks.stream(lambda report: tasks.classify(classifier, image, 256, 0, report))
    next(running)
    running.close()
    time.sleep(0.3)
    assert len(evaluations) <= 2


@pytest.mark.parametrize(
    ("request_", "message"),
    [((0, 0), "from 2 to 256"), ((258, 0), "from 2 to 256"), ((3, 0), "even number"), ((2, None), "seed")],
)
def test_a_classification_that_is_out_of_bounds_is_refused(pipeline, request_, message):
    with pytest.raises(ValueError, match=message):
        tasks.classify(PetClassificationPipeline.from_pipe(pipeline), Image.new("RGB", (8, 8)), *request_)


def test_the_page_classifies_with_the_calibration_of_the_model(pipeline, monkeypatch):
    made, from_pipe = [], PetClassificationPipeline.from_pipe

    def make(pipeline):
        made.append(from_pipe(pipeline))
        return made[0]

    monkeypatch.setattr(PetClassificationPipeline, "from_pipe", make)
    calibration = {"weights": [1.0] * 8}
    pipeline.register_to_config(calibration=calibration)
    build_app(pipeline)
    assert made[0].config.calibration == calibration


# Uploads and HTML


def test_an_upload_is_read_and_removed(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(image_bytes(Image.new("RGB", (40, 30), "red"), "JPEG"))
    image = tasks.read_upload(path)
    assert image.size == (40, 30) and image.getpixel((0, 0))[0] > 200
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "is not an image in JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image in JPEG, PNG"),
        (image_bytes(Image.new("RGB", (4, 4)), "TIFF"), "is not an image in JPEG, PNG"),
        (image_bytes(Image.effect_noise((64, 64), 50), "PNG")[:500], "cannot be read as an image"),
        (image_bytes(Image.effect_noise((64, 64), 50), "PNG")[:20], "cannot be read as an image: Truncated"),
        (image_bytes(Image.effect_noise((64, 64), 50), "JPEG")[:30], "cannot be read as an image: Truncated"),
        (image_bytes(Image.effect_noise((64, 64), 50), "WEBP")[:90], "cannot be read as an image: could not"),
        (image_bytes(Image.new("1", (5000, 5000)), "PNG"), "has 5000×5000 pixels"),
        (image_bytes(Image.new("1", (20000, 20000)), "PNG"), "is not an image in|pixels"),
    ],
)
def test_a_bad_upload_is_one_message_and_removed(tmp_path, content, message):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error_info:
        tasks.read_upload(path)
    assert str(tmp_path) not in str(error_info.value) and "\n" not in str(error_info.value)
    assert not path.exists()
    with pytest.raises(ValueError, match="cannot be read as an image: No such file") as error_info:
        tasks.read_upload(path)
    assert str(tmp_path) not in str(error_info.value)


def test_a_chosen_image_stays_as_long_as_its_page(pipeline):
    blocks = build_app(pipeline).blocks.values()
    times = [block.time_to_live for block in blocks if isinstance(block, gradio.State)]
    assert times == [math.inf] * 5  # the pictures of three tabs, and the chosen images of two


def test_names_are_no_markup(model):
    name = '<b>"cat" ![](https://example.com)'
    pipeline = PetDiffusionPipeline(model, AdaptiveEDMScheduler(), id2label={0: name, 1: "dog"})
    samples = tasks.sample(pipeline, [name], 1, 0, SampleSettings(1))
    edited = tasks.sample(
        pipeline, [name], 1, 0, SampleSettings(1), image=samples.rows[name][0], strength=0.5
    )
    actions = ("edit", "classify")
    for text in (
        html.samples_html(samples, actions, {}),
        html.samples_html(edited, actions, {}),
        html.examples_html([(samples.rows[name][0], name)]),
        html.chosen_html(samples.rows[name][0], name),
        *handlers.chosen_outputs(samples.rows[name][0], name)[:2],
        html.error_html(name),
    ):
        assert "<b>" not in text and "&lt;b&gt;&quot;cat&quot;" in text
    contents = [
        (component["type"], component["props"].get("value") or "")
        for component in build_app(pipeline).config["components"]
    ]
    assert not [text for kind, text in contents if kind == "html" and "<b>" in text]
    # An image in Markdown is no HTML, and would be fetched.
    assert not [text for kind, text in contents if kind == "markdown" and "cat" in text]
    assert [text for kind, text in contents if kind == "html" and "by diffusion: &lt;b&gt;" in text]


def test_pictures_of_a_comparison_are_known_as_soon_as_they_are_drawn(pipeline):
    settings = [2, 1.0, "adaptive", 0.0, 1.0, "no class", "as saved"]
    steps = handlers.Handlers(pipeline).compare_two(["cat"], 1, 5, False, *settings, *settings)
    shown = [(pictures, seed) for _, _, pictures, seed in steps]
    assert shown[0] == ([], 5)
    changes = [pictures for pictures, _ in shown if isinstance(pictures, list)]
    assert [len(pictures) for pictures in changes] == [0, 1, 2, 2]
    assert all(not isinstance(seed, int) for _, seed in shown[1:])  # what is typed meanwhile stays


def test_an_image_that_is_chosen_again_is_another_to_the_page():
    image = Image.new("RGB", (8, 8))
    assert handlers.chosen_outputs(image, "x")[2] is not image


def test_a_copy_of_a_training_image_is_told(pipeline):
    samples = tasks.sample(pipeline, ["cat"], 2, 0, SampleSettings(4))
    known = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    train = ImageDataset(known, torch.zeros(20).long(), ["cat"])
    assert "0 of the 2 samples count as copies" in html.neighbors_html(samples.pictures, train)
    known[7] = pixels(samples.rows["cat"][1]).permute(2, 0, 1).flip(-1).byte()  # mirrored
    text = html.neighbors_html(samples.pictures, train)
    assert "1 of the 2 samples count as copies" in text and "1: 0.00" in text
    content = decoded(re.findall(r'src="([^"]*)" alt="training image 1 closest to cat, seed 1"', text)[0])
    assert torch.equal(pixels(Image.open(io.BytesIO(content))).permute(2, 0, 1).byte(), known[7])


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"scheduler": DDPMScheduler()}, "must be an EDM scheduler"),
        ({"guider": ClassifierFreeGuidance()}, "has a guider, ClassifierFreeGuidance"),
        ({"pag_scale": 100.0}, "saved `pag_scale` must be from 0 to 8, but is 100"),
    ],
)
def test_a_model_that_the_page_cannot_steer_is_refused(pipeline, component, message):
    variable = os.environ.get("GRADIO_TEMP_DIR")
    other = PetDiffusionPipeline(**{**pipeline.components, **component})
    with pytest.raises(ValueError, match=message), serve(other):
        pass
    assert os.environ.get("GRADIO_TEMP_DIR") == variable


def test_the_command_tells_what_is_wrong(pipeline, tmp_path, capsys, monkeypatch):
    pipeline.save_pretrained(tmp_path / "model")
    with serve(pipeline) as url:
        port = re.search(r":(\d+)/", url)[1]
        assert main(["app", "--model", str(tmp_path / "model"), "--port", port]) == 1
    error = capsys.readouterr().err
    assert "port" in error and error.count("\n") == 1
    monkeypatch.setattr(pet_pipeline, "app", pet_pipeline.app)  # which the import below replaces
    for name in [name for name in sys.modules if name.startswith("pet_pipeline.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--model", str(tmp_path / "model")]) == 1
    assert 'pip install ".[app]"' in capsys.readouterr().err
