import configparser
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import train_pet
from pet_pipeline import AdaptiveEDMScheduler, PetClassificationPipeline, PetDiffusionPipeline
from pet_pipeline.__main__ import build_parser, main
from pet_pipeline.evaluation.metrics import FEATURE_EXTRACTORS
from pet_pipeline.pipeline_pet_classification import WEIGHTINGS
from pet_pipeline.sampling import MAX_SEED, image_settings, save_image


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_defaults_and_choices_are_the_same_everywhere():
    # The command line, the page and the training know them without importing the pipelines.
    parser = build_parser()
    evaluations = inspect.signature(PetClassificationPipeline.__call__).parameters["num_evaluations"].default
    for words in (
        ["classify", "cat.png"],
        ["calibrate", "out", "--reference", "data"],
        ["evaluate", "--reference", "data"],
    ):
        assert parser.parse_args(words).num_evaluations == evaluations
    for command, option, choices in (
        ("classify", "--weighting", WEIGHTINGS),
        ("evaluate", "--features", FEATURE_EXTRACTORS),
    ):
        subparser = parser._subparsers._group_actions[0].choices[command]
        assert list(subparser._option_string_actions[option].choices) == list(choices)
    trained = train_pet.parse_args(["--max_train_steps", "1"])
    scheduler = AdaptiveEDMScheduler()
    assert (trained.p_mean, trained.p_std) == (scheduler.config.p_mean, scheduler.config.p_std)


def test_generate_writes_images_and_a_grid(saved, tmp_path, capsys):
    out = tmp_path / "samples"
    assert main(["generate", "--model", saved, "--num_samples", "2", "--steps", "2", "--out", str(out)]) == 0
    names = {p.name for p in out.iterdir()}
    assert names == {"cat-0.png", "cat-1.png", "dog-0.png", "dog-1.png", "grid.png"}
    assert "4 images" in capsys.readouterr().out
    with Image.open(out / "dog-1.png") as image:
        assert image.size == (8, 8)


def test_an_image_depends_on_its_seed_alone(saved, tmp_path):
    def generate(name, *words):
        main(["generate", "--model_path", saved, "--steps", "3", "--out", str(tmp_path / name), *words])
        return tmp_path / name

    many = generate("many", "--num_samples", "3", "--seed", "5")
    one = generate("one", "--num_samples", "1", "--seed", "7", "--class", "dog")
    assert {p.name for p in one.iterdir()} == {"dog-7.png", "grid.png"}
    with Image.open(many / "dog-7.png") as a, Image.open(one / "dog-7.png") as b:
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes())) <= 1


def test_generate_draws_in_batches(pipeline, tmp_path, monkeypatch):
    # An image does not depend on how many are drawn at once, and no more are in memory.
    pipeline.save_pretrained(tmp_path / "model")
    sizes = []
    draw = PetDiffusionPipeline.__call__

    def counting_draw(self, labels, *args, **kwargs):
        sizes.append(len(labels))
        return draw(self, labels, *args, **kwargs)

    monkeypatch.setattr(PetDiffusionPipeline, "__call__", counting_draw)
    words = ["generate", "--num_samples", "5", "--steps", "2", "--model", str(tmp_path / "model")]
    files = []
    for batch_size in ("4", "64"):
        assert main([*words, "--batch_size", batch_size, "--out", str(tmp_path / batch_size)]) == 0
        files.append({path.name: path for path in (tmp_path / batch_size).iterdir()})
    assert sizes == [4, 4, 2, 10]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 11
    for name in files[0]:
        with Image.open(files[0][name]) as first, Image.open(files[1][name]) as second:
            assert max(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes())) <= 1


