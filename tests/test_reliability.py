"""Trainings that are killed, interrupted, damaged and starved of disk, and what is left of them."""

import copy
import json
import math
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from support.training_process import (
    TINY,
    Training,
    arguments,
    assert_close,
    assert_equal,
    checkpoint_content,
    is_equal,
    log_of_losses,
    spoiled_forward,
    start_processes,
    train,
    train_process,
)

import train_pet
from pet_pipeline import BalancedAdaptiveLoss, PetDiffusionPipeline
from pet_pipeline.training import results
from pet_pipeline.training.checkpointing import (
    claim_folder,
    find_checkpoint,
    list_checkpoints,
    save_pipeline,
)


# 12 steps of 2 micro-steps over 6 epochs (36 images, 4 batches each), everything random in use.
RUN = {
    "model_config": json.dumps({**TINY, "dropout": 0.2}),
    "gradient_accumulation_steps": 2,
    "max_train_steps": 12,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 3,
    "validation_steps": 4,
}


@pytest.fixture(scope="module")
def whole_run(image_folder, tmp_path_factory) -> Path:
    """A run that nothing disturbed. Unlike the others it draws pictures, which change no training."""
    output_dir = tmp_path_factory.mktemp("whole") / "out"
    pictures = {"preview_images": 2, "preview_steps": 5}
    ended = train_process(arguments(image_folder, output_dir, **pictures, **RUN))
    assert ended.exit_code == 0, ended.output
    return output_dir


def assert_same_run(output_dir: Path, whole_run: Path) -> None:
    """Asserts that a run ended as the undisturbed one did, in every tensor."""
    assert_equal(
        checkpoint_content(output_dir / "checkpoint-12"), checkpoint_content(whole_run / "checkpoint-12")
    )
    for folder in (".", "best"):
        name = Path(folder, "transformer", "diffusion_pytorch_model.safetensors")
        assert_equal(load_file(output_dir / name), load_file(whole_run / name))
    assert log_of_losses(output_dir) == log_of_losses(whole_run)
    assert not list(output_dir.glob("partial-*"))


def words(image_folder, output_dir, **options) -> list[str]:
    """The command line, which resumes where there is a checkpoint, as a user would."""
    resume = "latest" if list_checkpoints(output_dir) else None
    return arguments(image_folder, output_dir, resume_from_checkpoint=resume, **{**RUN, **options})


