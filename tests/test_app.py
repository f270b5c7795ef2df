"""The web page: its functions, and the page itself in a browser."""

import base64
import io
import json
import math
import os
import re
import socket
import sys
import tempfile
import threading
import time
from itertools import product
from pathlib import Path

import httpx
import pytest
import torch
from conftest import random_model
from diffusers import ClassifierFreeGuidance, DDPMScheduler
from PIL import Image
from support.browser import chromium

import pet_pipeline
from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import main
from pet_pipeline.evaluation.reference import load_reference
from pet_pipeline.sampling import GUIDANCE_SCHEDULES, SCHEDULERS, SampleSettings, image_settings


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")

gradio = pytest.importorskip("gradio", reason="Gradio is not installed")
from pet_pipeline.app import gate, handlers, html, tasks  # noqa: E402
from pet_pipeline.app.page import build_app  # noqa: E402
from pet_pipeline.app.server import SPACE_PROXIES, serve  # noqa: E402


def pixels(image: Image.Image) -> torch.Tensor:
    image = image.convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size, 3).int()


def decoded(url: str) -> bytes:
    assert url.startswith("data:image/png;base64,")
    return base64.b64decode(url.partition(",")[2])


# Sampling


def test_a_downloaded_image_can_be_made_again(pipeline, tmp_path):
    # With churn, which draws from the generators after the starting noise.
    pipeline.scheduler = AdaptiveEDMScheduler(solver="euler", s_churn=10.0)
    pipeline.save_pretrained(tmp_path / "model")
    settings = SampleSettings(4, 2.5, "constant", 0.5, negative_class="dog")
    samples = tasks.sample(pipeline, ["cat"], 3, 5, settings)
    links = re.findall(
        r'href="([^"]*)" download="([^"]*)"', html.samples_html(samples, html.model_settings(pipeline))
    )
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
    assert samples.strip.width > 5 * 8 and samples.strip.height > 4 * 8


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
    good = [7, 2.5, "adaptive", 0.5, "no class", "as saved"]
    names = ["cat", "dog"]
    settings = handlers.settings_from_inputs(good, names)
    assert settings == SampleSettings(7, pag_scale=0.5)
    assert handlers.settings_from_inputs([7.0, *good[1:4], "dog", "heun"], names) == SampleSettings(
        7, pag_scale=0.5, negative_class="dog", scheduler="heun"
    )
    numbers = (None, "7", [7], math.nan, math.inf, -1, 101, 10**400)
    texts = (None, 1, "x", ["adaptive"], {}, "bird")
    for index, wrong in enumerate([numbers, numbers, texts, numbers, texts, texts]):
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
    values = [["cat"], 1, 0, False, 100, 1.0, "constant", 0.0, "no class", "as saved"]
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


def image_bytes(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


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
    assert [block.time_to_live for block in blocks if isinstance(block, gradio.State)] == [math.inf]


def test_names_are_no_markup(model):
    name = '<b>"cat" ![](https://example.com)'
    pipeline = PetDiffusionPipeline(model, AdaptiveEDMScheduler(), id2label={0: name, 1: "dog"})
    samples = tasks.sample(pipeline, [name], 1, 0, SampleSettings(1))
    for text in (html.samples_html(samples, {}), html.examples_html([(samples.rows[name][0], name)])):
        assert "<b>" not in text and "&lt;b&gt;&quot;cat&quot;" in text
    contents = [
        (component["type"], component["props"].get("value") or "")
        for component in build_app(pipeline).config["components"]
    ]
    assert not [text for kind, text in contents if kind == "html" and "<b>" in text]
    # An image in Markdown is no HTML, and would be fetched.
    assert not [text for kind, text in contents if kind == "markdown" and "cat" in text]
    assert [text for kind, text in contents if kind == "html" and "by diffusion: &lt;b&gt;" in text]


def test_a_copy_of_a_training_image_is_told(pipeline):
    samples = tasks.sample(pipeline, ["cat"], 2, 0, SampleSettings(2))
    known = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    assert "0 of the 2 samples count as copies" in html.neighbors_html(samples, known)
    known[7] = pixels(samples.rows["cat"][1]).permute(2, 0, 1).flip(-1).byte()  # mirrored
    text = html.neighbors_html(samples, known)
    assert "1 of the 2 samples count as copies" in text and "1: 0.00" in text
    assert decoded(re.findall(r'src="([^"]*)" alt="training image 1 closest to cat, seed 1"', text)[0])


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"scheduler": DDPMScheduler()}, "must be one of EDM"),
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
    assert 'pip install "pet-pipeline[app]"' in capsys.readouterr().err


