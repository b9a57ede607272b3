"""What only a GPU can tell about the data pipeline and the training step, in one command of at most 25 minutes.

    python -m benchmarks.gpu_check --out gpu-check

Writes gpu-check.json and gpu-check.md. Each check runs in a process of its own and has a time limit; one that fails or
hangs does not stop the others. Called again, the command continues with the checks that have not passed. Checks that
need a GPU are skipped without one.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks import report
from benchmarks.bad_images import photographs
from pipelines.bad_images import BadImages
from pipelines.batch import Batch
from pipelines.commands import Policy
from pipelines.datasets.images import ImageArray, Images
from pipelines.datasets.registry import open_data_set
from pipelines.errors import UserError
from pipelines.executors import image_files
from pipelines.executors.gpu_compiler import compile_kernels, load_kernels
from pipelines.executors.self_check import differing_views
from pipelines.files import atomic_write, read_object, write_json
from pipelines.loader import dali_batches
from pipelines.sampler import Sampler
from stec.console import Console

GPU = torch.device("cuda", 0)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.report", "torch", "pipelines.loader"])
Outcome = Literal["passed", "failed", "timed out", "skipped"]
Rows = list[dict[str, Any]]

PHOTOGRAPHS = Policy(size=224, jitter_strength=1.0, p_blur=0.5, p_solarize=0.2)
SMALL = Policy()
"""The policies of ImageNet and CIFAR-10."""
ORDER_STEPS, ORDER_BATCH_SIZE = 50, 256
THREADS = (8, 16, 32)
HARDWARE_LOADS = (0.1, 0.3, 0.5, 0.7, 0.9)
SECONDS_PER_SPEED = 4.0
BUSY_SIZE = 8192
"""Rows of the matrices whose products keep the GPU busy."""
NUM_PHOTOGRAPHS, PHOTOGRAPHS_PER_BATCH = 4096, 210
PROFILED_RECIPE, PROFILED_BATCH_SIZE, PROFILED_STEPS = "imagenet-resnet50", 64, 10
REBUILD_STEPS = 300
SAME_MACHINE = ("processor", "GPU", "versions")
"""What must not have changed since the report that the command continues."""
MEMORY_TOLERANCE = 0.02
"""How much more GPU memory, relative to all of it, a pipeline may hold after it was rebuilt."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check the GPU path, and measure it."""

    out: Path = Path("gpu-check")
    """The reports' name, without a suffix."""
    checks: tuple[str, ...] = ()
    """The checks to run; default: all that have not passed."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a check."""

    outcome: Outcome
    seconds: float = 0.0
    summary: str = ""
    rows: Rows = field(default_factory=list)
    """A table: columns and values."""


# --- The checks. Each returns a summary and a table, and raises AssertionError if what it checks does not hold. ---


