"""The page on ZeroGPU, where the model runs in calls that borrow a GPU, with a stand-in for `spaces`."""

import functools
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from pet_pipeline.sampling import SampleSettings


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")

pytest.importorskip("gradio", reason="Gradio is not installed")
from pet_pipeline.app.handlers import Handlers  # noqa: E402
from pet_pipeline.app.page import build_app  # noqa: E402
from pet_pipeline.app.zero_gpu import lend_gpu  # noqa: E402


@pytest.fixture
def lent(monkeypatch) -> list[Callable]:
    """The calls that have the GPU at this moment. As in `spaces`, arguments and results are pickled."""
    running: list[Callable] = []

    def copied(value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))

    def borrow(function: Callable) -> Callable:
        @functools.wraps(function)
        def generate(*args: Any) -> Iterator:
            running.append(function)
            yield from map(copied, function(*copied(args)))
            running.remove(function)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            running.append(function)
            result = copied(function(*copied(args)))
            running.remove(function)
            return result

        borrowing = generate if inspect.isgeneratorfunction(function) else call
        borrowing.zerogpu = None  # as `spaces` marks it
        return borrowing

    module = ModuleType("spaces")
    module.GPU = borrow
    monkeypatch.setitem(sys.modules, "spaces", module)
    return running


def test_the_model_runs_only_while_a_gpu_is_lent(pipeline, lent):
    seen = []
    pipeline.transformer.register_forward_hook(lambda *args: seen.append(len(lent)))
    handlers = Handlers(pipeline)  # which draws the examples
    assert seen
    values = list(SampleSettings.options().items())
    settings = [
        option.none_label if getattr(handlers.settings, name) is None else getattr(handlers.settings, name)
        for name, option in values
    ]
    settings[[name for name, _ in values].index("steps")] = 2
    request = [["cat"], 1, 0, False]
    *_, last = handlers.generate(*request, *settings)
    assert last[0].startswith("1 image in")
    *_, last = handlers.compare_two(*request, *settings, *settings)
    assert "All use the same seeds" in last[0]
    *_, last = handlers.explain(Image.new("RGB", (8, 8), "red"), 2, 0)
    assert last[0].partition(":")[0] in {"cat", "dog"}
    assert set(seen) == {1} and not lent


def test_every_event_of_the_model_borrows_a_gpu(pipeline, lent):
    events = [event for event in build_app(pipeline).fns.values() if event.concurrency_id == "model"]
    assert len(events) > 4 and all(hasattr(event.fn, "zerogpu") for event in events)


def test_elsewhere_nothing_is_wrapped(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert lend_gpu(print) is print