@pytest.mark.parametrize(
    "number_of_kills", [3, pytest.param(15, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_killed_at_random_points_and_resumed(number_of_kills, image_folder, tmp_path, whole_run):
    rng = random.Random(number_of_kills)
    output_dir = tmp_path / "out"
    kills = []
    while len(kills) < number_of_kills:
        if list_checkpoints(output_dir)[-1:] == [output_dir / "checkpoint-12"]:
            assert_same_resumed_run(image_folder, output_dir, whole_run)
            shutil.rmtree(output_dir)  # there is nothing left to disturb: once more
        training = Training(words(image_folder, output_dir))
        # Any time from the first sight of the run in its folder, in the middle of a checkpoint too.
        training.wait_for(output_dir / "metrics.jsonl")
        delay, number = (
            rng.uniform(0, 0.8),
            rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]),
        )
        training.wait_for(tmp_path / "never", timeout=delay)
        training.send(number)
        ended = training.end()
        assert "Traceback" not in ended.output.replace("KeyboardInterrupt", ""), ended.output
        if ended.exit_code == 0:
            continue  # it was faster
        left = list_checkpoints(output_dir)
        if ended.exit_code in (130, 143):
            hint = "--resume_from_checkpoint latest" if left else "There is no checkpoint yet"
            assert hint in ended.output, ended.output
        kills.append(f"{number.name} after {delay:.2f} s: {left[-1].name if left else 'no checkpoint'}")
    assert_same_resumed_run(image_folder, output_dir, whole_run)
    print(f"{len(kills)} kills, each resumed to the bits of the undisturbed run: " + "; ".join(kills))


def assert_same_resumed_run(image_folder, output_dir, whole_run) -> None:
    ended = train_process(words(image_folder, output_dir))
    assert ended.exit_code == 0, ended.output
    assert_same_run(output_dir, whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_says_how_to_resume(
    number, image_folder, tmp_path, whole_run, monkeypatch, capsys
):
    # At every step there is, whether or not a checkpoint is due, amid an epoch or at its end.
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    step_of_ema = EMAModel.step

    def interrupted_step(self, parameters):
        step_of_ema(self, parameters)
        if self.optimization_step == interrupted_at:
            signal.raise_signal(number)
            signal.raise_signal(number)  # launchers pass on what the terminal has sent already

    for interrupted_at in (1, 2, 3, 8, 11) if number == signal.SIGTERM else (5,):
        output_dir = tmp_path / str(interrupted_at)
        monkeypatch.setattr(EMAModel, "step", interrupted_step)
        with pytest.raises(SystemExit) as exit_info:
            train(image_folder, output_dir, **RUN)
        assert exit_info.value.code == 128 + number
        error = capsys.readouterr().err
        assert f"step {interrupted_at} is saved in {output_dir}" in error and error.count("train_pet") == 1
        assert "--resume_from_checkpoint latest" in error
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
        monkeypatch.undo()
        train(image_folder, output_dir, resume_from_checkpoint="latest", **RUN)
        assert_same_run(output_dir, whole_run)
        assert log_of_validation(output_dir) == log_of_validation(whole_run)


def log_of_validation(output_dir: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["validation/loss"]) for record in records if "validation/loss" in record]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    position = random.Random(path.name).randrange(8 * len(content))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


@pytest.fixture
def run_of_two(whole_run, tmp_path) -> Path:
    """A run that ended after step 10, with checkpoints of steps 8 and 10."""
    for name in ("checkpoint-8", "checkpoint-10"):
        shutil.copytree(whole_run / name, tmp_path / "out" / name)
    shutil.copytree(whole_run / "best", tmp_path / "out" / "best")
    shutil.copy(whole_run / "metrics.jsonl", tmp_path / "out")
    return tmp_path / "out"


def test_damage_is_found_in_every_file(run_of_two):
    newest = run_of_two / "checkpoint-10"
    names = sorted(path.name for path in newest.iterdir())
    assert names == [
        "custom_checkpoint_0.pkl",
        "custom_checkpoint_1.pkl",
        "custom_checkpoint_2.pkl",
        "manifest.json",
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
        "training.json",
    ]
    found = 0
    for name in names:
        content = (newest / name).read_bytes()
        for damage in (truncate, empty, flip_a_bit, Path.unlink):
            damage(newest / name)
            # A hash that is damaged itself speaks against its file.
            message = "checkpoint-10' is damaged: .*" + ("" if name == "manifest.json" else name)
            with pytest.warns(UserWarning, match=message):
                assert find_checkpoint(run_of_two, "latest").name == "checkpoint-8"
            with pytest.raises(ValueError, match=message):
                find_checkpoint(run_of_two, "checkpoint-10")
            (newest / name).write_bytes(content)
            found += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(run_of_two, "latest").name == "checkpoint-10"
    print(f"{found} of {found} damaged files found")
    for checkpoint in list_checkpoints(run_of_two):
        truncate(checkpoint / "optimizer.bin")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="Every checkpoint in .* is damaged"):
        find_checkpoint(run_of_two, "latest")


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_one_before(image_folder, run_of_two, whole_run):
    flip_a_bit(run_of_two / "checkpoint-10" / "optimizer.bin")
    ended = train_process(words(image_folder, run_of_two))
    assert ended.exit_code == 0, ended.output
    assert "checkpoint-10' is damaged" in ended.output and "Resumed at step 8" in ended.output
    assert_same_run(run_of_two, whole_run)
    names = {path.name for path in run_of_two.glob("*checkpoint-*")}
    assert names == {"checkpoint-8", "checkpoint-10", "checkpoint-12", "damaged-checkpoint-10"}


