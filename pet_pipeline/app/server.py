"""Serving the page."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.middleware import Middleware

from ..pipeline_pet_diffusion import PetDiffusionPipeline
from .gate import MAX_UPLOAD_BYTES, Gate
from .page import build_app


if TYPE_CHECKING:
    from ..evaluation.reference import Reference

MAX_QUEUE = 16
MAX_SESSIONS = 250  # each keeps the pictures that it shows
STYLE = Path(__file__).parent / "style.css"
# A Space is reached only through proxies in private networks, which tell the address of the visitor.
SPACE_PROXIES = "127.0.0.1,10.0.0.0/8,100.64.0.0/10,172.16.0.0/12,192.168.0.0/16"


def restore_variable(name: str, value: str | None) -> None:
    """Gives an environment variable the value that it had before; `None` removes it."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def serve(
    pipeline: PetDiffusionPipeline,
    reference: "Reference | None" = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
) -> Iterator[str]:
    """Serves the page while the context is open, and yields its address. No file stays on disk afterwards.

    Visitors behind a proxy are told apart if the environment variable `FORWARDED_ALLOW_IPS` names the
    addresses of the proxy. On a Space, this function sets the variable.

    Other machines see the page if `host` is `"0.0.0.0"`. The default port is the first free one from 7860 on;
    `OSError` is raised if a given port is taken. With `share`, the page gets a public address through the
    servers of Gradio. See [`build_app`] for the other arguments and errors.
    """
    with TemporaryDirectory(prefix="pet-pipeline-") as folder, ExitStack() as restored:
        variables = {"GRADIO_TEMP_DIR": folder}
        if "SPACE_ID" in os.environ:
            variables["FORWARDED_ALLOW_IPS"] = os.environ.get("FORWARDED_ALLOW_IPS", SPACE_PROXIES)
        for name in variables:
            restored.callback(restore_variable, name, os.environ.get(name))
        os.environ.update(variables)
        closed = threading.Event()
        page = build_app(pipeline, reference, closed).queue(max_size=MAX_QUEUE, api_open=False)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                app_kwargs={"middleware": [Middleware(Gate, page=page, folder=Path(folder))]},
                state_session_capacity=MAX_SESSIONS,
                max_file_size=MAX_UPLOAD_BYTES,
                theme=gr.themes.Default(
                    primary_hue="indigo",  # on Gradio's orange, white text has little contrast
                    font=["system-ui", "sans-serif"],
                    font_mono=["ui-monospace", "monospace"],
                ).set(block_info_text_color="*neutral_500", body_text_color_subdued="*neutral_500"),
                css_paths=STYLE,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
            )
            yield url
        finally:
            closed.set()
            page.close(verbose=False)


def launch(*args: Any, **kwargs: Any) -> None:
    """Serves the page until the process is interrupted or terminated; see [`serve`]."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder of uploads is removed
    with serve(*args, **kwargs) as url:
        print(f"The page is at {url} (Ctrl-C ends it).", flush=True)
        threading.Event().wait()