def test_an_image_keeps_its_settings(saved, tmp_path, capsys):
    words = ["generate", "--model", saved, "--num_samples", "2", "--steps", "3", "--seed", "5"]
    words += ["--guidance_schedule", "constant", "--guidance_scale", "3", "--negative_class", "cat"]
    words += ["--pag_scale", "0.5"]
    main([*words, "--scheduler", "heun", "--class", "dog", "--out", str(tmp_path / "first")])
    like = ["generate", "--model", saved, "--like", str(tmp_path / "first" / "dog-6.png"), "--out"]
    assert main([*like, str(tmp_path / "second")]) == 0
    assert {p.name for p in (tmp_path / "second").iterdir()} == {"dog-6.png", "grid.png"}
    assert "other weights" not in capsys.readouterr().err

    def pixels(folder, name):
        with Image.open(tmp_path / folder / name) as image:
            return image.tobytes()

    assert max(abs(a - b) for a, b in zip(pixels("first", "dog-6.png"), pixels("second", "dog-6.png"))) <= 1
    # What is given replaces what the image keeps.
    assert main([*like, str(tmp_path / "third"), "--class", "cat", "--num_samples", "2"]) == 0
    assert {p.name for p in (tmp_path / "third").iterdir()} == {"cat-6.png", "cat-7.png", "grid.png"}

    PetDiffusionPipeline(random_model(seed=1), AdaptiveEDMScheduler()).save_pretrained(tmp_path / "other")
    like[2] = str(tmp_path / "other")
    assert main([*like, str(tmp_path / "fourth"), "--class", "1", "--negative_class", "0"]) == 0
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"no image", None, "[1]", "{", '{"steps": -1}', '{"class": ["x"]}'])
def test_a_strange_image_is_no_command(saved, tmp_path, capsys, content):
    path = tmp_path / "image.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        info = PngInfo()
        if content is not None:
            info.add_itxt("pet_pipeline", content)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    try:
        code = main(["generate", "--model", saved, "--like", str(path), "--out", str(tmp_path / "x")])
    except SystemExit as exit_info:  # the parser refuses what the image keeps
        code = exit_info.code
    assert code in (1, 2) and not (tmp_path / "x").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_the_other_pictures_show_the_classes_asked_for(saved, tmp_path, capsys):
    words = ["generate", "--model", saved, "--num_samples", "1", "--steps", "2", "--strip", "--compare_steps"]
    words += ["--scheduler", "EDMEulerScheduler"]
    sizes = []
    for classes in ([], ["--class", "dog"]):
        out = tmp_path / str(len(classes))
        assert main([*words, *classes, "--out", str(out)]) == 0
        assert "grid.png and strip.png and steps.png" in capsys.readouterr().out
        pictures = [Image.open(out / name) for name in ("strip.png", "steps.png")]
        sizes.append((pictures[0].height, pictures[1].width))
    assert sizes[1][0] < 0.7 * sizes[0][0] and sizes[1][1] < 0.7 * sizes[0][1]