# Without a browser


SETTINGS = [2.5, "adaptive", 0.0, "no class", "as saved"]
HEAVY = [["cat"], 1, 0, False, 100, *SETTINGS]


def join_queue(
    url: str, name: str, values: list, session: str, event: object = None, address: str = "127.0.0.1"
) -> httpx.Response:
    """Asks for an event as the page does; the server trusts what this machine tells about the address."""
    dependencies = httpx.get(url + "config").json()["dependencies"]
    (index,) = (item["id"] for item in dependencies if item["api_name"] == name)
    request = {"data": values, "fn_index": index, "session_hash": session, "event_data": event}
    headers = {"X-Forwarded-For": address}
    return httpx.post(url + "gradio_api/queue/join", json=request, headers=headers, timeout=20)


def listen(url: str, session: str) -> str:
    return httpx.get(url + f"gradio_api/queue/data?session_hash={session}", timeout=60).text


def upload(url: str, content: bytes, name: str = "cat.png", **kwargs) -> httpx.Response:
    return httpx.post(url + "gradio_api/upload", files={"files": (name, content)}, timeout=20, **kwargs)


def test_only_so_many_wait(pipeline, monkeypatch):
    monkeypatch.setattr("pet_pipeline.app.server.MAX_QUEUE", 3)
    pipeline.transformer.register_forward_hook(lambda module, args, output: time.sleep(0.05))
    with serve(pipeline) as url:
        answers = [
            join_queue(url, "generate", HEAVY, f"session-{index}", address=f"203.0.113.{index}")
            for index in range(6)
        ]
    assert [answer.status_code for answer in answers].count(503) >= 2
    assert "Queue is full" in answers[-1].text and answers[0].status_code == 200


@pytest.mark.parametrize("address", ["203.0.113.{}", "2001:db8:0:{}::1"])
def test_a_visitor_has_a_limited_number_of_jobs(pipeline, address):
    pipeline.transformer.register_forward_hook(lambda module, args, output: time.sleep(0.05))
    with serve(pipeline) as url:
        # Each job comes with another session, as sessions are invented by the visitor.
        answers = [
            join_queue(url, "generate", HEAVY, f"session-{index}", address=address.format(1))
            for index in range(10)
        ]
        other = join_queue(url, "generate", HEAVY, "other", address=address.format(2))
    assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 6
    assert "4 of your requests are waiting" in answers[-1].json()["detail"]
    assert other.status_code == 200


def test_the_visitors_of_one_ipv6_network_count_as_one():
    addresses = (
        "2001:db8::1",
        "2001:db8::ffff:2",
        "2001:db8:0:1::1",
        "::ffff:1.2.3.4",
        "::ffff:1.2.3.5",
        "x",
    )
    visitors = [gate.visitor_address({"client": (address, 1)}) for address in addresses]
    assert visitors[0] == visitors[1] and len(set(visitors)) == 5


def test_jobs_to_which_nobody_listens_are_dropped(pipeline, monkeypatch):
    monkeypatch.setattr("pet_pipeline.app.gate.LISTEN_SECONDS", 0.5)
    pipeline.transformer.register_forward_hook(lambda module, args, output: time.sleep(0.02))
    with serve(pipeline) as url:
        for index in range(4):
            assert join_queue(url, "generate", HEAVY, f"session-{index}").status_code == 200
        time.sleep(1.0)  # all four would take 8 s
        began = time.monotonic()
        assert join_queue(url, "generate", [*HEAVY[:4], 2, *SETTINGS], "heard").status_code == 200
        assert '"success":true' in listen(url, "heard")
        assert time.monotonic() - began < 3
        # What is listened to goes on for longer than that.
        assert join_queue(url, "generate", HEAVY, "heard").status_code == 200
        assert '"success":true' in listen(url, "heard")