def environment() -> tuple[str, Rows]:
    """Versions, the GPU, and whether DALI works on it."""
    from nvidia import dali
    from nvidia.dali import fn, pipeline_def

    about = {**report.machine(), "DALI": dali.__version__, "CUDA of torch": str(torch.version.cuda)}
    driver = Path("/proc/driver/nvidia/version")
    about["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "none"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(GPU)
        about["capability"] = f"{properties.major}.{properties.minor}"
        about["multiprocessors"] = str(properties.multi_processor_count)

        @pipeline_def(batch_size=1, num_threads=1, device_id=0)  # type: ignore[untyped-decorator]
        def decode() -> Any:
            encoded = fn.external_source(lambda: [np.frombuffer(photographs()[0], np.uint8)], batch=True)
            return fn.decoders.image(encoded, device="mixed")

        pipeline = decode()
        pipeline.build()
        shape = pipeline.run()[0].as_cpu().at(0).shape
        assert shape == (375, 500, 3), f"DALI decodes an image of 375 x 500 px to {shape}"
    return about.get("capability", "no GPU"), [{"what": name, "value": value} for name, value in about.items()]


def hardware_decoder() -> tuple[str, Rows]:
    """Whether the GPU's JPEG engine is used, from the messages of DALI's decoder."""
    code = (
        "import numpy as np; from nvidia.dali import fn, pipeline_def; from benchmarks.bad_images import photographs\n"
        "@pipeline_def(batch_size=20, num_threads=4, device_id=0)\n"
        "def decode():\n"
        "    images = [np.frombuffer(content, np.uint8) for content in photographs()]\n"
        "    encoded = fn.external_source(lambda: images, batch=True)\n"
        "    return fn.decoders.image(encoded, device='mixed', hw_decoder_load=0.9)\n"
        "pipeline = decode(); pipeline.build(); pipeline.run()\n"
    )
    environment_of_child = {**os.environ, "DALI_NVIMGCODEC_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment_of_child, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-500:]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("hw|hardware", line, re.IGNORECASE)]
    return f"{len(lines)} messages about the hardware decoder", [{"message": line[:160]} for line in lines[:20]]


def kernels() -> tuple[str, Rows]:
    """Registers and memory of the kernels; on a GPU also the blocks that it executes at the same time."""
    architecture = "sm_90"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(GPU)
        architecture = f"sm_{major}{minor}"
    resources = compile_kernels(8, architecture).resources()
    loaded = load_kernels(8, GPU) if torch.cuda.is_available() else {}
    rows: Rows = [
        {"kernel": name, **used, "blocks": loaded[name].blocks if loaded else "-"} for name, used in resources.items()
    ]
    assert not any(used["spilled_bytes"] for used in resources.values()), "registers are spilled"
    return architecture, rows


def equal_views() -> tuple[str, Rows]:
    """The kernels make the views of the CPU, bit by bit."""
    differing, views = differing_views(GPU)
    assert differing == 0, f"{differing} of {views} views differ"
    return f"{views} views are equal", []


def order() -> tuple[str, Rows]:
    """Each image is in its place, also if the GPU is busy when a batch is prepared: pixels encode the image's id."""
    ids = np.arange(4096)
    colors = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)
    images = ImageArray(pixels=np.broadcast_to(colors[:, None, None], (4096, 32, 32, 3)).copy(), labels=ids % 10)
    identity = Policy(area=(1.0, 1.0), aspect_ratio=(1.0, 1.0), p_color_jitter=-1, p_grayscale=-1)
    busy = torch.randn(BUSY_SIZE, BUSY_SIZE, device=GPU)
    batches = _batches(Sampler(images, identity, seed=1, batch_size=ORDER_BATCH_SIZE), threads=4)
    wrong = 0
    for _ in range(ORDER_STEPS):
        # About 20 ms of work on the stream of PyTorch, behind which its other work waits.
        for _ in range(10):
            busy @ busy
        batch = next(batches)
        pixels = (batch.views.amax(dim=(1, 3, 4)) * 255).round().long().cpu().numpy()
        wrong += int((pixels[:, 0] + 256 * pixels[:, 1] != batch.image_ids).sum())
    assert wrong == 0, f"{wrong} of {ORDER_STEPS * ORDER_BATCH_SIZE} images are in the wrong place"
    return f"{ORDER_STEPS * ORDER_BATCH_SIZE} images are in their place", []


def tests() -> tuple[str, Rows]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1]
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert done.returncode == 0, "; ".join([last, *failed])
    return last, []


def decoding() -> tuple[str, Rows]:
    """Decoded JPEGs against Pillow's, in levels of 255."""
    from nvidia.dali import fn, pipeline_def, types

    (photograph,) = (np.asarray(Image.open(io.BytesIO(photographs()[0])).convert("RGB")),)
    kinds: dict[str, dict[str, Any]] = {
        "4:2:0": {"subsampling": 2},
        "4:4:4": {"subsampling": 0},
        "gray": {},
        "progressive": {"progressive": True, "subsampling": 2},
    }
    rows: Rows = []
    for kind, options in kinds.items():
        content = io.BytesIO()
        image = Image.fromarray(photograph)
        (image.convert("L") if kind == "gray" else image).save(content, "JPEG", quality=90, **options)
        expected = np.asarray(Image.open(content).convert("RGB")).astype(int)
        encoded = np.frombuffer(content.getvalue(), np.uint8)
        for load, fancy in itertools.product((0.0, 1.0), (False, True)):

            @pipeline_def(batch_size=8, num_threads=4, device_id=0)  # type: ignore[untyped-decorator]
            def decode(encoded: Any = encoded, load: float = load, fancy: bool = fancy) -> Any:
                files = fn.external_source(lambda: [encoded] * 8, batch=True)
                decoder: Any = {"device": "mixed", "hw_decoder_load": load, "jpeg_fancy_upsampling": fancy}
                return fn.decoders.image(files, output_type=types.RGB, **decoder)

            pipeline = decode()
            pipeline.build()
            decoded = pipeline.run()[0].as_cpu()
            difference = np.abs(np.stack([decoded.at(n).astype(int) - expected for n in range(8)]))
            rows.append(
                {
                    "JPEG": kind,
                    "hw_decoder_load": load,
                    "fancy upsampling": fancy,
                    "mean": round(float(difference.mean()), 3),
                    "99.9 %": float(np.percentile(difference, 99.9)),
                    "largest": int(difference.max()),
                }
            )
    return "differences in levels of 255", rows


