"""What is distributed: it holds what it should, and works where its source is not."""

from __future__ import annotations

import configparser
import email
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

import launch
import pipelines
import stec
from tests.conftest import smooth_image

ROOT = Path(__file__).parents[1]
IN_WHEEL = ("stec/", "pipelines/", "launch.py")


@dataclass(frozen=True)
class Built:
    tracked: set[str]
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source distribution of the tracked files as they are now, and the wheel that is built from it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("what belongs into a distribution is known from git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    (source / "tests" / "left.pyc").touch()
    subprocess.run([sys.executable, "-m", "build", "--no-isolation"], cwd=source, capture_output=True, check=True)
    (sdist,), (wheel,) = ((source / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    return Built(tracked, sdist, wheel)


@pytest.fixture(scope="module")
def run(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command in an empty folder, from which the installed wheel is found and its source is not."""
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(built.wheel)], capture_output=True, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": f"{site / 'bin'}:{os.environ['PATH']}"}

    def call(*command: str | Path, code: int = 0) -> str:
        empty = tmp_path_factory.mktemp("empty")
        done = subprocess.run(list(map(str, command)), cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    assert call(sys.executable, "-c", "import stec; print(stec.__file__)").startswith(str(site))
    return call


def test_a_source_distribution_holds_what_is_tracked(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or name.startswith("stec.egg-info/")}
    assert names - made == built.tracked


def test_a_wheel_holds_what_is_imported(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in built.tracked if name.startswith(IN_WHEEL)}
    assert {f"{package}/py.typed" for package in ("stec", "pipelines")} < names


def test_a_wheel_says_its_license_and_holds_it(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
        held = archive.read(f"{metadata.removesuffix('METADATA')}licenses/{fields['License-File']}")
    assert fields["License-Expression"] == "Apache-2.0"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == fields["License-Expression"]
    # The text as the Apache Software Foundation publishes it.
    assert hashlib.md5(held).hexdigest() == "3b83ef96387f14655fc854ddc3c6bd57"


def test_the_installed_command_works_anywhere(run: Callable[..., str]) -> None:
    assert "usage: stec [-h]" in run("stec", "--help")
    assert "cifar10-resnet18" in run("stec", "recipes")


def test_accelerate_starts_the_installed_module(run: Callable[..., str], tmp_path: Path) -> None:
    """It trains on pictures without labels, so that nothing is evaluated."""
    for n in range(8):
        Image.fromarray(smooth_image(40, 50, n)).save(tmp_path / f"{n}.png")
    flags = f"--dataset folder --data_dir {tmp_path} --backend torchvision --num_workers 0 --view_size 32 --width 4"
    flags += f" --batch_size 8 --max_epochs 1 --warmup_epochs 0 --results_path {tmp_path / 'run'}"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "cpu.yaml"]
    run(*launcher, "-m", "launch", *flags.split())
    assert (tmp_path / "run" / "encoder.safetensors").is_file()


CLIENT = """\
import numpy as np
import stec
import pipelines

commands: stec.Commands = stec.draw(stec.Policy(size=32), seed=0, epoch=0, first_position=0, image_hw=np.ones((2, 2)))
sampler = pipelines.Sampler(pipelines.open_data_set("demo", None).train, stec.Policy(), seed=0, batch_size=8)
stec.Policy(size="large")
stec.misspelt
pipelines.misspelt
"""


def test_type_checkers_see_the_installed_packages(run: Callable[..., str], tmp_path: Path) -> None:
    """The last three lines of the client are wrong, and no others."""
    client, settings = tmp_path / "client.py", tmp_path / "settings.cfg"
    client.write_text(CLIENT)
    # Reading the types of other libraries takes a minute, and none of them matters here.
    others = ",".join(f"{name}.*" for name in ("accelerate", "numba", "numpy", "nvidia", "PIL", "torch", "torchvision"))
    skipped = "follow_imports = skip\nfollow_imports_for_stubs = True\n"
    settings.write_text(f"[mypy]\nstrict = True\n[mypy-{others}]\n{skipped}")
    found = run(sys.executable, "-m", "mypy", "--config-file", settings, client, code=1)
    wrong = re.findall(r"client\.py:(\d+): error: (.*)", found)
    assert [int(line) for line, _ in wrong] == [7, 8, 9], found
    assert 'expected "int"' in wrong[0][1]


@pytest.mark.parametrize("package", [stec, pipelines])
def test_the_public_names_are_where_they_are_said_to_be(package: object) -> None:
    """``dir`` lists them, each has a docstring, and type checkers see the same ones."""
    module = importlib.import_module(str(vars(package)["__name__"]))
    for name in dir(module):
        assert getattr(module, name).__doc__, name
    listed = re.findall(r"import (\w+) as \1$", Path(str(module.__file__)).read_text(), re.MULTILINE)
    assert sorted(listed) == dir(module)
    with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute 'misspelt'"):
        _ = module.misspelt


def test_importing_the_packages_loads_nothing_heavy() -> None:
    code = "import sys, stec, pipelines; stec.Policy; print({'torch', 'nvidia', 'PIL', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_there_is_one_version() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    assert metadata["metadata"]["version"] == "attr: stec.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == stec.__version__
    assert metadata["options.entry_points"]["console_scripts"].split() == ["stec", "=", "launch:main"]
    assert callable(launch.main)


def test_the_citation_is_one() -> None:
    """The keys that version 1.2.0 of the format requires."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} < citation.keys()
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper" and paper["year"] == 2022
    surnames = [author["family-names"] for author in paper["authors"]]
    cited = re.search(r"\(([\w, ]+), NeurIPS 2022\)", (ROOT / "README.md").read_text())
    assert cited is not None and cited[1].split(", ") == surnames


def shell_commands(text: str) -> list[str]:
    """The commands in the fenced blocks of a page, one by one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [command.strip() for block in blocks for line in block.splitlines() for command in line.split("&&")]


def test_everyone_runs_the_same_checks() -> None:
    """GitHub's workflow, ``.ci/run`` and what CONTRIBUTING tells to do."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/checks.yml").read_text())
    job = workflow["jobs"]["checks"]
    ours = [step["run"] for step in job["steps"] if "run" in step]
    listed = shell_commands((ROOT / "CONTRIBUTING.md").read_text())
    assert sorted(ours) == sorted(listed) and len(set(ours)) == len(ours)
    assert set(ours) - set(shell_commands((ROOT / "README.md").read_text())) == set(listed[2:])
    script = (ROOT / ".ci/run").read_text().replace("pip install --quiet", "pip install").splitlines()
    assert [line for line in script if line in ours] == ours
    metadata = (ROOT / "setup.cfg").read_text()
    for version in job["strategy"]["matrix"]["python-version"]:
        assert f"Programming Language :: Python :: {version}\n" in metadata
