"""What a training sends to trackio, or to a stand-in with its interface where it is not installed."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from PIL import Image
from support.training_process import metrics, train


class Run:
    """A run of trackio."""

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Takes numbers and media."""

    def finish(self) -> None:
        """Ends the run."""


def stand_in() -> ModuleType:
    """Returns a module with what a training needs of trackio 0.43."""
    module = ModuleType("trackio")

    def image(value: Image.Image, caption: str | None = None) -> SimpleNamespace:
        assert isinstance(value, Image.Image)
        return SimpleNamespace(_as_pil=lambda: value.convert("RGBA"))

    vars(module).update(config={}, Run=Run, Image=image, init=lambda project, **kwargs: Run())
    return module


@pytest.fixture
def logged(tmp_path, monkeypatch) -> list[tuple[dict[str, Any], int]]:
    """What was logged, with the step."""
    calls: list = []
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr(
        accelerate.tracking,
        "_available_trackers",
        [*accelerate.tracking._available_trackers, LoggerType.TRACKIO],
    )
    try:
        import trackio
    except ImportError:
        trackio = stand_in()
        monkeypatch.setitem(sys.modules, "trackio", trackio)
    log: Callable = trackio.Run.log

    def record(run: Any, metrics: dict[str, Any], step: int | None = None) -> None:
        calls.append((dict(metrics), step))
        log(run, metrics, step)

    monkeypatch.setattr(trackio.Run, "log", record)
    return calls


def test_trackio_gets_numbers_and_pictures(logged, image_folder, tmp_path):
    pictures_wanted = {"preview_images": 2, "preview_steps": 1}
    train(image_folder, tmp_path / "out", max_train_steps=2, report_to="trackio", **pictures_wanted)
    pictures = {(name, step): value for values, step in logged for name, value in values.items()}
    files = {path.name for path in (tmp_path / "out" / "samples").iterdir()}
    assert files == {
        "samples-000001.png",
        "samples-000002.png",
        "denoising-000001.png",
        "denoising-000002.png",
    } | {
        "step-comparison.png",
        "curves.png",
    }
    for name, step, file in (
        ("samples", 1, "samples-000001.png"),
        ("denoising", 2, "denoising-000002.png"),
        ("step_comparison", 2, "step-comparison.png"),
        ("curves", 2, "curves.png"),
    ):
        with Image.open(tmp_path / "out" / "samples" / file) as picture:
            assert pictures[name, step]._as_pil().tobytes() == picture.convert("RGBA").tobytes()
    losses = [
        (record["train/loss"], record["step"])
        for record in metrics(tmp_path / "out")
        if "train/loss" in record
    ]
    assert losses == [(pictures["train/loss", step], step) for step in (1, 2)]
    stored = list((tmp_path / "trackio").rglob("*.png"))
    assert len(stored) == (6 if (tmp_path / "trackio").exists() else 0)
