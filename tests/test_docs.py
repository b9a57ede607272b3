"""README and docs: commands parse, flags and files exist, links resolve, code runs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pyarrow
import pytest
import timm
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from pip._internal.commands import create_command
from pyarrow import parquet

import launch
import pipelines
import stec
from benchmarks import report
from tests.conftest import smooth_image
from tests.runs import Run
from tests.test_faults import SignalAtStep

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
PAGES["benchmarks/RESULTS.md"] = (ROOT / "benchmarks/RESULTS.md").read_text()

PLACEHOLDERS = {
    "--recipe ...": "--recipe cifar10-resnet18",
    " ...": "",
    "--dataset D ": "--dataset demo ",
    "_ms T": "_ms 9",
}
"""Placeholders for values other than names of folders and files."""
PROGRAMS = ("accelerate", "launch.py", "mypy", "pip", "pytest", "python", "ruff", "sbatch", "stec")
OTHERS = {"python train.py", "python eval.py", "accelerate launch", "launch.py", "stec"}
"""Programs of the official repository, and names without arguments."""
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text())


def fenced(text: str, language: str = "") -> list[str]:
    """The code blocks of a page in a language."""
    blocks = re.findall(r"^```(.*?)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for written_in, block in blocks if written_in == language]


def inline(text: str) -> list[str]:
    """The inline code of a page, without the left column of tables that start from official commands."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    if "| official " in prose:
        prose = re.sub(r"^\| .*? \| ", "", prose, flags=re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(page: str) -> list[str]:
    """The command lines of a page."""
    blocks = [line for block in fenced(PAGES[page]) for line in block.splitlines()]
    lines = [part.strip() for line in [*blocks, *inline(PAGES[page])] for part in line.split(" && ")]
    lines = [re.sub(r"^(\w+=\S+ )+", "", command) for command in lines]
    return [command for command in lines if command.split(" ")[0] in PROGRAMS and command not in OTHERS]


class Parsed(Exception):
    pass


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Check a command line with the parser of the program that it calls."""
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.json").write_text('{"seed": 1}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "run", lambda _benchmark: 0)

    def stop_after(parser: Callable[..., object]) -> Callable[..., object]:
        def parse_only(*arguments: object, **named: object) -> object:
            config = parser(*arguments, **named)
            if hasattr(config, "validate"):
                config.validate()
            raise Parsed

        return parse_only

    def call_launch(arguments: list[str]) -> None:
        name = arguments[0] if arguments and not arguments[0].startswith("-") else "train"
        module = importlib.import_module(f"stec.cli.{launch.COMMANDS[name]}")
        if arguments == [name]:
            return  # The name of a command in a sentence.
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="0"):
                launch.main(arguments)
        elif name == "train":
            assert launch.main([*arguments, "--print_config"]) == 0
        elif parsers := [parser for parser in ("parse", "parse_train") if hasattr(module, parser)]:
            with patch.object(module, parsers[-1], stop_after(getattr(module, parsers[-1]))), pytest.raises(Parsed):
                launch.main(arguments)
        else:
            assert launch.main(arguments) == 0

    def check_command(command: str) -> None:
        for placeholder, value in PLACEHOLDERS.items():
            command = command.replace(placeholder, value)
        match shlex.split(command):
            case ["accelerate", "launch", *arguments]:
                parsed = launch_command_parser().parse_args(arguments)
                assert parsed.config_file is None or (ROOT / parsed.config_file).is_file()
                assert parsed.training_script == ("launch" if parsed.module else "launch.py")
                call_launch(parsed.training_script_args)
            case ["python", "launch.py", *arguments] | ["launch.py", *arguments] | ["stec", *arguments]:
                call_launch(arguments)
            case ["sbatch", script, *arguments]:
                assert (ROOT / script).is_file()
                call_launch(arguments)
            case ["python", "-m", module, *arguments] if module.startswith("benchmarks."):
                assert importlib.import_module(module).main(arguments) == 0
            case ["python", "-m", module]:
                assert importlib.util.find_spec(module) is not None
            case ["python", "-c", code]:
                compile(code, command, "exec")
            case ["python", script]:
                assert (ROOT / script).is_file()
            case ["pip", name, *arguments]:
                _, packages = create_command(name).parse_args(arguments)
                extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
                assert set(re.findall(r"\[(\w+)\]", command)) <= set(extras)
                assert name == "check" or packages or "-e" in arguments
            case ["pytest", *arguments]:
                assert all((ROOT / name).exists() for name in arguments if name.endswith(".py"))
            case ["ruff" | "mypy", *_]:
                pass  # tests/test_packaging.py compares them with .ci/run.
            case _:
                raise AssertionError(f"{command}: no parser for this program")

    return check_command


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_are_valid(page: str, check: Callable[[str], None]) -> None:
    for command in commands(page):
        try:
            check(command)
        except (SystemExit, AssertionError) as error:
            raise AssertionError(f"{page} documents {command!r}, which is invalid: {error!r}") from error


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """All flags of this project's programs, from their help, and of pip and Accelerate's launcher."""
    output = io.StringIO()
    programs = [(launch.main, [name, "--help"]) for name in launch.COMMANDS if name != "recipes"]
    programs += [(importlib.import_module(f"benchmarks.{name}").main, ["--help"]) for name in BENCHMARKS]
    for main, arguments in programs:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            main(arguments)
    text = output.getvalue() + create_command("install").parser.format_help()
    text += (ROOT / "configs/slurm.sh").read_text()
    return set(re.findall(r"(?<![\w-])--[\w-]+", text)) | set(launch_command_parser()._option_string_actions)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page: str, flags: set[str]) -> None:
    flags_of_page = {flag for span in inline(PAGES[page]) for flag in re.findall(r"(?<!\S)--[\w-]+", span)}
    # The diffs of a page may add a flag.
    added = {
        f"--{name}" for patch in fenced(PAGES[page], "diff") for name in re.findall(r"^\+ +(p_\w+): float", patch, re.M)
    }
    assert flags_of_page <= flags | added


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in map(slug, headings), target


def test_pages_named_in_the_code_exist() -> None:
    """In messages, help texts and comments."""
    for folder in ("stec", "pipelines", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w-]+\.md", path.read_text()):
                assert (ROOT / page).is_file(), (path, page)


def test_the_public_names_are_listed() -> None:
    table = [line.split(" | ")[0] for line in PAGES["docs/install.md"].splitlines() if line.startswith("| `")]
    names = {span for cell in table for span in re.findall(r"`((?:stec|pipelines)\.\w+)`", cell)}
    assert names == {f"{module.__name__}.{name}" for module in (stec, pipelines) for name in dir(module)}


# --- Documented procedures ---

SMALL = (
    "--dataset folder --batch_size 8 --view_size 32 --max_epochs 2 --warmup_epochs 0 --num_workers 1 --log_every 1"
).split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 images."""
    folder = tmp_path_factory.mktemp("images")
    for n in range(16):
        Image.fromarray(smooth_image(40, 50, n)).save(folder / f"{n}.png")
    return folder


def test_training_on_a_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps of the page: index, training, and the encoder in torchvision's network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index, train, *_ = (
        shlex.split(block.replace("IMAGES", str(images)).replace("RUN", str(tmp_path / "run")))
        for block in fenced(PAGES["docs/data.md"])
    )
    assert launch.main(index[2:]) == 0
    Run(*train[3:], *SMALL).end()
    (code,) = fenced(PAGES["docs/data.md"], "python")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("RUN", "run"), {})


