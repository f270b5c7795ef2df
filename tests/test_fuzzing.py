"""Hostile files: mutated configurations, weights and images, loaded as a user would.

Each of them either works or is refused in words: no crash, no hang, no memory taken without measure, no
request over the network, and no file outside the folder that was named.
"""

import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_model
from diffusers.utils import logging
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pet_pipeline import (
    AdaptiveEDMScheduler,
    PetClassificationPipeline,
    PetDiffusionPipeline,
    PetLinearProbe,
)
from pet_pipeline.__main__ import main
from pet_pipeline.sampling import PNG_KEY


TIME_LIMIT = 30  # seconds for one input, on a machine that does other things too
MEMORY_LIMIT = 2 * 2**30  # bytes beyond what the process has at the start

STRANGE_VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    1000,
    2**31,
    2**63,
    10**30,
    0.5,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "../../outside",
    "/tmp/outside",
    "os",
    "system",
    "nul\x00l",
    "\x1b[2J\n",
    "x" * 10_000,
    "\ud800",
    [],
    [None, None],
    ["os", "system"],
    ["diffusers", "DDPMScheduler"],
    ["subprocess", "Popen"],
    [[[]]],
    {},
    {"0": "../../outside"},
    {"a": {"b": 1}},
]
STRANGE_KEYS = [
    "auto_map",
    "quantization_config",
    "_name_or_path",
    "_class_name",
    "guider",
    "1",
    "",
    "x" * 1000,
]


class Hang(BaseException):
    """An input that took longer than the time limit."""


class NetworkError(BaseException):
    """An input that made the loader ask for something elsewhere."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Ends what takes too long, and lets allocations beyond the limit fail."""

    def hang(number: int, frame: Any) -> None:
        raise Hang

    handler = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture
def memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips bits, cuts, repeats, inserts or overwrites."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 10])):
        position = rng.randrange(len(data) + 1)
        length = rng.choice([1, 2, 8, 100])
        kind = rng.choice(["flip", "cut", "end", "repeat", "insert", "overwrite"])
        if kind == "flip" and position < len(data):
            data[position] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[position : position + length]
        elif kind == "end":
            del data[position:]
        elif kind == "repeat":
            data[position:position] = data[position : position + length] * rng.choice([1, 50])
        elif kind == "insert":
            data[position:position] = rng.randbytes(length)
        else:
            data[position : position + length] = rng.choice([b"\x00", b"\xff"]) * length
    return bytes(data)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Replaces, removes or adds something somewhere in a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value, key = dict(value), rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            del value[key]
        elif kind < 0.2:
            value[rng.choice(STRANGE_KEYS)] = rng.choice(STRANGE_VALUES)
        else:
            value[key] = mutate_value(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.5:
        value, index = list(value), rng.randrange(len(value))
        value[index] = mutate_value(value[index], rng)
        return value
    if isinstance(value, (int, float)) and rng.random() < 0.3:
        return rng.choice([value * 2, value + 1, -value, value * 10**9, float(value), str(value)])
    return rng.choice(STRANGE_VALUES)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return mutate_bytes(content, rng)
    if kind < 0.22:
        return b"[" * rng.choice([10, 100_000])
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 3])):
        value = mutate_value(value, rng)
    return json.dumps(value).encode()


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Mutates the header, its stated length, or any bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.random()
    if kind < 0.3:
        return mutate_bytes(content, rng)
    if kind < 0.4:
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**32, 2**63])) + content[8:]
    header = mutate_json(header, rng)
    return struct.pack("<Q", len(header)) + header + data


def mutate_png(content: bytes, rng: random.Random) -> bytes:
    """Mutates chunks, some with a checksum that fits, or any bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    chunks, position = [], 8
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        chunks.append((content[position + 4 : position + 8], content[position + 8 : position + 8 + length]))
        position += 12 + length
    index = rng.randrange(len(chunks))
    kind, data = chunks[index]
    change = rng.random()
    if change < 0.5:
        data = mutate_bytes(data, rng)
    elif change < 0.6:
        bomb = zlib.compress(bytes(10_000_000))
        kind, data = rng.choice(
            [(b"zTXt", b"pet_pipeline\0\0" + bomb), (b"IDAT", bomb), (b"iCCP", b"a\0\0" + bomb)]
        )
    elif change < 0.7:
        kind = rng.choice([b"IDAT", b"IEND", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"abcd"])
    elif change < 0.8:
        kind, data = b"IHDR", struct.pack(">IIBBBBB", rng.choice([0, 1, 10**5, 2**31]), 8, 8, 2, 0, 0, 0)
    elif change < 0.9:
        kind, data = b"eXIf", rng.choice([b"MM\0*", b"II*\0"]) + rng.randbytes(40)
    chunks[index] = (kind, data)
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def run_command(words: list[str]) -> tuple[int, str]:
    """Runs the command line within the limits; returns its exit code and what it says of errors."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as error,
        contextlib.redirect_stdout(io.StringIO()),
        limits(),
    ):
        try:
            code = main(words)
        except SystemExit as exit_info:
            code = exit_info.code
    # A progress bar overwrites itself; on a slow machine it writes more often.
    return code, re.sub(r"[^\n]*\r", "", error.getvalue())


