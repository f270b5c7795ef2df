"""The server of the web page: forged requests, limits for each visitor, and uploads."""

import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from itertools import product
from pathlib import Path

import httpx
import pytest
from conftest import random_model, tiny_pipeline
from PIL import Image
from support.page import HEAVY, SETTINGS, image_bytes, join_queue, listen, upload


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")

gradio = pytest.importorskip("gradio", reason="Gradio is not installed")
from pet_pipeline.app import gate, handlers  # noqa: E402
from pet_pipeline.app.server import SPACE_PROXIES, serve  # noqa: E402


@pytest.fixture(scope="module")
def url():
    """The address of a page that tests share which change nothing of it."""
    with serve(tiny_pipeline(random_model())) as address:
        yield address


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


def test_no_file_is_served(url):
    path = upload(url, b"content").json()[0]
    assert httpx.get(f"{url}gradio_api/file={path}").status_code == 404


def test_visitors_may_upload_the_same_file(url):
    content = image_bytes(Image.new("RGB", (8, 8)), "PNG")
    paths = [upload(url, content).json()[0] for _ in range(2)]
    for path, job in zip(paths, ("take_upload", "take_upload_1")):  # to edit, and to classify
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        join_queue(url, job, [file], "session")
        assert "The image is cat.png" in listen(url, "session")
        assert not Path(path).exists()


def test_a_file_that_was_not_uploaded_is_refused(url, tmp_path, capfd):
    (tmp_path / "private.png").write_bytes(b"content")
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
        for job, data in (
            ("take_upload", [file]),
            ("take_upload_1", [file]),
            ("generate", [[{"x": [file]}], *HEAVY[1:]]),
            ("edit", [file, "cat", 0.5, *HEAVY[1:]]),
        ):
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
def test_a_forged_session_is_refused_and_harms_nobody(url, capfd, session):
    request = {"data": [*HEAVY[:4], 1, *SETTINGS], "fn_index": 0, "event_data": None}
    content = json.dumps({**request, "session_hash": session})  # httpx would not encode every name
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(url + "gradio_api/queue/join", content=content, headers=headers)
    assert answer.status_code == 400 and "The name of a session" in answer.json()["detail"]
    for _ in range(6):
        assert join_queue(url, "generate", request["data"], "session").status_code == 200
        assert '"success":true' in listen(url, "session")
    assert "Traceback" not in capfd.readouterr().err


def test_a_cancel_in_the_first_step_ends_the_work(pipeline):
    values = [["cat"], 1, 0, False, 100, 1.0, "constant", 0.0, 1.0, "no class", "as saved"]
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

    settings = [4, 1.0, "constant", 0.0, 1.0, "no class", "as saved"]
    with serve(pipeline) as url:
        pipeline.transformer.register_forward_pre_hook(enter)
        pipeline.transformer.register_forward_hook(leave)
        join_queue(url, "generate", [["cat"], 1, 0, False, *settings], "first")
        join_queue(url, "compare_two", [["cat"], 1, 0, False, *settings, *settings], "second")
        for session in ("first", "second"):
            httpx.get(f"{url}gradio_api/queue/data?session_hash={session}", timeout=60)
    assert most == 1 and running == 0


@pytest.mark.parametrize("steps", [None, 1000])
def test_an_emptied_field_leaves_nothing_in_the_log(url, capfd, steps):
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


@pytest.mark.parametrize("job", ["take_example", "pass_to_edit", "pass_to_classify"])
@pytest.mark.parametrize(
    "event", [{"index": -1}, {"index": 8}, {"index": "0"}, {"index": None}, {"index": 0.5}, {}, None, [0]]
)
def test_a_forged_choice_is_refused(url, capfd, job, event):
    session = uuid.uuid4().hex
    inputs = [] if job == "take_example" else ["forged"]  # the pictures are those of the session
    request = [["cat"], 8, 0, False, 1, *SETTINGS]
    join_queue(url, "generate", request, session)
    listen(url, session)
    join_queue(url, job, inputs, session, event)
    answer = listen(url, session)
    join_queue(url, job, inputs, session, {"index": 7})
    assert "data:image" in listen(url, session)
    join_queue(url, job, inputs, f"{session}-other", {"index": 7})
    other = listen(url, f"{session}-other")
    assert "not on the page any more" in answer and "data:image" not in answer
    assert ("data:image" in other) == (job == "take_example")
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
def test_the_name_of_an_upload_stays_in_its_folder(url, name, stored):
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
def test_what_the_page_does_not_use_is_closed(url, route):
    assert httpx.get(f"{url}gradio_api/{route}").status_code == 404
    assert httpx.post(f"{url}gradio_api/{route}", json={"data": []}).status_code == 404


def test_a_job_that_does_not_exist_is_refused(url, capfd):
    changes = (
        {"fn_index": 99},
        {"fn_index": -1},
        {"fn_index": 1, "data": []},  # this one cancels in the browser alone
        {"data": []},
        {"data": [*HEAVY, 1]},
    )
    request = {"data": HEAVY, "fn_index": 0, "session_hash": "session", "event_data": None}
    for change in changes:
        answer = httpx.post(url + "gradio_api/queue/join", json={**request, **change})
        assert answer.status_code == 400 and "no such job" in answer.text, change
    assert "Traceback" not in capfd.readouterr().err


def test_forged_values_are_explained_and_leave_nothing_in_the_log(url, capfd):
    for index, value in product((0, 1, 2, 4, 6, 8), (None, "x", [[]], {}, 10**18, -1)):
        join_queue(url, "generate", [*HEAVY[:index], value, *HEAVY[index + 1 :]], "session")
        answer = listen(url, "session")
        assert "pet-error" in answer and "data:image" not in answer, (index, value)
        assert re.search("must be from|no choice|no class|at least one class", answer), (index, value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("route", ["gradio_api/queue/join", "login"])
def test_a_large_request_is_refused(url, route):
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