FILES_OF_A_CHECKPOINT = [
    "model.safetensors",
    "optimizer.bin",
    "random_states_0.pkl",
    "training.json",
    "custom_checkpoint_0.pkl",
    "custom_checkpoint_1.pkl",
    "custom_checkpoint_2.pkl",
    "manifest.json",
]
OTHER_FILES = [
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
    "transformer_pet.py",
    "metrics.jsonl",
    "samples-000012.png",
    "curves.png",
    "samples.png",
    "README.md",
]
IN_CI = [("optimizer.bin", "full"), ("model.safetensors", "torn"), ("samples.png", "full")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in IN_CI else pytest.mark.slow)
        for name in [*FILES_OF_A_CHECKPOINT, *OTHER_FILES]
        for kind in ("full", "torn")
    ],
)
def test_a_write_that_fails_is_one_error_and_loses_nothing(name, kind, image_folder, run_of_two, whole_run):
    before = {path.name: checkpoint_content(path) for path in list_checkpoints(run_of_two)}
    pictures = {"preview_images": 2, "preview_steps": 12} if name in OTHER_FILES else {}
    ended = train_process(words(image_folder, run_of_two, **pictures), fault=(name, kind))
    assert ended.exit_code == 1, ended.output
    assert ended.output.count("train_pet.py: ") == 1 and "Traceback" not in ended.output, ended.output
    assert ". To continue, give the same command with --resume_from_checkpoint latest." in ended.output
    if kind == "full":
        assert "No space left on device" in ended.output
    if name in FILES_OF_A_CHECKPOINT:
        assert "checkpoint-12' cannot be written" in ended.output
        assert list_checkpoints(run_of_two)[-1].name == "checkpoint-10"
    for checkpoint, content in before.items():
        assert_equal(checkpoint_content(run_of_two / checkpoint), content)
    PetDiffusionPipeline.from_pretrained(run_of_two / "best")
    ended = train_process(words(image_folder, run_of_two))
    assert ended.exit_code == 0, ended.output
    assert_same_run(run_of_two, whole_run)


def test_an_output_that_became_read_only(image_folder, run_of_two, whole_run):
    ended = train_process(words(image_folder, run_of_two), fault=(str(run_of_two), "read-only"))
    assert ended.exit_code == 1 and "Read-only file system" in ended.output, ended.output
    assert "Traceback" not in ended.output
    assert train_process(words(image_folder, run_of_two)).exit_code == 0
    assert_same_run(run_of_two, whole_run)


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="a place that even root cannot write to")
def test_an_output_that_cannot_be_made(image_folder, tmp_path):
    ended = train_process(
        arguments(image_folder, Path("/sys/pet-model"), **{**RUN, "cache_dir": tmp_path / "cache"})
    )
    assert ended.exit_code == 1 and "Traceback" not in ended.output
    assert ended.output.count("train_pet.py: ") == 1 and "/sys/pet-model" in ended.output


def test_a_data_set_that_vanished(image_folder, tmp_path, run_of_two, whole_run):
    data = tmp_path / "data"
    ended = train_process(words(data, run_of_two))
    assert ended.exit_code == 1 and ended.output.count("train_pet.py: ") == 1, ended.output
    assert "cannot be loaded" in ended.output and "Traceback" not in ended.output
    assert find_checkpoint(run_of_two, "latest").name == "checkpoint-10"
    shutil.copytree(image_folder, data)
    assert train_process(words(data, run_of_two)).exit_code == 0
    assert_same_run(run_of_two, whole_run)


