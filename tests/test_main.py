import subprocess
import sys

import pytest
from PIL import Image

from pet_pipeline.__main__ import main


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


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


def test_failures_are_one_line(saved, tmp_path, capsys):
    assert main(["generate", "--model", saved, "--class", "bird", "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "no class 'bird'; this pipeline knows cat, dog" in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    for words in (["generate", "--steps", "0"], ["generate", "--num_samples", "many"], ["paint"]):
        with pytest.raises(SystemExit) as exit_info:
            main(words)
        assert exit_info.value.code == 2


def test_help_does_not_load_pytorch():
    code = "import sys, pet_pipeline.__main__ as m\n"
    code += "try: m.main(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--guidance_scale" in result.stdout