def test_training_an_encoder_of_timm(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's training, its export, and the Python code that loads it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    _, train, export = fenced(PAGES["docs/encoders.md"])[0].replace("IMAGES", str(images)).splitlines()
    Run(*shlex.split(train.replace("RUN", str(tmp_path / "RUN")))[3:], *SMALL[2:4], *SMALL[6:]).end()
    assert launch.main(shlex.split(export)[2:]) == 0
    trained, of_timm = fenced(PAGES["docs/encoders.md"], "python")
    names = {"images": torch.rand(2, 3, 64, 64)}
    exec(trained, names)
    assert torch.equal(names["features"], stec.load_encoder("RUN")(names["images"]))
    torch.save(timm.create_model("resnet10t").state_dict(), "timm.pth")
    exec(of_timm, names)
    assert names["encoder"](names["images"]).shape == (2, 512)


def test_packing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's commands: packing, training on the shards, and training on Parquet files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "label": 1} for path in images.iterdir()]
    for split in ("train", "validation"):
        parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / f"{split}-00000-of-00001.parquet")
    blocks = "\n".join(fenced(PAGES["docs/data.md"]))
    names = {"IMAGES": images, "SHARDS": tmp_path / "shards", "DATA": tmp_path}
    names |= {name: tmp_path / name for name in ("PACKED_RUN", "PARQUET_RUN")}
    for command in blocks.splitlines():
        if command.startswith("python launch.py pack") or command.endswith(("PACKED_RUN", "PARQUET_RUN")):
            words = [str(names.get(word, word)) for word in shlex.split(command)]
            small = [*SMALL[2:], "--arch", "resnet18", "--width", "4"] if words[0] == "accelerate" else []
            Run(*words[words.index("launch.py") + 1 :], *small).end()
    assert (tmp_path / "PACKED_RUN/encoder.safetensors").exists() and (tmp_path / "PARQUET_RUN/results.json").exists()