def test_weights_whose_validation_loss_is_not_finite_are_not_the_best(image_folder, tmp_path, monkeypatch):
    losses = iter([math.nan, 2.0, 1.0, math.inf])
    monkeypatch.setattr(results, "validation_loss", lambda *args: {1.0: next(losses)})
    options = {"validation_steps": 1, "checkpointing_steps": 1, "max_train_steps": 4}
    train(image_folder, tmp_path / "out", checkpoints_total_limit=4, **options)
    ema = torch.load(tmp_path / "out" / "checkpoint-3" / "custom_checkpoint_0.pkl", weights_only=True)
    best = PetDiffusionPipeline.from_pretrained(tmp_path / "out" / "best")
    assert_equal([p.detach() for p in best.transformer.parameters()], ema["shadow_params"])


def test_a_second_training_in_a_folder_is_refused(image_folder, run_of_two, whole_run):
    before = (run_of_two / "metrics.jsonl").read_bytes()
    with claim_folder(run_of_two):
        ended = train_process(words(image_folder, run_of_two))
    assert ended.exit_code == 1 and "Traceback" not in ended.output, ended.output
    assert f"train_pet.py: Another training is running in '{run_of_two}'" in ended.output
    assert (run_of_two / "metrics.jsonl").read_bytes() == before
    # A training that has ended leaves its file, but no lock.
    train(image_folder, run_of_two, resume_from_checkpoint="latest", **RUN)
    assert_same_run(run_of_two, whole_run)
    assert (run_of_two / "training.lock").exists()
    with claim_folder(run_of_two):
        pass