def test_no_file_is_served(pipeline):
    with serve(pipeline) as url:
        path = upload(url, b"content").json()[0]
        assert httpx.get(f"{url}gradio_api/file={path}").status_code == 404


def test_visitors_may_upload_the_same_file(pipeline):
    content = image_bytes(Image.new("RGB", (8, 8)), "PNG")
    with serve(pipeline) as url:
        paths = [upload(url, content).json()[0] for _ in range(2)]
        for path in paths:
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            join_queue(url, "take_upload", [file], "session")
            assert '"success":true' in listen(url, "session")
            assert not Path(path).exists()


def test_a_file_that_was_not_uploaded_is_refused(pipeline, tmp_path, capfd):
    (tmp_path / "private.png").write_bytes(b"content")
    with serve(pipeline) as url:
        stored = upload(url, b"content").json()[0]
        paths = (
            str(tmp_path / "private.png"),
            "https://example.com/large.png",
            "data:image/png;base64,AAAA",
            os.environ["GRADIO_TEMP_DIR"],
            str(Path(stored).parent),
            stored + "\0",
            None,
        )
        for path, kind in product(paths, ("gradio.FileData", "gradio.ImageData", None)):
            file = {"path": path, "url": "https://example.com/", "meta": {"_type": kind}, "is_stream": True}
            for job, data in (("take_upload", [file]), ("generate", [[{"x": [file]}], *HEAVY[1:]])):
                answer = join_queue(url, job, data, "session")
                assert answer.status_code == 400 and "Upload it again" in answer.json()["detail"]
    assert (tmp_path / "private.png").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_job_that_is_cancelled_twice_does_not_count_against_the_visitor(pipeline, monkeypatch):
    monkeypatch.setattr("pet_pipeline.app.gate.MAX_VISITOR_JOBS", 1)
    # Gradio does this after each job, and the second cancel arrives in the middle.
    monkeypatch.setattr("gradio.queueing.Queue.compute_analytics_summary", lambda *args: time.sleep(0.5))
    evaluations = []
    with serve(pipeline) as url:
        pipeline.transformer.register_forward_hook(lambda *args: (evaluations.append(None), time.sleep(0.05)))
        for number in range(2):
            session = f"session-{number}"
            event = join_queue(url, "generate", HEAVY, session).json()
            assert "event_id" in event, event
            listener = threading.Thread(target=listen, args=(url, session))
            listener.start()
            evaluations.clear()
            while not evaluations:
                time.sleep(0.01)
            body = {"session_hash": session, "fn_index": 0, **event}
            cancels = [
                threading.Thread(target=httpx.post, args=(url + "gradio_api/cancel",), kwargs={"json": body})
                for _ in range(5)
            ]
            for thread in cancels:
                thread.start()
                time.sleep(0.15)
            for thread in (*cancels, listener):
                thread.join(20)


@pytest.mark.parametrize("session", ["", "\ud800", "a<gradio-sep>b", "a" * 65])
def test_a_forged_session_is_refused_and_harms_nobody(pipeline, capfd, session):
    request = {"data": [*HEAVY[:4], 1, *SETTINGS], "fn_index": 0, "event_data": None}
    with serve(pipeline) as url:
        content = json.dumps({**request, "session_hash": session})  # httpx would not encode every name
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(url + "gradio_api/queue/join", content=content, headers=headers)
        assert answer.status_code == 400 and "The name of a session" in answer.json()["detail"]
        for _ in range(6):
            assert join_queue(url, "generate", request["data"], "session").status_code == 200
            assert '"success":true' in listen(url, "session")
    assert "Traceback" not in capfd.readouterr().err


def test_a_cancel_in_the_first_step_ends_the_work(pipeline):
    values = [["cat"], 1, 0, False, 100, 1.0, "constant", 0.0, "no class", "as saved"]
    evaluations = []
    with serve(pipeline) as url:
        pipeline.transformer.register_forward_hook(lambda *args: (evaluations.append(None), time.sleep(1)))
        answer = join_queue(url, "generate", values, "session")
        body = {"session_hash": "session", "event_id": answer.json()["event_id"]}
        address = url + "gradio_api/queue/data?session_hash=session"
        listener = threading.Thread(target=lambda: httpx.get(address, timeout=60))  # as the page has one
        listener.start()
        while not evaluations:
            time.sleep(0.01)
        (index,) = (
            item["id"]
            for item in httpx.get(url + "config").json()["dependencies"]
            if item["api_name"] == "generate"
        )
        httpx.post(url + "gradio_api/cancel", json={**body, "fn_index": index})
        time.sleep(2.5)
        assert len(evaluations) == 1
    listener.join(20)
    assert not listener.is_alive()