def test_slurm(images: Path, tmp_path: Path) -> None:
    """The command of the job, with SLURM's signal in the middle, and again."""
    (command,) = (block for block in fenced(PAGES["docs/runs.md"]) if block.startswith("sbatch"))
    _, script, *arguments = shlex.split(command.replace("RUN", str(tmp_path / "run")).replace("DATA", str(images)))
    added = re.search(r'"\$@" (--resume .*)$', (ROOT / script).read_text(), re.MULTILINE)
    stopped = re.search(r"^STOPPED=(\d+)$", (ROOT / script).read_text(), re.MULTILINE)
    assert added is not None and stopped is not None
    flags = [*arguments, *shlex.split(added[1].replace("$STOPPED", stopped[1]))]
    assert " ".join(flags[-4:]) == "--resume auto --stop_exit_code 85"
    flags += [*SMALL, "--arch", "resnet18", "--width", "4", "--gpus", "1", "--num_nodes", "1"]
    Run(*flags, prepare=SignalAtStep(2, signal.SIGUSR1)).end(85)
    assert "Resuming after step 2." in Run(*flags).end(0)


def test_measuring(tmp_path: Path) -> None:
    """The first benchmark of the page and the profile of a run."""
    first, _, profile = fenced(PAGES["docs/performance.md"])[0].splitlines()
    short = "--batch_size 4 --workers 1 --repeats 1 --seconds 0.01 --contenders compiled".split()
    assert importlib.import_module(first.split()[2]).main([*first.split()[3:], *short]) == 0
    profile = profile.replace("--profile 20", "--profile 2")
    small = "--limit_train 128 --batch_size 8 --width 4 --max_epochs 1 --num_workers 1".split()
    assert "backward" in Run(*shlex.split(profile.replace("RUN", str(tmp_path / "run")))[2:], *small).end()
    assert (tmp_path / "run/profile.json").is_file() and (tmp_path / "run/trace.json.gz").is_file()