def test_another_precision_is_no_other_model(saved, tmp_path, capsys):
    words = ["generate", "--model", saved, "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*words, "--num_samples", "1"]) == 0
    image = str(tmp_path / "out" / "dog-0.png")
    assert main([*words, "--like", image, "--dtype", "bfloat16"]) == 0
    assert "other weights" not in capsys.readouterr().err


def test_failures_are_one_line(saved, tmp_path, capsys):
    assert main(["generate", "--model", saved, "--class", "bird", "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "no class 'bird'; this pipeline knows cat, dog" in error and error.count("\n") == 1
    assert main(["generate", "--model", saved, "--device", "nowhere", "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "device 'nowhere' cannot be used" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    for words in (["generate", "--steps", "0"], ["generate", "--num_samples", "many"], ["paint"]):
        with pytest.raises(SystemExit) as exit_info:
            main(words)
        assert exit_info.value.code == 2


def test_the_words_reach_the_pipeline(saved, tmp_path, monkeypatch):
    seen = []
    draw = PetDiffusionPipeline.__call__

    def watch(self, *args, **kwargs):
        seen.append((self.scheduler.config.solver, self.transformer.dtype, kwargs))
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(PetDiffusionPipeline, "__call__", watch)
    words = ["generate", "--model", saved, "--num_samples", "1", "--steps", "3", "--scheduler", "heun"]
    words += ["--guidance_scale", "1.25", "--guidance_schedule", "interval", "--negative_class", "dog"]
    words += ["--pag_scale", "0.75"]
    assert main([*words, "--dtype", "bfloat16", "--class", "cat", "--out", str(tmp_path / "out")]) == 0
    ((solver, dtype, settings),) = seen
    assert solver == "heun" and dtype == torch.bfloat16
    assert settings["guidance_scale"] == 1.25 and settings["guidance_schedule"] == "interval"
    assert settings["pag_scale"] == 0.75
    assert settings["num_inference_steps"] == 3 and settings["negative_class_labels"] == [1]


@pytest.mark.parametrize(
    ("id2label", "ids"), [({0: "3", 1: "8"}, [0, 1]), ({0: "1", 1: "0"}, [0, 1]), ({}, [0, 1])]
)
def test_classes_may_be_named_by_numbers(model, tmp_path, monkeypatch, id2label, ids):
    PetDiffusionPipeline(model, AdaptiveEDMScheduler(), id2label=id2label).save_pretrained(tmp_path / "model")
    drawn = []
    draw = PetDiffusionPipeline.__call__

    def watch(self, labels, *args, **kwargs):
        drawn.append(labels)
        return draw(self, labels, *args, **kwargs)

    monkeypatch.setattr(PetDiffusionPipeline, "__call__", watch)
    words = ["generate", "--num_samples", "1", "--steps", "1", "--model", str(tmp_path / "model")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert drawn == [ids]


def test_two_thousand_million_images_are_not_listed_in_advance(saved, tmp_path, monkeypatch):
    draw = PetDiffusionPipeline.__call__
    batches = []

    def interrupted(self, labels, *args, **kwargs):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(labels)
        return draw(self, labels, *args, **kwargs)

    monkeypatch.setattr(PetDiffusionPipeline, "__call__", interrupted)
    words = ["generate", "--model", saved, "--steps", "1", "--batch_size", "2", "--num_samples", "2000000000"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"cat-{seed}.png" for seed in range(4)}


def test_every_seed_can_be_given_again(saved, tmp_path, capsys):
    words = ["generate", "--model", saved, "--steps", "1", "--seed", str(MAX_SEED), "--class", "cat"]
    with pytest.raises(SystemExit):
        main([*words, "--num_samples", "2", "--out", str(tmp_path / "two")])
    assert "the last seed" in capsys.readouterr().err and not (tmp_path / "two").exists()
    assert main([*words, "--num_samples", "1", "--out", str(tmp_path / "one")]) == 0
    image = str(tmp_path / "one" / f"cat-{MAX_SEED}.png")
    assert main(["generate", "--model", saved, "--like", image, "--out", str(tmp_path / "again")]) == 0


def test_a_missing_package_is_named_with_its_extra(saved, monkeypatch, capsys):
    for name in ("training.data", "evaluation.reference", "evaluation.calibration"):
        monkeypatch.delitem(sys.modules, f"pet_pipeline.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["calibrate", saved, "--reference", "any"]) == 1
    assert 'pip install ".[train]"' in capsys.readouterr().err


def test_a_port_is_checked_before_anything_is_loaded(capsys):
    with pytest.raises(SystemExit):
        main(["app", "--port", "70000"])
    assert "must be at most 65535" in capsys.readouterr().err


def test_help_does_not_load_pytorch():
    code = "import sys, pet_pipeline.__main__ as m\n"
    code += "try: m.main(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--guidance_scale" in result.stdout


@pytest.mark.parametrize("name", ["../../outside", "a/b", ".hidden", "", "C:\\x", "x" * 200])
def test_a_class_name_cannot_leave_the_folder(tmp_path, name):
    labels = {0: name, 1: "dog"} if name else {1: "dog"}
    PetDiffusionPipeline(random_model(), AdaptiveEDMScheduler(), id2label=labels).save_pretrained(
        tmp_path / "model"
    )
    before = set(tmp_path.iterdir())
    words = ["generate", "--model", str(tmp_path / "model"), "--num_samples", "1", "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "deep" / "out")]) == 0
    names = {path.name for path in (tmp_path / "deep" / "out").iterdir()}
    assert names == {"class-0-0.png" if name else "0-0.png", "dog-0.png", "grid.png"}
    assert set(tmp_path.iterdir()) - before == {tmp_path / "deep"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("device", ["meta", "nonsense"])
def test_a_device_without_data_is_one_error(tmp_path, capsys, device):
    pipeline = PetDiffusionPipeline(random_model(), AdaptiveEDMScheduler())
    pipeline.save_pretrained(tmp_path / "model")
    words = ["generate", "--model", str(tmp_path / "model"), "--device", device]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert re.fullmatch(f"pet-pipeline: The device '{device}' cannot be used: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "JSON object"),
        (b'"user/repository"', "JSON object"),  # diffusers would ask the Hub for it
        (b'{"num_layers": 1000000}', "`num_layers` must be an integer in [1, 1000], but is 1000000"),
        (b"\xff", "is not a valid JSON file"),
    ],
)
def test_a_damaged_model_is_one_line(saved, tmp_path, capsys, content, message):
    (Path(saved) / "transformer" / "config.json").write_bytes(content)
    assert main(["generate", "--model", saved, "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"pet-pipeline: The model {saved!r} cannot be loaded") and message in error
    assert not (tmp_path / "x").exists()


def test_the_package_ships_all_its_files():
    root = Path(__file__).parent.parent
    options = configparser.ConfigParser()
    options.read(root / "setup.cfg")
    patterns = options["options.package_data"]["pet_pipeline"].split()
    files = [path for path in (root / "pet_pipeline").rglob("*") if path.is_file()]
    data = [path.relative_to(root / "pet_pipeline") for path in files if path.suffix not in (".py", ".pyc")]
    shipped = {path for pattern in patterns for path in (root / "pet_pipeline").glob(pattern)}
    assert data and {root / "pet_pipeline" / path for path in data} <= shipped


def test_an_image_keeps_the_strengths_of_guidance_that_its_model_has(pipeline, tmp_path):
    def generate(*options):
        words = ["generate", "--model", str(tmp_path / "model"), "--num_samples", "1", "--steps", "2"]
        assert main([*words, *options, "--class", "cat", "--out", str(tmp_path / "out")]) == 0
        return image_settings(tmp_path / "out" / "cat-0.png")

    saved = {"guidance_scale": 1.5, "pag_scale": 0.75, "autoguidance_scale": 2.0}
    PetDiffusionPipeline.from_pipe(pipeline, guide=random_model(1), **saved).save_pretrained(
        tmp_path / "model"
    )
    kept = generate()
    assert {name: kept[name] for name in saved} == saved
    for name in saved:
        changed = generate(f"--{name}", "1.25")
        assert {name: changed[name] for name in saved} == {**saved, name: 1.25}


def test_an_image_of_an_earlier_version_is_repeated_and_another_guide_is_noticed(pipeline, tmp_path, capsys):
    def generate(*options):
        words = ["generate", "--model", str(tmp_path / "model"), "--num_samples", "1", "--steps", "6"]
        assert main([*words, *options, "--out", str(tmp_path / "out")]) == 0
        with Image.open(tmp_path / "out" / "cat-0.png") as image:
            return Image.frombytes("RGB", image.size, image.tobytes())  # without the settings

    pipeline.save_pretrained(tmp_path / "model")
    early = generate("--class", "cat")
    kept = image_settings(tmp_path / "out" / "cat-0.png")
    later = {"pag_scale": 0.5, "autoguidance_scale": 3.0}
    PetDiffusionPipeline.from_pipe(pipeline, guide=random_model(1), **later).save_pretrained(
        tmp_path / "model"
    )
    assert generate("--class", "cat") != early
    for name in ("pag_scale", "autoguidance_scale"):
        del kept[name]
    save_image(early, tmp_path / "early.png", kept)
    assert generate("--like", str(tmp_path / "early.png")) == early
    assert "other weights" not in capsys.readouterr().err
    (tmp_path / "out" / "cat-0.png").rename(tmp_path / "late.png")
    random_model(2).save_pretrained(tmp_path / "model" / "guide")
    generate("--like", str(tmp_path / "late.png"))
    assert "late.png was drawn by a model with other weights" in capsys.readouterr().err


def test_a_revision_reaches_the_hub_and_needs_one(saved, tmp_path, monkeypatch, capsys):
    given = []
    from_pretrained = PetDiffusionPipeline.from_pretrained

    def load(path=None, **kwargs):
        given.append((path, kwargs.pop("revision")))
        return from_pretrained(saved, **kwargs)

    monkeypatch.setattr(PetDiffusionPipeline, "from_pretrained", load)
    words = [
        "generate",
        "--num_samples",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--revision",
        "v1",
    ]
    assert main([*words, "--model", "user/pets"]) == 0
    assert given == [("user/pets", "v1")]
    for model in (["--model", str(saved)], []):
        assert main([*words, *model]) == 1
        assert "--revision needs the Hub id" in capsys.readouterr().err
    assert len(given) == 1