def test_best_is_kept_and_is_whole_at_any_moment(image_folder, tmp_path, monkeypatch):
    # The second of four validations is the best one, long gone from the checkpoints at the end.
    losses = iter([3.0, 1.0, 2.0, 2.5, 9.0])  # the last is of the second run
    monkeypatch.setattr(results, "validation_loss", lambda *args: {1.0: next(losses)})
    options = {"validation_steps": 1, "checkpointing_steps": 1, "max_train_steps": 4}
    train(image_folder, tmp_path / "out", checkpoints_total_limit=1, **options)
    train(image_folder, tmp_path / "all", **{**options, "checkpoints_total_limit": 4, "validation_steps": 9})
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-4"]
    ema = torch.load(tmp_path / "all" / "checkpoint-2" / "custom_checkpoint_0.pkl", weights_only=True)
    best = PetDiffusionPipeline.from_pretrained(tmp_path / "out" / "best")
    assert_equal([p.detach() for p in best.transformer.parameters()], ema["shadow_params"])

    # A write that fails leaves the earlier one.
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "best").rglob("*") if path.is_file()}
    for parameter in best.transformer.parameters():
        parameter.data.zero_()

    def save_config(*args, **kwargs):
        raise OSError("no room")

    monkeypatch.setattr(type(best.scheduler), "save_config", save_config)
    with pytest.raises(OSError, match="best' cannot be written: no room"):
        save_pipeline(best, tmp_path / "out" / "best")
    assert before == {p: p.read_bytes() for p in (tmp_path / "out" / "best").rglob("*") if p.is_file()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_without_finite_gradients_changes_nothing(
    optimizer, image_folder, tmp_path, monkeypatch, capsys
):
    # An optimizer step is two micro-steps; those of the third step are 4 and 5.
    monkeypatch.setattr(BalancedAdaptiveLoss, "forward", spoiled_forward({5}))
    step_of_optimizer = AcceleratedOptimizer.step
    changes = []

    def step(self, closure=None):
        def everything():
            parameters = [p.detach() for group in self.param_groups for p in group["params"]]
            return copy.deepcopy((parameters, self.state_dict()))

        before = everything()
        step_of_optimizer(self, closure)
        if self.gradient_state.sync_gradients:
            changes.append(not is_equal(before, everything()))

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    options = {**RUN, "optimizer": optimizer, "max_train_steps": 4}
    train(image_folder, tmp_path / "out", **options)
    assert changes == [True, True, False, True, True]
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    (skipped,) = [record for record in records if "train/skipped_sigma_min" in record]
    assert skipped["step"] == 2 and skipped["train/skipped_sigma_min"] == skipped["train/skipped_sigma_max"]
    sigma = f"{skipped['train/skipped_sigma_min']:.3g}"
    assert (
        f"step 3 is skipped: 1 of 16 losses are not finite, at σ from {sigma} to {sigma}"
        in capsys.readouterr().out
    )
    assert [step for step, _ in log_of_losses(tmp_path / "out")] == [1, 2, 3, 4]
    content = checkpoint_content(tmp_path / "out" / "checkpoint-4")
    assert_finite(content)
    assert content["custom_checkpoint_0.pkl"]["optimization_step"] == 4  # of the EMA
    assert content["custom_checkpoint_2.pkl"]["micro_step"] == 2  # of the third epoch: 10 batches were drawn


def assert_finite(content) -> None:
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        for value in content:
            assert_finite(value)
    elif isinstance(content, torch.Tensor):
        assert content.isfinite().all()


def test_a_training_that_diverged_ends_with_advice(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(BalancedAdaptiveLoss, "forward", spoiled_forward(set(range(6, 100))))
    with pytest.raises(SystemExit) as exit_info:
        train(image_folder, tmp_path / "out", **RUN)
    captured = capsys.readouterr()
    assert exit_info.value.code == 1
    assert captured.out.count("is skipped") == train_pet.MAX_SKIPPED_STEPS
    assert "10 steps in a row had no finite gradient. Lower --learning_rate" in captured.err
    assert "--resume_from_checkpoint latest" in captured.err
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert_finite(checkpoint_content(tmp_path / "out" / "checkpoint-2"))
    # With the cause gone it goes on.
    monkeypatch.undo()
    train(image_folder, tmp_path / "out", resume_from_checkpoint="latest", **RUN)
    assert len(log_of_losses(tmp_path / "out")) == 12


@pytest.mark.parametrize(("skipped_from", "left"), [(0, {1}), (2, {1, 3, 5}), (3, {1})])
def test_a_signal_during_skipped_steps_saves_them_too(
    skipped_from, left, image_folder, tmp_path, monkeypatch, capsys
):
    # Three steps in a row are skipped, from the first on, after a checkpoint, and after a step without one.
    # The signal comes in the second of them.
    spoiled = {2 * step + 1 for step in range(skipped_from, skipped_from + 3)}
    monkeypatch.setattr(BalancedAdaptiveLoss, "forward", spoiled_forward(spoiled))
    train(image_folder, tmp_path / "whole", **RUN)
    monkeypatch.undo()
    capsys.readouterr()
    forward, calls = spoiled_forward(spoiled), []

    def interrupted_forward(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2 * skipped_from + 3:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args, **kwargs)

    monkeypatch.setattr(BalancedAdaptiveLoss, "forward", interrupted_forward)
    output_dir = tmp_path / "parts"
    with pytest.raises(SystemExit) as exit_info:
        train(image_folder, output_dir, **RUN)
    captured = capsys.readouterr()
    assert exit_info.value.code == 143 and captured.out.count("is skipped") == 2
    assert f"step {skipped_from} is saved in {output_dir}" in captured.err
    monkeypatch.undo()
    # Resumed, the run meets the micro-steps that are left of the spoiled ones: all, where it begins before.
    monkeypatch.setattr(BalancedAdaptiveLoss, "forward", spoiled_forward(left))
    train(image_folder, output_dir, resume_from_checkpoint="latest", **RUN)
    assert_same_run(output_dir, tmp_path / "whole")
    assert log_of_validation(output_dir) == log_of_validation(tmp_path / "whole")


def test_two_processes_train_a_loss_without_parameters(image_folder, tmp_path):
    options = {"max_train_steps": 1, "no-learned_weighting": True}
    for training in start_two(image_folder, tmp_path / "out", **options):
        ended = training.end()
        assert ended.exit_code == 0, ended.output


@pytest.mark.parametrize(
    "source",
    [
        pytest.param({}, id="in memory"),
        pytest.param({"streaming": True, "validation_images": 4}, id="stream", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_same_model_as_one_with_twice_the_batch(source, shuffled_files, tmp_path):
    # The third optimizer step has a loss that is not finite, on one of the processes.
    options = {
        "optimizer": "adamw",
        "adam_epsilon": 1e-3,  # Adam's step is the sign of the gradient where it is tiny, rounding included
        "gradient_accumulation_steps": 2,
        "max_train_steps": 6,
        "label_dropout": 0,
        "no-random_flip": True,
        "dataloader_num_workers": 0,  # processes that read a stream divide its files
        **source,
    }
    words = arguments(shuffled_files, tmp_path / "1", train_batch_size=8, **options)
    ended = Training(words, predictable=True).end()
    assert ended.exit_code == 0, ended.output
    words = arguments(shuffled_files, tmp_path / "2", train_batch_size=4, **options)
    both = [training.end() for training in start_processes(words, predictable=True)]
    assert [each.exit_code for each in both] == [0, 0], both
    one, two = ({path.name for path in (tmp_path / number / "checkpoint-6").iterdir()} for number in "12")
    assert two - one == {"random_states_1.pkl"} and not one - two
    for output in (ended.output, both[0].output + both[1].output):
        assert output.count("Saved the pipeline") == 1
        assert output.count("validation loss") == 2  # at steps 3 and 6
        assert output.count("step 3 is skipped: 1 of 16 losses are not finite, at σ from 1 to 1") == 1
    content = [checkpoint_content(tmp_path / number / "checkpoint-6") for number in "12"]
    for name in one - {"random_states_0.pkl", "manifest.json"}:
        assert_close(content[0][name], content[1][name], name)
    for records in zip(*(logged(tmp_path / number) for number in "12")):
        assert_close(*({k: v for k, v in r.items() if "second" not in k} for r in records), "metrics")


def logged(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def start_two(image_folder, output_dir, **options) -> list[Training]:
    return start_processes(words(image_folder, output_dir, **options))


def test_two_processes_are_interrupted_together_and_resume_exactly(image_folder, tmp_path):
    options = {"train_batch_size": 4, "num_train_epochs": None}
    for training in start_two(image_folder, tmp_path / "whole", **options):
        ended = training.end()
        assert ended.exit_code == 0, ended.output
    # Only one process receives the signal.
    trainings = start_two(image_folder, tmp_path / "parts", **options)
    trainings[1].wait_for(tmp_path / "parts" / "checkpoint-2")
    trainings[1].send(signal.SIGTERM)
    ended = [training.end() for training in trainings]
    assert [e.exit_code for e in ended] == [143, 143], ended
    assert ended[0].output.count("is saved in") == 1 and "is saved in" not in ended[1].output
    for training in start_two(image_folder, tmp_path / "parts", **options):
        ended = training.end()
        assert ended.exit_code == 0, ended.output
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    # With one process it goes on too, but says that it is not the same.
    shutil.rmtree(tmp_path / "parts" / "checkpoint-12")
    ended = train_process(words(image_folder, tmp_path / "parts"))
    assert ended.exit_code == 0 and "is of 2 processes: with 1 the training continues" in ended.output


def test_a_process_that_dies_takes_the_other_down(image_folder, tmp_path):
    trainings = start_two(image_folder, tmp_path / "out", max_train_steps=100_000, checkpointing_steps=1000)
    trainings[0].wait_for(tmp_path / "out" / "metrics.jsonl")
    trainings[1].send(signal.SIGKILL)
    began = time.monotonic()
    assert trainings[1].end().exit_code == -signal.SIGKILL
    ended = trainings[0].end()
    assert ended.exit_code not in (0, None)
    print(f"the other process ended with {ended.exit_code} after {time.monotonic() - began:.1f} s")


def test_processes_that_do_not_find_each_other_are_refused(image_folder, tmp_path, monkeypatch):
    # `accelerate launch --multi_gpu --num_processes 2` where there is no GPU: both would train and write.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, .* ACCELERATE_USE_CPU=true"):
        train(image_folder, tmp_path / "out", **RUN)
    assert not (tmp_path / "out").exists()