@pytest.mark.parametrize(
    "number_of_inputs", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_work_or_are_refused(number_of_inputs, tmp_path, monkeypatch, memory_limit):
    def refuse(*args, **kwargs):
        raise NetworkError

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(logging.get_logger("diffusers"), "level", 100)  # or it would warn thousands of times
    model, out, here = tmp_path / "model", tmp_path / "out", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    pipeline = PetDiffusionPipeline(
        random_model(), AdaptiveEDMScheduler(), id2label={0: "cat", 1: "dog"}, probe=PetLinearProbe(2, 16)
    )
    pipeline.save_pretrained(model)
    generate = ["generate", "--num_samples", "1", "--steps", "1", "--out", str(out), "--model"]
    assert run_command([*generate, str(model)])[0] == 0
    png = tmp_path / "image.png"
    shutil.move(out / "dog-0.png", png)
    with Image.open(png) as image:
        settings = json.loads(image.text[PNG_KEY])
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    mutations = [
        (model / "transformer" / "config.json", mutate_json),
        (model / "scheduler" / "scheduler_config.json", mutate_json),
        (model / "probe" / "config.json", mutate_json),
        (model / "model_index.json", mutate_json),
        (weights, mutate_safetensors),
        (png, mutate_png),
        (png, None),  # its settings
    ]
    originals = {path: path.read_bytes() for path, _ in mutations}
    shutil.rmtree(out)
    before = sorted(tmp_path.rglob("*"))
    rng = random.Random(number_of_inputs)
    tally: Counter[str] = Counter()
    for number in range(number_of_inputs):
        path, mutate = mutations[number % len(mutations)]
        if mutate is None:
            text = mutate_json(json.dumps(settings).encode(), rng).decode(errors="replace")
            info = PngInfo()
            info.add_itxt(PNG_KEY, text)
            Image.new("RGB", (8, 8)).save(png, pnginfo=info)
        else:
            path.write_bytes(mutate(originals[path], rng))
        hint = f"input {number} of {number_of_inputs}: {path.name} {path.read_bytes()[:2000]!r}"
        shutil.rmtree(out, ignore_errors=True)
        if path == png:
            words = [["classify", "--num_evaluations", "2", "--model", str(model), str(png)]]
            words.append(["generate", "--like", str(png), "--out", str(out), "--model", str(model)])
        else:
            words = [[*generate, str(model)]]
            try:
                with limits():
                    rng.choice([PetDiffusionPipeline, PetClassificationPipeline]).from_pretrained(model)
            except MemoryError:
                pytest.fail(f"memory: {hint}")
            except Exception as error:  # whatever diffusers raises, but not for want of memory
                assert "allocate memory" not in str(error), hint
        for command in words:
            try:
                code, error = run_command(command)
            except (Hang, NetworkError, Exception) as raised:
                raise AssertionError(f"{raised!r} from {command[0]}, {hint}") from raised
            name = "settings" if mutate is None else path.name
            tally[f"{command[0]}, {name}: {'refused' if code else 'works'}"] += 1
            assert code in (0, 1, 2), hint
            assert "Traceback" not in error and len(error) < 3000, f"{error} {hint}"
            if code == 1:
                lines = error.splitlines()
                expected = 2 if command[0] == "classify" else 1  # the file, and that it was the only one
                assert all(line.startswith("pet-pipeline: ") for line in lines), f"{error} {hint}"
                assert 1 <= len(lines) <= expected, f"{error} {hint}"
        path.write_bytes(originals[path])
    shutil.rmtree(out, ignore_errors=True)
    assert sorted(tmp_path.rglob("*")) == before and not os.listdir(here)
    print(f"{number_of_inputs:,} mutated files: " + "; ".join(f"{k} {v}" for k, v in sorted(tally.items())))