UPSIDE_DOWN = """
from dataclasses import fields, replace
from pathlib import Path
from shutil import which
import numpy as np, torch
from pipelines import ImageArray, Loader, Sampler
from pipelines.executors import torchvision as reference
from stec.loaders import policy_of
from stec.config import TrainConfig
from stec.geometry import window_matrices
from stec.cli.train import parse_train
from tests.test_gpu_kernels import HostKernels, build, cpu_views

config, _ = parse_train("--p_upside_down 0.5 --p_color_jitter 0 --p_grayscale 0 --view_size 32".split())
assert policy_of(config).p_upside_down == 0.5 and TrainConfig().augmentation.p_upside_down == 0
pixels = np.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), np.uint8)
images = ImageArray(pixels=pixels, labels=np.full(8, -1))
sampler = Sampler(images, policy_of(config), seed=1, batch_size=8)
plan = sampler.plan(0)
commands, upside_down = plan.commands, plan.commands.upside_down
assert 0.2 < upside_down.mean() < 0.8
theta = window_matrices(commands)
assert ((theta[..., 1, 1] < 0) == upside_down).all() and ((theta[..., 0, 0] < 0) == commands.flip).all()
loader = Loader(sampler, backend="dali", device=torch.device("cpu"), workers=1)
batch = next(loader.batches(0))
upright = replace(commands, upside_down=upside_down & False)
gpu = HostKernels(build(Path("kernels.so").absolute(), "-shared", reach=0, threads=1), 0) if which("g++") else None
for n, image_id in enumerate(plan.image_ids.tolist()):
    turned = replace(commands, **{f.name: getattr(commands, f.name)[n : n + 1] for f in fields(commands)})
    compiled = cpu_views(turned, plan.policy, pixels[image_id])
    for v in (0, 1):
        view, plain = (reference.execute(images.open(image_id), c, plan.policy, n, v) for c in (commands, upright))
        assert torch.equal(view, plain.flip(1) if upside_down[n, v] else plain)
        assert np.array_equal(compiled[v], view.permute(1, 2, 0))
        assert (batch.views[n, v] - view).abs().mean() * 255 < 1
    if gpu is not None:
        assert np.array_equal(gpu.color(turned, plan.policy, *gpu.crop(turned, 32, pixels[image_id])), compiled)
"""
WAVES = """
import numpy as np
from pathlib import Path
from pipelines import UserError, open_data_set
from stec.cli.train import parse_train

try:
    open_data_set("waves", Path("."))
    raise AssertionError("opened missing files")
except UserError:
    pass
for split, count in (("train", 4), ("test", 2)):
    np.save(f"{split}.npy", np.full((count, 48, 64, 3), count, np.uint8))
    np.save(f"{split}-labels.npy", np.arange(count) % 2)
data_set = open_data_set("waves", Path("."))
assert len(data_set.train) == 4 and data_set.labeled is data_set.train and len(data_set.test) == 2
assert data_set.train.pixels[0].max() == 4 and data_set.test.labels.tolist() == [0, 1]
config, _ = parse_train("--dataset waves --data_dir .".split())
assert config.view_size_px == 32
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the changes of the page applied."""
    folder = tmp_path_factory.mktemp("changed")
    for name in ("stec", "pipelines", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    patch = "".join(fenced(PAGES["docs/extend.md"], "diff"))
    subprocess.run(["git", "apply", "-C1", "-"], cwd=folder, input=patch, text=True, check=True)
    return folder


@pytest.mark.parametrize("code", [UPSIDE_DOWN, WAVES], ids=["command", "data set"])
def test_the_changes_of_the_page_work(code: str, changed: Path) -> None:
    environment = {"PYTHONPATH": str(changed), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=changed, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_and_names_in_the_page_exist() -> None:
    """Each file and each name that the page mentions."""
    source = "".join(
        path.read_text() for folder in ("stec", "pipelines", "tests") for path in (ROOT / folder).rglob("*.py")
    )
    for span in inline(PAGES["docs/extend.md"]):
        if re.fullmatch(r"[\w/]+\.py", span):
            assert (ROOT / span).is_file(), span
        elif re.fullmatch(r"\w+", span):
            assert re.search(rf"\b{span}\b", source), span


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_the_picture_is_reproducible(tmp_path: Path) -> None:
    """By the command in the README, pixel by pixel."""
    (command,) = (span for span in inline(PAGES["README.md"]) if "preview docs/preview.png" in span)
    picture = tmp_path / "preview.png"
    arguments = shlex.split(command.replace("docs/preview.png", str(picture)))[2:]
    assert launch.main(arguments) == 0
    with Image.open(picture) as new, Image.open(ROOT / "docs/preview.png") as committed:
        assert new.size == committed.size and new.tobytes() == committed.tobytes()


def test_the_tour_prints_what_it_shows() -> None:
    """The session of the page, with its output."""
    session = "".join(fenced(PAGES["docs/tour.md"], "python"))
    _, *outputs = fenced(PAGES["docs/tour.md"], "text")
    result = subprocess.run([sys.executable, "-c", session], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(outputs)