def test_the_model_serves_one_request_at_a_time(pipeline):
    running, most = 0, 0

    def enter(*args) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)

    def leave(*args) -> None:
        nonlocal running
        running -= 1

    settings = [4, 1.0, "constant", 0.0, "no class", "as saved"]
    with serve(pipeline) as url:
        pipeline.transformer.register_forward_pre_hook(enter)
        pipeline.transformer.register_forward_hook(leave)
        join_queue(url, "generate", [["cat"], 1, 0, False, *settings], "first")
        join_queue(url, "compare_two", [["cat"], 1, 0, False, *settings, *settings], "second")
        for session in ("first", "second"):
            httpx.get(f"{url}gradio_api/queue/data?session_hash={session}", timeout=60)
    assert most == 1 and running == 0


@pytest.mark.parametrize("steps", [None, 1000])
def test_an_emptied_field_leaves_nothing_in_the_log(pipeline, capfd, steps):
    with serve(pipeline) as url:
        join_queue(url, "draw_guidance", [steps, *SETTINGS], "session")
        assert "Steps must be from 1 to 100" in listen(url, "session")
    assert "Traceback" not in capfd.readouterr().err


def test_the_plot_of_the_guidance_waits_in_the_queue_and_is_drawn_once(pipeline, monkeypatch):
    drawn, draw = [], handlers.guidance_figure

    def guidance_figure(*args):
        drawn.append(args)
        return draw(*args)

    monkeypatch.setattr("pet_pipeline.app.handlers.guidance_figure", guidance_figure)
    with serve(pipeline) as url:
        drawn.clear()
        values = [7, *SETTINGS]
        answer = httpx.post(url + "gradio_api/run/draw_guidance", json={"data": values})
        assert answer.status_code == 404 and not drawn
        for session in ("first", "second"):
            join_queue(url, "draw_guidance", values, session)
            assert "evaluations of the model" in listen(url, session)
    assert len(drawn) == 1


@pytest.mark.parametrize(
    "event", [{"index": -1}, {"index": 8}, {"index": "0"}, {"index": None}, {"index": 0.5}, {}, None, [0]]
)
def test_a_forged_example_is_refused(pipeline, capfd, event):
    with serve(pipeline) as url:
        join_queue(url, "take_example", [], "session", event)
        answer = listen(url, "session")
        join_queue(url, "take_example", [], "session", {"index": 1})
        assert '"success":true' in listen(url, "session")
    assert "There is no such example." in answer and '"success":false' in answer
    assert "Traceback" not in capfd.readouterr().err


def test_uploads_that_are_not_read_are_bounded(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serve(pipeline) as url:
        other = Path(upload(url, b"content", headers={"X-Forwarded-For": "203.0.113.1"}).json()[0])
        paths = [Path(upload(url, b"content").json()[0]) for _ in range(20)]
        assert [path.exists() for path in (other, *paths)] == [True] + [False] * 16 + [True] * 4
        for index in range(2, 20):
            upload(url, b"content", headers={"X-Forwarded-For": f"203.0.113.{index}"})
        assert not other.exists()
        assert sum(path.is_file() for path in tmp_path.rglob("*")) == 16
        assert len(list(paths[-1].parent.parent.iterdir())) == 16
    assert not list(tmp_path.iterdir())


def test_an_upload_that_is_not_read_is_removed_after_a_while(pipeline, monkeypatch):
    monkeypatch.setattr("pet_pipeline.app.gate.UPLOAD_SECONDS", 0.5)
    with serve(pipeline) as url:
        path = Path(upload(url, b"content").json()[0])
        assert path.read_bytes() == b"content"
        time.sleep(1)
        assert not path.parent.exists()


MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
PART = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (PART % b"files" + bytes(6 * 2**20) + b"\r\n--x--", 413),
        (PART % b"files" + bytes(5 * 2**20 + 1) + b"\r\n--x--", 413),
        ((PART % b"files" + b"\r\n") * 2 + b"--x--", 400),
        (PART % b"other" + b"\r\n--x--", 400),
        (PART % b"files" + bytes(2**20), 400),
        (b"", 400),
    ],
    ids=["large", "a byte too large", "two files", "other field", "without an end", "empty"],
)
def test_a_forged_upload_is_refused_and_leaves_nothing(pipeline, tmp_path, monkeypatch, capfd, body, status):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serve(pipeline) as url:
        answer = httpx.post(url + "gradio_api/upload", content=body, headers=MULTIPART, timeout=20)
        assert answer.status_code == status
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "Traceback" not in capfd.readouterr().err


