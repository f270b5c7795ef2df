"""A static web page that draws and classifies on the visitor's own machine, by ONNX Runtime Web."""

import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory


WEB = Path(__file__).parent / "web"
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
# Browsers give threads to WebAssembly only if these headers isolate the page.
CARD = """---
title: Diffusion in your browser
sdk: static
app_file: index.html
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---

# Diffusion in your browser

This page draws small images with a diffusion model on the device of its visitor. `sampling.json` holds the
steps of the sampling. The networks are ONNX files, which [ONNX Runtime Web](https://onnxruntime.ai) (MIT
licence) runs.
"""


def write_page(folder: Path) -> None:
    """Writes the page, and `README.md` for a static Space, to a folder that [`export_onnx`] fills.

    `npm` fetches ONNX Runtime Web, 14 MB, which is not in this package.

    Raises:
        OSError: if there is no `npm`, or it cannot fetch the runtime.
    """
    fetch_runtime(folder)
    for source in WEB.iterdir():
        shutil.copy(source, folder)
    (folder / "README.md").write_text(CARD)


def fetch_runtime(folder: Path) -> None:
    """Fetches the two files of ONNX Runtime Web that the page needs, from the registry of `npm`."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(
            "The web page needs `npm` (Node.js), which fetches ONNX Runtime Web, but there is none."
        )
    with TemporaryDirectory() as temporary:
        command = [npm, "pack", RUNTIME, "--prefer-offline", "--silent", "--pack-destination", temporary]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        archives = list(Path(temporary).glob("*.tgz"))
        if result.returncode or not archives:
            reason = result.stderr.strip() or result.stdout.strip() or f"exit status {result.returncode}"
            raise OSError(f"`npm` could not fetch {RUNTIME}: {reason.splitlines()[0]}")
        with tarfile.open(archives[0]) as archive:
            for name in RUNTIME_FILES:
                member = archive.getmember(f"package/dist/{name}")
                member.name = name
                archive.extract(member, folder, filter="data")