def bad_images() -> tuple[str, Rows]:
    """Images that are damaged after they were indexed are found, and no other."""
    rows: Rows = []
    for kind in ("truncated", "emptied", "overwritten"):
        with tempfile.TemporaryDirectory() as folder:
            root, images = _folder_of(64, folder)
            damaged = [5, 17, 40]
            for n in damaged:
                file = root / f"{n:05d}.jpg"
                content = file.read_bytes()
                kept = {"truncated": content[: len(content) // 2], "emptied": b"", "overwritten": b"x" * len(content)}
                file.write_bytes(kept[kind])
            bad, listed = BadImages(images, max_fraction=1.0), Path(folder) / "bad-images.tsv"
            bad.list_in(listed, report=lambda line: None)
            sampler = Sampler(images, PHOTOGRAPHS, seed=0, batch_size=16, bad=bad)
            list(itertools.islice(_batches(sampler, threads=4), 8))
            found = sorted(int(n) for n in re.findall(r"(\d{5})\.jpg", listed.read_text()))
        rows.append({"kind": kind, "damaged": str(damaged), "found": str(found)})
    assert all(row["damaged"] == row["found"] for row in rows), f"{rows}"
    return "all are found", rows


def memory() -> tuple[str, Rows]:
    """GPU memory of a pipeline on photographs, one of which is huge, by the size for which memory is reserved."""
    rows: Rows = []
    for quantile in (0.999, 1.0):
        with tempfile.TemporaryDirectory() as folder:
            root, _ = _folder_of(2000, folder, indexed=False)
            Image.new("RGB", (9000, 9000), "gray").save(root / "00000.jpg")
            images = open_data_set("folder", root).train
            before = torch.cuda.mem_get_info(GPU)[0]
            with patch.object(image_files, "HINT_QUANTILE", quantile):
                batches = _batches(Sampler(images, PHOTOGRAPHS, seed=0, batch_size=128), threads=16)
                list(itertools.islice(batches, 4))
            held = before - torch.cuda.mem_get_info(GPU)[0]
            del batches
        rows.append({"quantile of sizes": quantile, "MiB": round(held / 2**20)})
    return "MiB of a pipeline of 128 images and 16 threads", rows


def throughput() -> tuple[str, Rows]:
    """Images per second, two views each."""
    rows: Rows = []
    generator = np.random.default_rng(0)
    array = ImageArray(
        pixels=generator.integers(0, 256, (50_000, 32, 32, 3), np.uint8), labels=np.zeros(50_000, np.int64)
    )
    sampler = Sampler(array, SMALL, seed=0, batch_size=1024)
    speed = _images_per_second(_batches(sampler, threads=8), 1024)
    rows.append({"images": "in memory, 32 px", "threads": 8, "images/s": speed})
    with tempfile.TemporaryDirectory() as folder:
        _, images = _folder_of(NUM_PHOTOGRAPHS, folder)
        sampler = Sampler(images, PHOTOGRAPHS, seed=0, batch_size=PHOTOGRAPHS_PER_BATCH)
        for threads, load in [*((threads, 0.65) for threads in THREADS), *((16, load) for load in HARDWARE_LOADS)]:
            options = {**image_files.gpu_decoder_options(), "hw_decoder_load": load}
            with patch.object(image_files, "gpu_decoder_options", lambda options=options: options):
                speed = _images_per_second(_batches(sampler, threads=threads), PHOTOGRAPHS_PER_BATCH)
            row = {"images": "JPEG, 224 px", "threads": threads, "hw_decoder_load": load}
            rows.append({**row, "images/s": speed})
    best = max(rows, key=lambda row: row["images/s"] if row["images"].startswith("JPEG") else 0)
    return f"JPEG: {best['images/s']:,} images/s at best", rows


def step_profile() -> tuple[str, Rows]:
    """Kernels, host syncs and the GPU's idle time in a training step of ResNet-50."""
    from torch.profiler import ProfilerActivity, profile

    from stec.loaders import policy_of
    from stec.models.model import Model
    from stec.objectives.inverse import EfferenceCopy
    from stec.objectives.objective import Objective
    from stec.recipes import recipe
    from stec.startup import start
    from stec.training.initial_model import initial_model
    from stec.training.optim import make_optimizer
    from stec.training.step import Step

    config = recipe(PROFILED_RECIPE).updated(batch_size=PROFILED_BATCH_SIZE)
    accelerator, *_ = start("auto")
    model: Model = initial_model(config, 1000).to(accelerator.device).train()
    step = Step(model, Objective(config.objective), accelerator, EfferenceCopy())
    optimizer = make_optimizer(model, config.optimization)
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 256, 3), np.uint8)
    images = ImageArray(pixels=pixels, labels=np.zeros(256, np.int64))
    sampler = Sampler(images, policy_of(config), seed=0, batch_size=PROFILED_BATCH_SIZE)
    batches = _batches(sampler, threads=4, half=True)

    def once() -> None:
        step([next(batches)])
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        once()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        started = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            once()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events: list[Any] = list(profiled.events() or [])
    counts: dict[str, float] = {}
    for name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaStreamSynchronize", "cudaDeviceSynchronize"):
        counts[name] = sum(event.name.startswith(name) for event in events) / PROFILED_STEPS
    busy = sum(event.device_time for event in events if str(event.device_type).endswith("CUDA")) / 1e6
    counts["ms a step"] = 1000 * seconds / PROFILED_STEPS
    counts["part of the time with kernels"] = min(1.0, busy / seconds)
    rows: Rows = [{"what": name, "per step": round(value, 2)} for name, value in counts.items()]
    return f"{counts['cudaStreamSynchronize']:.1f} stream syncs a step", rows