def open_upload(url: str, num_bytes: int = 1000) -> socket.socket:
    """Opens an upload and sends only its beginning."""
    host, port = re.search(r"//(.*):(\d+)/", url).groups()
    connection = socket.create_connection((host, int(port)))
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {2 * num_bytes}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in MULTIPART.items())
    connection.sendall(head.encode() + b"\r\n" + PART % b"files" + bytes(num_bytes))
    return connection


def test_half_uploads_are_few_and_end(pipeline, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serve(pipeline) as url:
        half = [open_upload(url) for _ in range(4)]
        time.sleep(0.5)
        assert upload(url, b"content").status_code == 429
        assert upload(url, b"content", headers={"X-Forwarded-For": "203.0.113.1"}).status_code == 200
        for connection in half:
            connection.close()
        time.sleep(0.5)
        assert upload(url, b"content").status_code == 200
        monkeypatch.setattr("pet_pipeline.app.gate.UPLOAD_SECONDS", 0.5)
        with open_upload(url) as connection:
            connection.settimeout(10)
            assert b" 408 " in connection.recv(1000)
        monkeypatch.setattr("pet_pipeline.app.gate.MAX_UPLOADS", 0)
        assert upload(url, b"content").status_code == 429
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("name", "stored"), [("../../x.png", "x.png"), ("..", "image"), ("/", "file")])
def test_the_name_of_an_upload_stays_in_its_folder(pipeline, name, stored):
    with serve(pipeline) as url:
        path = Path(upload(url, b"content", name).json()[0])
        assert path.name == stored and path.parent.parent == Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.mark.parametrize(
    "route",
    [
        "call/generate",
        "call/v2/generate",
        "component_server",
        "deep_link",
        "proxy=https://example.com/",
        "runs",
    ],
)
def test_what_the_page_does_not_use_is_closed(pipeline, route):
    with serve(pipeline) as url:
        assert httpx.get(f"{url}gradio_api/{route}").status_code == 404
        assert httpx.post(f"{url}gradio_api/{route}", json={"data": []}).status_code == 404


def test_a_job_that_does_not_exist_is_refused(pipeline, capfd):
    changes = (
        {"fn_index": 99},
        {"fn_index": -1},
        {"fn_index": 1, "data": []},  # this one cancels in the browser alone
        {"data": []},
        {"data": [*HEAVY, 1]},
    )
    request = {"data": HEAVY, "fn_index": 0, "session_hash": "session", "event_data": None}
    with serve(pipeline) as url:
        for change in changes:
            answer = httpx.post(url + "gradio_api/queue/join", json={**request, **change})
            assert answer.status_code == 400 and "no such job" in answer.text, change
    assert "Traceback" not in capfd.readouterr().err


