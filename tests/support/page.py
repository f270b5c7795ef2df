"""Helpers of the tests of the web page: images, and requests as the page sends them."""

import base64
import io

import httpx
import torch
from PIL import Image


# Certificates, which nothing here needs, take longer to load than a request takes.
client = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0), timeout=60)


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
    dependencies = client.get(url + "config").json()["dependencies"]
    (index,) = (item["id"] for item in dependencies if item["api_name"] == name)
    request = {"data": values, "fn_index": index, "session_hash": session, "event_data": event}
    headers = {"X-Forwarded-For": address}
    return client.post(url + "gradio_api/queue/join", json=request, headers=headers)


def listen(url: str, session: str) -> str:
    return client.get(url + f"gradio_api/queue/data?session_hash={session}").text


def upload(url: str, content: bytes, name: str = "cat.png", **kwargs) -> httpx.Response:
    return client.post(url + "gradio_api/upload", files={"files": (name, content)}, **kwargs)
