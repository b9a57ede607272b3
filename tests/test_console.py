"""The output on terminals of several kinds, in log files and in notebooks, and the commands to copy from it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyte
import pytest
from jupyter_client.manager import start_new_kernel

from stec.cli.train import parse_train
from tests.runs import Run

ROOT = Path(__file__).parents[1]
WORDS = ["python", "launch.py", "eval", "--data_dir", "/my data/it's", "--ckpt_path", "runs/1/model.safetensors"]
PARTS = [
    "loss 14.077",
    "contrast 4.959",
    "inverse 1.849 (0.17)",
    "classifier 0.05",
    "lr 0.00263",
    "8176 images/s",
    "wait 2%",
]
SESSION = f"""
import time
from stec.console import Console

console = Console(enabled=True)
with console.counting() as show:
    for done in range(11):
        show("headers", done, 10)
console.facts("S-TEC", [("data", "demo: 128 training images"), ("files", "/a/folder/of/mine")])
values = dict(
    loss=14.077, contrastive_loss=4.959, inverse_loss=1.849, inverse_accuracy=0.17, classifier_loss=1,
    classifier_accuracy=0.05, learning_rate=0.00263, images_per_second=8176, wait_fraction=0.02,
)
with console.training(first_step=0, total_steps=30):
    for step in range(1, 31):
        now = dict(values, step=step, epoch=(step - 1) // 10)
        console.report(now, epochs=3, eta_seconds=30 - step, end_of_epoch=step % 10 == 0)
        time.sleep(0.02)
with console.waiting("evaluating"):
    time.sleep(0.15)
console.table("Results", ["", "before training", "after training"], [["linear probing top-1", "10.0%", "20.0%"]])
console.next_steps("What to do next", [("evaluate it", {WORDS!r})])
"""


@contextmanager
def terminal(width: int, *command: str | Path, **environment: str) -> Iterator[int]:
    """Run a command on a new terminal; yields a file descriptor with its output."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 100, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**outside_of_notebooks(), "TERM": "xterm-256color", **environment},
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    try:
        yield ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def outside_of_notebooks() -> dict[str, str]:
    rich_heeds = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JPY_PARENT_PID")
    return {name: value for name, value in os.environ.items() if name not in rich_heeds}


def read(descriptor: int) -> Iterator[bytes]:
    """Yield the output of a command until it ends."""
    with suppress(OSError):  # Linux raises an error if the other end is closed
        while chunk := os.read(descriptor, 4096):
            yield chunk


def rows(screen: pyte.Screen) -> list[str]:
    return [row.rstrip() for row in screen.display if row.strip()]


def assert_whole(text: str) -> None:
    """Assert that each of three epochs is there once, and that no figure is broken between lines."""
    for epoch in (1, 2, 3):
        assert text.count(f"epoch {epoch}/3") == 1, text
    for part in PARTS:
        assert text.count(part) == 3, text
    assert "headers" not in text or "headers (10)" in text


def command_in(lines: list[str]) -> list[str]:
    """The words that a shell reads from the printed command."""
    first = next(k for k, line in enumerate(lines) if line.strip().startswith("python"))
    script = 'python() { printf "%s\\n" "$@"; }\n' + "\n".join(lines[first:])
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return ["python", *shell.stdout.splitlines()]


@pytest.mark.parametrize("width", [30, 80])
def test_a_terminal_of_any_width(width: int) -> None:
    screen = pyte.Screen(width, 100)
    stream = pyte.ByteStream(screen)
    seen = set()
    with terminal(width, "-c", SESSION) as end:
        for chunk in read(end):
            stream.feed(chunk)
            bars = [row for row in rows(screen) if re.search("[━╸]{2}", row) and "┏" not in row and "┡" not in row]
            assert len(bars) <= 1, screen.display
            seen |= {re.sub(" .*", "", bar) for bar in bars if "%" in bar}
    shown = rows(screen)
    assert "epoch" in seen, "the display was there"
    assert not any(re.search("[━╸]{2} *[0-9]+ %", row) or "evaluating" in row for row in shown), "and went"
    assert_whole("\n".join(shown))
    assert not screen.cursor.hidden
    assert command_in(shown) == WORDS


def test_twenty_columns_hold_the_display() -> None:
    """Epoch, bar and percentage in one line; the figures below it are cut off."""
    screen = pyte.Screen(20, 100)
    stream = pyte.ByteStream(screen)
    displays = []
    with terminal(20, "-c", SESSION) as end:
        for chunk in read(end):
            stream.feed(chunk)
            displays += [rows(screen)[-3:]]
    full = [
        lines for lines in displays if len(lines) == 3 and re.fullmatch(r"epoch [123]/3 [━╸╺ ]+ +[0-9]+ %", lines[0])
    ]
    assert full
    assert {lines[1][:6] for lines in full} == {"left 0"}
    assert {lines[2] for lines in full} == {"loss 14.077  cont…"}
    assert_whole("\n".join(rows(screen)))
    assert not screen.cursor.hidden


@pytest.mark.parametrize("forced", [{}, {"FORCE_COLOR": "1"}])
def test_a_log_file_has_plain_lines(forced: dict[str, str], tmp_path: Path) -> None:
    """Even if COLUMNS is small; and forced colors add only colors."""
    with (tmp_path / "log").open("wb") as log:
        environment = {**outside_of_notebooks(), "TERM": "xterm-256color", "COLUMNS": "30", **forced}
        subprocess.run([sys.executable, "-c", SESSION], cwd=ROOT, env=environment, stdout=log, check=True)
    text = (tmp_path / "log").read_text()
    if forced:
        assert "\x1b" in text
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    lines = text.splitlines()
    assert all(line.strip() for line in lines)
    assert len([line for line in lines if all(part in line for part in PARTS)]) == 3, "a line holds an epoch"
    assert f"    {shlex.join(WORDS)}" in lines
    assert lines.count("headers (10)") == 1


def test_a_dumb_terminal_has_plain_lines_that_fit() -> None:
    with terminal(34, "-c", SESSION, TERM="dumb") as end:
        text = b"".join(read(end)).decode().replace("\r\n", "\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert max(map(len, text.splitlines())) <= 34
    assert_whole(text)
    assert command_in(text.splitlines()) == WORDS


def test_no_color_is_no_color() -> None:
    texts = []
    for environment in ({}, {"NO_COLOR": "1"}):
        with terminal(80, "-c", SESSION, **environment) as end:
            texts.append(b"".join(read(end)).decode())
    colored, plain = (re.findall(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])[;m]", text) for text in texts)
    assert colored and not plain


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_tmux(tmp_path: Path) -> None:
    (tmp_path / "session.py").write_text(SESSION)

    def tmux(*arguments: str) -> str:
        command = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=outside_of_notebooks(), check=True).stdout

    line = shlex.join(["env", f"PYTHONPATH={ROOT}", sys.executable, str(tmp_path / "session.py")])
    tmux("new-session", "-d", "-x", "36", "-y", "60", f"{line}; echo ended; cat")
    try:
        deadline = time.monotonic() + 60
        while "ended" not in tmux("capture-pane", "-p") and time.monotonic() < deadline:
            time.sleep(0.1)
        shown = [row for row in tmux("capture-pane", "-p").splitlines() if row.strip()]
        assert tmux("display-message", "-p", "#{cursor_flag}").strip() == "1", "the cursor is there"
    finally:
        tmux("kill-server")
    assert shown.pop() == "ended"
    assert max(map(len, shown)) <= 36
    assert_whole("\n".join(shown))
    assert command_in(shown) == WORDS


def test_notebooks_have_a_line_for_an_epoch(tmp_path: Path) -> None:
    """In a kernel's process, and as a command of a cell, whose terminal cannot move the cursor up."""
    (tmp_path / "session.py").write_text(SESSION)
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    try:
        for cell in (
            SESSION,
            f"!PYTHONPATH=. {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'session.py'))}",
        ):
            outputs: list[str] = []

            def collect(message: dict[str, dict[str, object]], outputs: list[str] = outputs) -> None:
                content = message["content"]
                if message["header"]["msg_type"] == "stream":
                    outputs.append(str(content["text"]))
                elif message["header"]["msg_type"] == "display_data":
                    outputs.append(str(content["data"]["text/plain"]))

            reply = client.execute_interactive(cell, timeout=60, output_hook=collect)
            assert reply["content"]["status"] == "ok"
            text = "".join(outputs).replace("\r\n", "\n")
            assert_whole(re.sub(r"\x1b\[[0-9;]*m", "", text))
            assert not re.search(r"\x1b\[[0-9;?]*[A-LN-Za-ln-z]|\r", text), "only colors"
            assert len(text.splitlines()) < 40
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


SMALL = (
    "--limit_train 64 --batch_size 16 --width 4 --feat_dim 8 --manip_hidden_mlp 16 --hidden_mlp 16 --num_workers 1"
).split()


@dataclass(frozen=True)
class OnTerminal:
    """Gives a process a controlling terminal, as a shell does."""

    path: str

    def __call__(self) -> None:
        os.setsid()
        terminal = os.open(self.path, os.O_RDWR)
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for descriptor in range(3):
            os.dup2(terminal, descriptor)
        environment = {**outside_of_notebooks(), "TERM": "xterm-256color"}
        os.environ.clear()
        os.environ.update(environment)


def test_the_cursor_is_back_after_ctrl_c(tmp_path: Path) -> None:
    screen = pyte.Screen(40, 100)
    stream = pyte.ByteStream(screen)
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 100, 40, 0, 0))
    # By default, a terminal discards pending output at Ctrl-C.
    attributes = termios.tcgetattr(its)
    attributes[3] |= termios.NOFLSH
    termios.tcsetattr(its, termios.TCSANOW, attributes)
    prepare = OnTerminal(os.ttyname(its))
    run = Run(*SMALL, "--max_epochs", "10000", "--results_path", tmp_path / "run", prepare=prepare)
    hidden = pressed = False
    for chunk in read(ours):
        if its:
            os.close(its)  # the run has opened it
            its = 0
        stream.feed(chunk)
        if not pressed and any(row.startswith("epoch 3/10000 ") for row in rows(screen)):
            hidden, pressed = screen.cursor.hidden, True
            assert max(map(len, rows(screen))) <= 100 - len("^C"), "^C fits behind each line"
            os.write(ours, b"\x03")
    run.end(130)
    os.close(ours)
    assert hidden and not screen.cursor.hidden
    assert rows(screen)[-1].endswith("--resume auto.")
    assert not any("%" in row and "━" in row for row in rows(screen)), "nothing of the display is left"


