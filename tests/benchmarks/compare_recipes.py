"""Trains variants of the recipe and baselines, one on each core at a time; prints a Markdown row for each.

    python tests/benchmarks/compare_recipes.py --dataset_name uoft-cs/cifar10 --max_train_images 32000 \
        --num_images 0
    python tests/benchmarks/compare_recipes.py --dataset_name uoft-cs/cifar10 --max_train_minutes 25 \
        --runs reference dit unet --num_images 1000

What is in the output folder already is not trained again, so that more runs and seeds can be added. Compare
by time only what ran in one call, on a machine that did nothing else.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from statistics import mean
from typing import Any

from pet_pipeline.training.checkpointing import list_checkpoints


BENCHMARKS = Path(__file__).parent
OURS = [str(BENCHMARKS.parent.parent / "train_pet.py")]
BASELINE = str(BENCHMARKS / "train_baseline.py")
# What the presets `small` and `base` were until 2026-11-29.
FLAT = json.dumps(
    {"outer_layers": 0, "patch_size": 4, "num_layers": 8, "decoder_layers": 1, "decoder_channels": 32}
)
FLAT_BASE = json.dumps({"outer_layers": 0, "num_layers": 10, "decoder_layers": 2, "decoder_channels": 64})
TEN_CLASSES = ["--classes", "all", "--mixed_precision", "bf16"]
# Each differs from the reference, the defaults of `train_pet.py`, in one thing; `base` and `flat-base`, which
# are for GPUs, are to be compared with each other.
RUNS: dict[str, list[str]] = {
    "reference": OURS,
    "dit": [BASELINE, "dit"],
    "dit-lr-1e-3": [BASELINE, "dit", "--learning_rate", "1e-3"],
    "dit-p-mean-0.8": [BASELINE, "dit", "--p_mean", "-0.8"],
    "dit-adamw": [BASELINE, "dit", "--optimizer", "adamw"],
    "dit-batch-32": [BASELINE, "dit", "--train_batch_size", "32"],
    "unet": [BASELINE, "unet", "--optimizer", "adamw", "--learning_rate", "2e-3"],
    "flat": [*OURS, "--model_config", FLAT],
    "base": [*OURS, "--preset", "base", *TEN_CLASSES],
    "flat-base": [*OURS, "--preset", "base", "--model_config", FLAT_BASE, *TEN_CLASSES],
    "mse": [*OURS, "--loss", "mse"],
    "fixed-noise": [*OURS, "--noise_schedule", "fixed"],
    "no-learned-weighting": [*OURS, "--no-learned_weighting"],
    "plain-edm": [*OURS, "--loss", "mse", "--noise_schedule", "fixed", "--no-learned_weighting"],
    "p-mean-0.8": [*OURS, "--p_mean", "-0.8"],
    "wide-noise": [*OURS, "--p_mean", "-1.2", "--p_std", "1.7"],
    "no-frequency-preconditioning": [*OURS, "--no-frequency_preconditioning"],
    "adamw-1e-3": [*OURS, "--optimizer", "adamw", "--learning_rate", "1e-3"],
    "adamw-3e-3": [*OURS, "--optimizer", "adamw", "--learning_rate", "3e-3"],
    "lr-1e-3": [*OURS, "--learning_rate", "1e-3"],
    "lr-1e-2": [*OURS, "--learning_rate", "1e-2"],
    "muon-0.01": [*OURS, "--muon_learning_rate", "0.01"],
    "muon-0.04": [*OURS, "--muon_learning_rate", "0.04"],
    "batch-32": [*OURS, "--train_batch_size", "32"],
    "batch-128": [*OURS, "--train_batch_size", "128"],
    "ema-0.6": [*OURS, "--ema_power", "0.6"],
    "ema-0.9": [*OURS, "--ema_power", "0.9"],
    "no-ema": [*OURS, "--no-use_ema"],
}
COLUMNS = ["images", "minutes", "images/s", "MiB", "validation loss", "up to σ = 7.4"]
COLUMNS += ["FD-EffLite0", "KID-EffLite0 ×10³"]


def train_and_measure(name: str, seed: int, core: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a variant in a process of its own, measures it in another, and returns the record.

    Raises:
        RuntimeError: if either fails; the log in the output folder says why.
    """
    folder = args.out / f"{name}-{seed}"
    if args.max_train_minutes:
        length = ["--max_train_minutes", str(args.max_train_minutes)]
    else:
        batch = dict(zip(RUNS[name], RUNS[name][1:])).get("--train_batch_size", 64)
        length = ["--max_train_steps", str(args.max_train_images // int(batch))]
    never = str(10**9)
    words = ["--dataset_name", args.dataset_name, "--seed", str(seed), "--output_dir", str(folder), *length]
    words += ["--validation_steps", never, "--preview_images", "0", "--checkpointing_steps", never]
    if args.cache_dir:
        words += ["--cache_dir", args.cache_dir]
    if folder.exists() and list_checkpoints(folder):  # of a run that was interrupted, or not measured
        words += ["--resume_from_checkpoint", "latest"]
    measure = [str(Path(__file__)), "--measure", str(folder), "--dataset_name", args.dataset_name]
    measure += ["--num_images", str(args.num_images)]
    if args.cache_dir:
        measure += ["--cache_dir", args.cache_dir]

    commands = [[*RUNS[name], *words]]
    if args.num_images:
        commands.append(measure)

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    environment = os.environ if core is None else {**os.environ, "OMP_NUM_THREADS": "1"}
    memory = 0
    with (args.out / f"{name}-{seed}.log").open("w") as log:
        for command in commands:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, env=environment, preexec_fn=pin
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"{name}-{seed} ended with code {process.returncode}; see {log.name}")
            memory = memory or usage.ru_maxrss / 1024  # of the training
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "train/loss" in record][-1]
    record = {"name": name, "seed": seed, "images": last["images"], "minutes": last["seconds"] / 60}
    record["images/s"] = last["images"] / last["seconds"]
    record["MiB"] = memory
    end = [record for record in records if "validation/loss" in record][-1]
    record["validation loss"] = end["validation/loss"]
    prefix = "validation/sigma_"
    by_level = {name.removeprefix(prefix): loss for name, loss in end.items() if name.startswith(prefix)}
    record["up to σ = 7.4"] = mean(loss for sigma, loss in by_level.items() if float(sigma) < 7.5)
    if args.num_images:
        measures = json.loads((folder / "measures.json").read_text())
        record["FD-EffLite0"] = measures["fd_efflite0"]
        record["KID-EffLite0 ×10³"] = 1000 * measures["kid_efflite0"]
    return record