def test_forged_values_are_explained_and_leave_nothing_in_the_log(pipeline, capfd):
    with serve(pipeline) as url:
        for index, value in product((0, 1, 2, 4, 6, 8), (None, "x", [[]], {}, 10**18, -1)):
            join_queue(url, "generate", [*HEAVY[:index], value, *HEAVY[index + 1 :]], "session")
            answer = listen(url, "session")
            assert '"success":false' in answer, (index, value)
            assert re.search("must be from|no choice|no class|at least one class", answer), (index, value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("route", ["gradio_api/queue/join", "login"])
def test_a_large_request_is_refused(pipeline, route):
    with serve(pipeline) as url:
        content = PART % b"file" + bytes(2**20) + b"\r\n--x--"
        answer = httpx.post(url + route, content=content, headers=MULTIPART, timeout=20)
    assert answer.status_code == 413


@pytest.mark.parametrize("before", [None, "192.0.2.1"])
def test_a_space_trusts_its_proxies(pipeline, monkeypatch, before):
    monkeypatch.setenv("SPACE_ID", "somebody/space")
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if before is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", before)
    with serve(pipeline):
        assert os.environ["FORWARDED_ALLOW_IPS"] == (before or SPACE_PROXIES)
    assert os.environ.get("FORWARDED_ALLOW_IPS") == before


# In a browser


class Server:
    """The page of a tiny model whose evaluations can be slowed down and are counted."""

    def __init__(self, folder: Path, image_folder: Path) -> None:
        self.folder = folder
        self.delay = 0.0
        self.evaluations = 0
        self.pipeline = PetDiffusionPipeline(
            random_model(), AdaptiveEDMScheduler(), id2label={0: "cat", 1: "dog"}
        )
        self.pipeline.transformer.register_forward_hook(self.count)
        self.reference = load_reference(str(image_folder), ["cat", "dog"], 8, cache_dir=str(folder / "cache"))
        self.connections: list[object] = []

    def count(self, module, args, output) -> None:
        self.evaluations += 1
        time.sleep(self.delay)

    def wait_until_idle(self) -> None:
        """Returns when the model has nothing to do; the slowest work of the tests would take over 10 s."""
        for _ in range(10):
            before = self.evaluations
            time.sleep(0.4)
            if self.evaluations == before:
                return
        raise AssertionError("The work goes on.")

    def uploads(self) -> list[Path]:
        return [path for path in (self.folder / "temporary").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def running(browser, tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("app")
    server = Server(folder, image_folder)
    (folder / "temporary").mkdir()
    active = True

    def audit(event: str, args: tuple) -> None:
        if active and event == "socket.connect":
            server.connections.append(args[1])

    sys.addaudithook(audit)  # for the rest of the process
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        with serve(server.pipeline, server.reference) as server.url:
            yield server
        active = False
        # Nothing stays on disk, and nothing has left this machine.
        assert not list((folder / "temporary").iterdir())
    addresses = [address[0] for address in server.connections if isinstance(address, tuple)]
    assert addresses and set(addresses) <= {"127.0.0.1", "::1"}


@pytest.fixture
def server(running):
    running.delay = 0.0
    running.wait_until_idle()
    running.evaluations = 0
    return running


@pytest.fixture
def open_page(server, browser):
    """Opens the page in a browser of its own; no request may leave this machine, no script may fail."""
    contexts, requests, errors = [], [], []

    def open_page(width: int = 1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.get_by_role("button", name="Generate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    foreign = [url for url in requests if not url.startswith((server.url, "data:", "blob:"))]
    assert requests and not foreign
    assert not errors


def set_number(page, label: str, value: int) -> None:
    field = page.get_by_label(label, exact=True).locator("visible=true")
    field.fill(str(value))
    field.press("Tab")


def fix_seed(page, seed: int) -> None:
    page.get_by_label("Draw a new seed each time").locator("visible=true").uncheck()
    set_number(page, "Seed", seed)


def test_generate_in_the_page(server, open_page, tmp_path):
    page = open_page()
    server.delay = 0.05
    page.get_by_label("dog", exact=True).uncheck()
    set_number(page, "number input for Images of each class", 2)
    set_number(page, "number input for Steps", 6)
    fix_seed(page, 5)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile("Step [1-5] of 6")).wait_for()
    assert page.get_by_role("img", name="cat, seed 5").count()  # while it is drawn
    link = page.get_by_role("link", name="Download cat-6.png")
    link.wait_for()
    assert page.get_by_role("link", name="Download").count() == 2
    assert "2 images in" in page.get_by_role("status").first.inner_text()
    expected = tasks.sample(server.pipeline, ["cat"], 2, 5, SampleSettings(6))
    assert f"{expected.evaluations} evaluations" in page.get_by_role("status").first.inner_text()
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "cat-6.png")
    with Image.open(tmp_path / "cat-6.png") as image:
        assert image.tobytes() == expected.rows["cat"][1].tobytes()
    assert image_settings(tmp_path / "cat-6.png")["seed"] == 6
    shown = link.get_by_role("img")
    assert shown.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert shown.evaluate("image => image.width / image.naturalWidth") >= 3
    strip = page.get_by_role("img", name=re.compile("at every step"))
    assert strip.evaluate("image => image.naturalWidth") > 6 * 8
    page.get_by_role("img", name="training image 1 closest to cat, seed 5").wait_for()


def test_the_plot_of_the_guidance_follows_the_settings(open_page):
    page = open_page()
    plot = page.get_by_role("img", name=re.compile("Strength of the guidance"))
    before = plot.get_attribute("src")
    page.get_by_text("25 evaluations of the model for each image").wait_for()
    page.get_by_label("Guidance schedule").locator("visible=true").click()
    page.get_by_role("option", name="constant").click()
    page.get_by_text("36 evaluations of the model for each image").wait_for()
    assert plot.get_attribute("src") != before
    assert "from 2.5 to 2.5" in plot.get_attribute("alt")


def test_a_request_that_cannot_be_met_is_explained(open_page):
    page = open_page()
    page.get_by_label("cat", exact=True).uncheck()
    page.get_by_label("dog", exact=True).uncheck()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Choose at least one class.").wait_for()


def test_cancel_stops_the_work(server, open_page):
    page = open_page()
    server.delay = 0.1
    set_number(page, "number input for Steps", 100)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile("Step [2-9] of 100")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    server.wait_until_idle()
    assert server.evaluations < 60
    assert not page.get_by_role("link", name="Download").count()
    server.delay = 0.0
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("img", name="training image 1 closest to cat").first.wait_for()
    assert page.get_by_role("link", name="Download").count()
    # Beside images that are drawn stands nothing of those before.
    server.delay = 0.1
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile("Step [2-9] of 100")).wait_for()
    assert not page.get_by_role("img", name=re.compile("at every step|closest")).count()
    page.get_by_role("button", name="Cancel").click()


def test_a_page_that_is_closed_stops_its_work(server, open_page):
    page = open_page()
    server.delay = 0.1
    set_number(page, "number input for Steps", 100)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile("Step [2-9] of 100")).wait_for()
    page.close()
    server.wait_until_idle()
    assert server.evaluations < 100


def test_compare_in_the_page(server, open_page):
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    fix_seed(page, 3)
    set_number(page, "number input for Images of each class", 1)
    page.get_by_role("button", name="Compare A and B").click()
    page.get_by_text(re.compile("All use the same seeds, from 3 on")).wait_for()
    links = page.get_by_role("link", name="Download cat-3.png")
    contents = [decoded(link.get_attribute("href")) for link in links.all()]
    for content, scale in zip(contents, (1.0, 3.0), strict=True):
        expected = tasks.sample(server.pipeline, ["cat"], 1, 3, SampleSettings(guidance_scale=scale))
        with Image.open(io.BytesIO(content)) as image:
            assert (pixels(image) - pixels(expected.rows["cat"][0])).abs().max() <= 1
    page.get_by_role("button", name="Compare 5, 10, 20 and 40 steps").click()
    page.get_by_role("heading", name="40 steps").wait_for()
    page.get_by_text(re.compile("steps 40, guidance scale 1.* 40 evaluations")).wait_for()
    assert page.get_by_role("link", name="Download dog-3.png").count() == 4


def test_classify_in_the_page(server, open_page, image_folder):
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    page.locator("input[type=file]").set_input_files(image_folder / "cat" / "03.png")
    status = page.get_by_role("status").locator("visible=true").first
    page.get_by_text(re.compile("evaluations of the model in")).wait_for()
    classifier = PetClassificationPipeline(
        server.pipeline.transformer, server.pipeline.scheduler, id2label={0: "cat", 1: "dog"}
    )
    generator = torch.Generator().manual_seed(0)
    # The page shows the evidence, for which nothing is stopped early.
    output = classifier(image_folder / "cat" / "03.png", adaptive=False, generator=generator)
    label = output.labels[0]
    assert f"{label}: {output.probabilities[0][label]:.1%}, after {output.num_evaluations[0]}" in (
        status.inner_text()
    )
    assert page.get_by_role("meter").count() == 2
    for name in ("The image as the model sees it", "Where the image speaks for", "Errors of each class"):
        assert page.get_by_role("img", name=re.compile(name)).evaluate("image => image.naturalWidth") > 0
    assert not server.uploads()
    first = status.inner_text()
    page.get_by_role("button", name="Example 4, unseen dog").press("Enter")
    page.wait_for_function("([text, old]) => text.innerText != old", arg=[status.element_handle(), first])


def test_the_image_that_was_chosen_last_is_classified(server, open_page):
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    server.delay = 0.2
    page.get_by_role("button", name="Example 1,").click()
    page.get_by_text("of 64 evaluations").wait_for()
    page.get_by_role("button", name="Example 4,").click()
    chosen = page.get_by_role("img", name=re.compile("^Example 4,")).get_attribute("src")
    page.wait_for_function("src => document.querySelector('.pet-pixels')?.src == src", arg=chosen)


def test_a_classification_is_cancelled_and_ends_with_its_page(server, open_page):
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    set_number(page, "number input for Evaluations for each class", 256)
    server.delay = 0.2
    page.get_by_role("button", name="Example 1,").click()
    page.get_by_text(re.compile("16 of 512 evaluations")).wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    server.wait_until_idle()
    assert server.evaluations < 20
    page.get_by_role("button", name="Classify again").click()
    page.get_by_text(re.compile("16 of 512 evaluations")).wait_for()
    page.close()
    server.wait_until_idle()
    assert server.evaluations < 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "is not an image in JPEG, PNG"),
        (bytes(6 * 2**20), "exceed the maximum allowed size of 5"),
    ],
)
def test_a_bad_upload_is_explained_in_the_page(server, open_page, content, message, tmp_path, capfd):
    (tmp_path / "bad.png").write_bytes(content)
    page = open_page()
    page.get_by_role("tab", name="Classify").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "bad.png")
    alert = page.get_by_test_id("toast-body")
    alert.wait_for()
    assert re.search(message, alert.inner_text())
    assert "Traceback" not in capfd.readouterr().err
    assert not server.uploads()


