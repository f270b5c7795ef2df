"""A server of files, with or without the headers that give WebAssembly its threads."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class PlainHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files as any server does."""

    def log_message(self, *args) -> None:
        pass


class IsolatedHandler(PlainHandler):
    """Serves files as a Space with the headers of README.md does."""

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@contextmanager
def served(folder: Path, handler: type[PlainHandler] = IsolatedHandler) -> Iterator[str]:
    """Serves a folder on this machine, and gives the address."""
    factory = functools.partial(handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), factory) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