def table_row(record: dict[str, Any]) -> str:
    """Returns the Markdown row of a record, with the columns `COLUMNS`."""
    formats = ["{:,}", "{:.1f}", "{:.1f}", "{:.0f}", "{:.4f}", "{:.4f}", "{:.1f}", "{:.1f}"]
    cells = [form.format(record[key]) if key in record else "" for form, key in zip(formats, COLUMNS)]
    return f"| `{record['name']}` | {record['seed']} | " + " | ".join(cells) + " |"


def measure(args: argparse.Namespace) -> None:
    """Samples from a trained variant and compares the images with training images."""
    from train_baseline import load_denoiser

    from pet_pipeline import AdaptiveEDMScheduler, PetDiffusionPipeline
    from pet_pipeline.evaluation.images import generate_images, measure_images
    from pet_pipeline.evaluation.metrics import EfficientNetLite0Features
    from pet_pipeline.evaluation.reference import load_reference

    scheduler = AdaptiveEDMScheduler.from_pretrained(args.measure, subfolder="scheduler")
    pipeline = PetDiffusionPipeline(load_denoiser(args.measure), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    reference = load_reference(args.dataset_name, ["cat", "dog"], 32, cache_dir=args.cache_dir)
    images = generate_images(pipeline, args.num_images, guidance_scale=1.0).images
    measures = measure_images(images, None, reference, EfficientNetLite0Features())
    (args.measure / "measures.json").write_text(json.dumps(measures))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--cache_dir")
    default = [name for name, words in RUNS.items() if "--classes" not in words]
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=default, metavar="RUN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--max_train_images", type=int, default=32000, help="that each run sees")
    parser.add_argument("--max_train_minutes", type=float, help="equal times instead of equal numbers")
    parser.add_argument("--num_images", type=int, default=500, help="samples of each, no guidance; 0: none")
    parser.add_argument("--on_gpu", action="store_true", help="one run at a time, not bound to a core")
    parser.add_argument("--out", type=Path, default=Path("comparison"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # how it calls itself
    args = parser.parse_args()
    if args.measure is not None:
        return measure(args)
    if args.num_images and not set(args.runs) <= set(default):
        parser.error(
            "samples of ten classes have no reference here: use --num_images 0 for the runs of `base`"
        )

    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(record["name"], record["seed"]) for record in done}
    waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for seed in args.seeds:
        for name in args.runs:
            if (name, seed) not in known:
                waiting.put((name, seed))
    lock = threading.Lock()
    print("| run | seed | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")

    def work(core: int | None) -> None:
        while True:
            try:
                name, seed = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                record = train_and_measure(name, seed, core, args)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                continue
            with lock:
                with results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(table_row(record), flush=True)

    for record in done:
        print(table_row(record), flush=True)
    cores = [None] if args.on_gpu else sorted(os.sched_getaffinity(0))
    workers = [threading.Thread(target=work, args=[core]) for core in cores]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
