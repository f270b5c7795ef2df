"""Training checkpoints: where they are, which is the latest, and which go.

The folders hold Accelerate's own format, which is not safe to load from strangers; published models are
pipeline folders of safetensors instead.
"""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator


PREFIX = "checkpoint-"


def checkpoint_step(path: Path) -> int:
    """Returns the number of optimizer steps in a checkpoint's name."""
    return int(path.name.removeprefix(PREFIX))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoint folders in `output_dir`, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int | None = None
) -> Path:
    """Saves the training state and removes the oldest checkpoints; every process has to call it.

    It is written under another name and renamed when it is complete.

    Args:
        accelerator (`Accelerator`): with the prepared and registered objects of the training.
        output_dir (`str` or `Path`): the run's folder.
        step (`int`): optimizer steps done.
        total_limit (`int`, *optional*): how many checkpoints to keep.
    """
    path = Path(output_dir) / f"{PREFIX}{step}"
    partial = path.with_name(f"partial-{path.name}")
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path:
    """Returns the checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir (`str` or `Path`): the run's folder.
        resume_from_checkpoint (`str`): `"latest"`, the name of a folder in `output_dir`, or a path.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise ValueError(f"There is no checkpoint in {str(output_dir)!r} to resume from.")
        return checkpoints[-1]
    for path in (Path(output_dir) / resume_from_checkpoint, Path(resume_from_checkpoint)):
        if path in list_checkpoints(path.parent):
            return path
    raise ValueError(
        f"There is no checkpoint {resume_from_checkpoint!r}, neither in {str(output_dir)!r} nor as a path."
    )