def rebuilds() -> tuple[str, Rows]:
    """GPU memory over pipelines that are built again when the size of the views changes."""
    images = ImageArray(
        pixels=np.random.default_rng(0).integers(0, 256, (12_800, 64, 64, 3), np.uint8),
        labels=np.zeros(12_800, np.int64),
    )
    sizes = (64, 96, 64)
    sampler = Sampler(
        images,
        Policy(size=96, p_blur=0.5, p_solarize=0.2),
        seed=0,
        batch_size=128,
        view_size_at=lambda epoch: sizes[min(epoch, 2)],
    )
    batches = _batches(sampler, threads=4)
    rows: Rows = []
    for size in sizes:
        list(itertools.islice(batches, REBUILD_STEPS // len(sizes)))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(GPU)
        rows.append({"view size": size, "MiB in use": round((total - free) / 2**20)})
    grown = (rows[2]["MiB in use"] - rows[0]["MiB in use"]) * 2**20 / total
    assert grown < MEMORY_TOLERANCE, f"memory has grown: {rows}"
    return f"{REBUILD_STEPS} steps, two rebuilds", rows


def _batches(sampler: Sampler, *, threads: int, half: bool = False) -> Iterator[Batch]:
    return dali_batches(sampler, GPU, threads=threads, half=half)


def _images_per_second(batches: Iterator[Batch], batch_size: int) -> int:
    for _ in itertools.islice(batches, 5):
        pass
    torch.cuda.synchronize()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < SECONDS_PER_SPEED:
        next(batches)
        count += batch_size
    torch.cuda.synchronize()
    return round(count / (time.perf_counter() - started))


def _folder_of(count: int, folder: str, *, indexed: bool = True) -> tuple[Path, Any]:
    """A folder of JPEG files; and its images, if it is ``indexed``."""
    os.environ["XDG_CACHE_HOME"] = folder
    root = Path(folder) / "images"
    root.mkdir()
    for n, content in zip(range(count), itertools.cycle(photographs())):
        (root / f"{n:05d}.jpg").write_bytes(content)
    images: Images | None = open_data_set("folder", root).train if indexed else None
    return root, images


@dataclass(frozen=True, kw_only=True)
class Check:
    """A row of ``CHECKS``."""

    run: Callable[[], tuple[str, Rows]]
    limit_s: float
    needs_gpu: bool = True


CHECKS: dict[str, Check] = {
    "environment": Check(run=environment, limit_s=60, needs_gpu=False),
    "hardware_decoder": Check(run=hardware_decoder, limit_s=60),
    "kernels": Check(run=kernels, limit_s=90, needs_gpu=False),
    "equal_views": Check(run=equal_views, limit_s=90),
    "order": Check(run=order, limit_s=120),
    "tests": Check(run=tests, limit_s=300),
    "decoding": Check(run=decoding, limit_s=120),
    "bad_images": Check(run=bad_images, limit_s=90),
    "memory": Check(run=memory, limit_s=120),
    "throughput": Check(run=throughput, limit_s=240),
    "step_profile": Check(run=step_profile, limit_s=120),
    "rebuilds": Check(run=rebuilds, limit_s=90),
}
"""In the order in which they run; the limits are 25 minutes together."""


# --- Running them ---


def run_here(check: Check) -> Result:
    """Run a check in this process."""
    started = time.perf_counter()
    try:
        summary, rows = check.run()
    except Exception as error:  # A check that fails in any way must not stop the others.
        return Result(
            outcome="failed", seconds=time.perf_counter() - started, summary=f"{type(error).__name__}: {error}"
        )
    return Result(outcome="passed", seconds=time.perf_counter() - started, summary=summary, rows=rows)


def run_apart(check: Check) -> Result:
    """Run a check in a process of its own, which is killed with all that it started at the time limit."""
    if check.needs_gpu and not torch.cuda.is_available():
        return Result(outcome="skipped", summary="needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "result.json", Path(folder) / "output"
        process = PROCESSES.Process(target=_run_in_group, args=(check, file, output))
        started = time.perf_counter()
        process.start()
        try:
            process.join(check.limit_s)
        finally:
            is_late = process.is_alive()
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()
        if is_late:
            return Result(outcome="timed out", seconds=check.limit_s, summary=f"after {check.limit_s:.0f} s")
        if file.exists():
            return Result(**json.loads(file.read_text()))
        last = output.read_text(errors="replace").strip().splitlines()[-1:] if output.exists() else []
        summary = f"ended with exit code {process.exitcode}: {''.join(last)}"
        return Result(outcome="failed", seconds=time.perf_counter() - started, summary=summary)


def _run_in_group(check: Check, file: Path, output: Path) -> None:
    os.setsid()
    with output.open("wb") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    write_json(file, asdict(run_here(check)))


def markdown(about: Mapping[str, str], results: Mapping[str, Result]) -> str:
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    overview: Rows = [
        {"check": name, "outcome": result.outcome, "s": f"{result.seconds:.0f}", "summary": result.summary}
        for name, result in results.items()
    ]
    lines += _table(overview)
    for name, result in results.items():
        if result.rows:
            lines += ["", f"## {name}", "", *_table(result.rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Rows) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))

    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    body = ["| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |", *body]


def check_all(options: Options, console: Console, checks: Mapping[str, Check] = CHECKS) -> dict[str, Result]:
    """Run the checks that have not passed, and write the reports after each."""
    unknown = [name for name in options.checks if name not in checks]
    if unknown:
        raise UserError(f"--checks {unknown[0]} is unknown; choose from {', '.join(checks)}.")
    json_file, markdown_file = (options.out.with_name(f"{options.out.name}.{kind}") for kind in ("json", "md"))
    if not options.out.parent.is_dir():
        raise UserError(f"--out {options.out} cannot be written; give a path in an existing folder.")
    results: dict[str, Result] = {}
    about = {name: str(value) for name, value in report.machine().items()}
    if json_file.exists():
        remedy = "delete it, or give another --out"
        before = read_object(json_file, remedy)
        try:
            if all(before["machine"].get(name) == about[name] for name in SAME_MACHINE):
                results = {name: Result(**values) for name, values in before["results"].items() if name in checks}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{json_file} is no report of this command; {remedy}.") from error
    for name, check in checks.items():
        passed = name in results and results[name].outcome == "passed"
        if name not in options.checks if options.checks else passed:
            continue
        with console.waiting(name):
            results[name] = run_apart(check)
        console.say(f"{name}: {results[name].outcome} ({results[name].seconds:.0f} s) {results[name].summary}")
        in_order = {name: results[name] for name in checks if name in results}
        write_json(json_file, {"machine": about, "results": {key: asdict(value) for key, value in in_order.items()}})
        atomic_write(markdown_file, markdown(about, in_order).encode())
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, prog="python -m benchmarks.gpu_check", args=arguments, use_underscores=True)
    results: dict[str, Result] = {}
    code = report.run(partial(_fill, results, options))
    failed = any(result.outcome in ("failed", "timed out") for result in results.values())
    return code or int(failed)


def _fill(results: dict[str, Result], options: Options) -> None:
    results.update(check_all(options, Console(enabled=True)))


if __name__ == "__main__":
    sys.exit(main())
