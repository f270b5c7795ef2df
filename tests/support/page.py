"""Helpers of the tests of the web page: images, and requests as the page sends them."""

import base64
import io

import httpx
import torch
from PIL import Image


def pixels(image: Image.Image) -> torch.Tensor:
    image = image.convert("RGB")
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).int()


def decoded(url: str) -> bytes:
    assert url.startswith("data:image/png;base64,")
    return base64.b64decode(url.partition(",")[2])


def image_bytes(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


SETTINGS = [2.5, "adaptive", 0.0, 1.0, "no class", "as saved"]
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