def test_two_clients_at_once(server, open_page):
    pages = [open_page(), open_page()]
    server.delay = 0.02
    for seed, page in enumerate(pages):
        fix_seed(page, 10 * seed)
        page.get_by_role("button", name="Generate").click()
    for seed, page in enumerate(pages):
        link = page.get_by_role("link", name=f"Download dog-{10 * seed}.png")
        expected = tasks.sample(server.pipeline, ["dog"], 1, 10 * seed, SampleSettings())
        with Image.open(io.BytesIO(decoded(link.get_attribute("href")))) as image:
            assert (pixels(image) - pixels(expected.rows["dog"][0])).abs().max() <= 1


UNNAMED = """() => [...document.querySelectorAll("input, textarea, select, button, img, [role=slider]")]
    .filter(e => e.checkVisibility() && !e.closest("[aria-hidden=true]"))
    .filter(e => !(e.labels && e.labels.length && e.labels[0].innerText.trim()) && !e.ariaLabel && !e.title
        && !e.alt && !e.innerText.trim() && !e.ariaLabelledByElements?.length)
    .map(e => e.outerHTML.slice(0, 200))"""


def test_the_page_is_for_keyboards_and_screen_readers(open_page):
    page = open_page()
    assert page.evaluate("document.documentElement.lang") and page.title() == "pet_pipeline"
    for tab in ("Generate", "Compare", "Classify"):
        page.get_by_role("tab", name=tab).focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        assert page.get_by_role("tab", name=tab).get_attribute("aria-selected") == "true"
        assert page.evaluate(UNNAMED) == []
        assert page.get_by_role("status").count()
    page.get_by_role("tab", name="Generate").press("Enter")
    page.get_by_label("range slider for Steps").locator("visible=true").press("ArrowLeft")
    visited = []
    for _ in range(40):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.innerText"))
        if visited[-1] == "Generate":
            break
    assert visited[-1] == "Generate"
    page.keyboard.press("Enter")
    link = page.get_by_role("link", name="Download").first
    link.wait_for()
    settings = decoded(link.get_attribute("href"))
    assert b'"steps": 17' in settings


def test_the_page_fits_a_phone(open_page):
    page = open_page(width=390)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("link", name="Download").first.wait_for()
    for tab in ("Generate", "Compare", "Classify"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