def test_the_next_steps_are_commands_that_work(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    # float32, the default of eval, because bf16 may classify one of the 64 test images differently.
    trained = Run(*SMALL, "--mixed_precision", "no", "--max_epochs", "1", "--results_path", folder)
    trained.end()
    commands = [shlex.split(line) for line in trained.out.splitlines() if line.startswith("    python ")]
    assert [words[:3] for words in commands] == [
        ["python", "launch.py", "eval"],
        ["python", "launch.py", "--config"],
        ["python", "launch.py", "report"],
        ["python", "launch.py", "export"],
        ["python", "launch.py", "--config"],
    ]
    for _, _, name, *arguments in commands[:4]:
        again = Run(name, *arguments)
        again.end()
        if name == "eval":
            results = json.loads((folder / "results.json").read_text())
            assert again.out.splitlines()[-1] == f"accuracy {results['online_classifier_after']:.4f}"
    settings = json.loads((folder / "config.json").read_text())
    simclr = tmp_path / "a run-simclr"
    assert json.loads((simclr / "config.json").read_text()) == {
        **settings,
        "manip_lambda": 0.0,
        "results_path": str(simclr),
    }
    before, after = (
        {name: value for name, value in json.loads((run / "results.json").read_text()).items() if "before" in name}
        for run in (folder, simclr)
    )
    assert before == after and before, "both start from the same encoder"
    config, _ = parse_train(commands[4][2:])
    longer = {"max_epochs": 2, "resume": "auto", "allow_changes": 1}
    assert config.to_json() == {**settings, **longer}
