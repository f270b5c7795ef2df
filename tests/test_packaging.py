"""What setup.cfg and the inline metadata of the training script say about installing."""

import ast
import configparser
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from support.loading import ROOT

import pet_pipeline


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_the_inline_metadata_of_the_script_agree_with_the_package(setup):
    script = (ROOT / "train_pet.py").read_text(encoding="utf-8")
    # The expression with which PEP 723 defines a block.
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (block,) = re.finditer(pattern, script)
    assert block["type"] == "script"
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block["content"]))
    assert set(metadata) == {"requires-python", "dependencies"}
    assert metadata["requires-python"] == setup["options"]["python_requires"]
    (requirement,) = map(Requirement, metadata["dependencies"])
    assert requirement.name == setup["metadata"]["name"]
    assert requirement.specifier.contains(pet_pipeline.__version__, prereleases=True)
    # While the version is 0.x, the script of one minor version does not fit the package of another.
    major, minor, *_ = pet_pipeline.__version__.split(".")
    assert not requirement.specifier.contains(f"{major}.{int(minor) + 1}.0")
    # The extras bring everything that the script imports.
    texts = setup["options"]["install_requires"].split("\n")
    for extra in requirement.extras:
        texts += setup["options.extras_require"][extra].split("\n")
    installed = {Requirement(text).name for text in texts if text}
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(script))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    third_party = imported - sys.stdlib_module_names - {"pet_pipeline"}
    assert "tqdm" in third_party and third_party <= installed


def test_a_wheel_has_every_file_of_the_package(setup):
    patterns = setup["options.package_data"]["pet_pipeline"].split()
    package = ROOT / "pet_pipeline"
    data = {path for pattern in patterns for path in package.glob(pattern)}
    for path in package.rglob("*"):
        is_source = path.suffix in (".py", ".pyc")
        assert path.is_dir() or is_source or path in data, path
        assert not path.is_symlink()  # an archive without links would hold the name of its target
