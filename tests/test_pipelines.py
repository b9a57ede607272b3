"""Pipelines: every executor, on every device, makes the views that the commands describe."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import pickle
import shutil
import tarfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from nvidia.dali import Pipeline
from nvidia.dali.backend import TryGetSchema  # type: ignore[attr-defined]  # the stubs lack it
from PIL import Image
from torchvision import transforms

from pipelines.bad_images import BadImages
from pipelines.batch import Batch
from pipelines.commands import LABELED_STREAM, VIEWS, Policy
from pipelines.datasets.images import ImageArray, ImageFiles, Images, Names
from pipelines.errors import UserError
from pipelines.executors import cpu_kernels, graph
from pipelines.executors import torchvision as reference
from pipelines.executors.cpu import CompiledViews
from pipelines.executors.image_arrays import pixels_on_device
from pipelines.loader import EvaluationLoader, Loader
from pipelines.sampler import BatchPlan, Sampler
from tests.conftest import smooth_image

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
POLICIES = {
    "cifar": Policy(),
    "stl10": Policy(jitter_strength=1.0, p_blur=0.5, p_solarize=0.2),
    "plain": Policy(p_color_jitter=-1, p_grayscale=-1),
}


def loader(
    images: Images,
    policy: Policy,
    backend: str = "dali",
    device: torch.device = CPU,
    workers: int = 2,
    **sampler: Any,
) -> Loader:
    """A loader of small batches; that of torchvision without workers, which would take long to start."""
    settings = {"seed": 11, "batch_size": 64, **sampler}
    workers = workers if backend == "dali" else 0
    return Loader(Sampler(images, policy, **settings), backend=backend, device=device, workers=workers)


def take(source: Loader, count: int, first_step: int = 0) -> list[Batch]:
    return list(itertools.islice(source.batches(first_step), count))


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """Mean absolute difference in 1/255."""
    return float((one - two).abs().mean() * 255)


TOLERANCES = {"plain": 0.001, "cifar": 0.01, "stl10": 0.01}
"""Mean differences to torchvision in 1/255: the compiled function repeats Pillow's arithmetic."""


@pytest.mark.parametrize("name", POLICIES)
def test_views_are_those_of_torchvision(demo_test_images: ImageArray, name: str) -> None:
    for ours, theirs in zip(
        take(loader(demo_test_images, POLICIES[name]), 4),
        take(loader(demo_test_images, POLICIES[name], "torchvision"), 4),
    ):
        np.testing.assert_array_equal(ours.commands.pack(), theirs.commands.pack())
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        assert torch.equal(ours.labels, theirs.labels)
        assert difference(ours.views, theirs.views) < TOLERANCES[name]


@pytest.mark.parametrize("name", POLICIES)
def test_views_of_files_are_those_of_torchvision(photographs: ImageFiles, name: str) -> None:
    """Only the part that contains both crop boxes is decoded."""
    policy = dataclasses.replace(POLICIES[name], size=64)
    # Pillow 13 resizes columns before rows if that is faster, which rounds differently.
    tolerance = TOLERANCES[name] + 0.1
    for ours, theirs in zip(
        take(loader(photographs, policy, batch_size=16), 8),
        take(loader(photographs, policy, "torchvision", batch_size=16), 8),
    ):
        np.testing.assert_array_equal(ours.commands.pack(), theirs.commands.pack())
        assert torch.equal(ours.labels, theirs.labels)
        assert difference(ours.views, theirs.views) < tolerance


JITTER_STEPS = ("brightness", "contrast", "saturation", "hue_turns")


class OneStepSampler(Sampler):
    """Commands whose jitter is only one of the four steps."""

    step = ""

    def plan(self, step: int) -> BatchPlan:
        plan = super().plan(step)
        shape = plan.commands.top.shape
        neutral = {name: np.full(shape, name != "hue_turns", np.float32) for name in JITTER_STEPS if name != self.step}
        return dataclasses.replace(plan, commands=dataclasses.replace(plan.commands, **neutral))


@pytest.mark.parametrize("step", JITTER_STEPS)
def test_each_step_of_the_jitter_equals_that_of_pillow(demo_test_images: ImageArray, step: str) -> None:
    sampler = OneStepSampler(
        demo_test_images, Policy(p_color_jitter=1.0, p_grayscale=-1, jitter_strength=1.0), seed=3, batch_size=64
    )
    sampler.step = step
    (ours,) = take(Loader(sampler, backend="dali", device=CPU, workers=2), 1)
    (theirs,) = take(Loader(sampler, backend="torchvision", device=CPU, workers=0), 1)
    (plain,) = take(loader(demo_test_images, POLICIES["plain"], seed=3), 1)
    assert difference(theirs.views, plain.views) > 1, "the step changes the views"
    different = float((ours.views != theirs.views).float().mean())
    assert different < 0.005, "the hue, always a part of the jitter, rounds one color in 1,000 differently"


def test_blur_equals_that_of_torchvision(demo_test_images: ImageArray) -> None:
    """The official kernel over the whole range of sigma at 96 px."""
    policy = dataclasses.replace(POLICIES["plain"], size=96, p_blur=1.0)
    for ours, theirs in zip(
        take(loader(demo_test_images, policy), 2), take(loader(demo_test_images, policy, "torchvision"), 2)
    ):
        assert (ours.views - theirs.views).abs().max() * 255 < 0.05


def test_column_major_images_are_upright(demo_test_images: ImageArray) -> None:
    """Images stored like those of STL-10 have the same views."""
    columns = ImageArray(
        pixels=np.ascontiguousarray(demo_test_images.pixels.transpose(0, 3, 2, 1)),
        labels=demo_test_images.labels,
        layout="CWH",
    )
    for backend in ("dali", "torchvision"):
        (one,) = take(loader(demo_test_images, POLICIES["cifar"], backend), 1)
        (two,) = take(loader(columns, POLICIES["cifar"], backend), 1)
        assert torch.equal(one.views, two.views)


def test_labeled_images_accompany_unlabeled_ones(demo_test_images: ImageArray) -> None:
    """Labeled images are repeated to accompany a larger set, with one view each and separate commands."""
    labeled, policy = demo_test_images.limited(100), POLICIES["plain"]
    samplers = [
        Sampler(demo_test_images, policy, seed=3, batch_size=64),
        Sampler(labeled, policy, seed=3, batch_size=64, views=1, command_stream=LABELED_STREAM, epoch_length=2048),
    ]
    loader_of_both = Loader(samplers[0], backend="dali", device=CPU, workers=2, labeled_sampler=samplers[1])
    (batch,) = take(loader_of_both, 1, first_step=40)
    plan = samplers[1].plan(40)
    np.testing.assert_array_equal(plan.image_ids, samplers[0].plan(40).image_ids % 100)
    np.testing.assert_array_equal(batch.labels, labeled.labels[plan.image_ids])
    assert batch.labeled_views is not None and batch.labeled_views.shape == (64, 1, 3, 32, 32)
    for n in range(0, 64, 9):
        view = reference.execute(labeled.open(int(plan.image_ids[n])), plan.commands, policy, n, 0)
        assert difference(batch.labeled_views[n, 0], view) < 0.5


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("source", ["memory", "files"])
def test_a_view_can_be_reproduced_from_its_command(
    demo_test_images: ImageArray, photographs: ImageFiles, source: str, processes: int
) -> None:
    """From the source image and the command in the batch alone, so views and commands of a batch must match.

    The batches are from the middle of the second epoch, as after a resume, and of the last process.
    """
    images = demo_test_images if source == "memory" else photographs
    policy = dataclasses.replace(POLICIES["stl10"], size=48)
    settings = {"batch_size": 16, "num_processes": processes, "process_index": processes - 1}
    steps_per_epoch = len(images) // (16 * processes)
    for batch in take(loader(images, policy, **settings), 3, first_step=steps_per_epoch + steps_per_epoch // 2):
        assert batch.epoch >= 1
        np.testing.assert_array_equal(batch.labels, images.labels[batch.image_ids])
        for n, image_id in enumerate(batch.image_ids.tolist()):
            for v in range(VIEWS):
                view = reference.execute(images.open(image_id), batch.commands, policy, n, v)
                # Not exact, because of the hue and because Pillow 13 may resize columns first.
                assert difference(batch.views[n, v], view) < 0.5


def test_batches_are_not_overwritten_by_later_ones(demo_test_images: ImageArray) -> None:
    """Views share memory with DALI's outputs, which DALI must not reuse."""
    batches = loader(demo_test_images, POLICIES["cifar"]).batches(0)
    kept = [next(batches) for _ in range(6)]
    copies = [(batch.views.clone(), batch.commands.pack()) for batch in kept]
    for _ in range(10):
        next(batches)
    for batch, (views, packed) in zip(kept, copies):
        assert torch.equal(batch.views, views)
        np.testing.assert_array_equal(batch.commands.pack(), packed)


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_two_processes_make_the_batch_of_one(demo_test_images: ImageArray, backend: str) -> None:
    policy = POLICIES["stl10"]
    whole = take(loader(demo_test_images, policy, backend), 2, first_step=5)
    halves = [
        take(
            loader(demo_test_images, policy, backend, batch_size=32, process_index=k, num_processes=2), 2, first_step=5
        )
        for k in range(2)
    ]
    for step in range(2):
        parts = [half[step] for half in halves]
        assert torch.equal(whole[step].views, torch.cat([part.views for part in parts]))
        np.testing.assert_array_equal(whole[step].image_ids, np.concatenate([part.image_ids for part in parts]))


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_a_resumed_loader_continues_exactly(demo_test_images: ImageArray, backend: str) -> None:
    straight = take(loader(demo_test_images, POLICIES["stl10"], backend), 5)
    resumed = take(loader(demo_test_images, POLICIES["stl10"], backend, workers=1), 2, first_step=3)
    for one, two in zip(straight[3:], resumed):
        assert torch.equal(one.views, two.views)


def test_batch_layout(demo_test_images: ImageArray) -> None:
    for backend in ("dali", "torchvision"):
        (batch,) = take(loader(demo_test_images, POLICIES["cifar"], backend), 1)
        assert batch.views.shape == (64, VIEWS, 3, 32, 32) and batch.views.dtype == torch.float32
        assert batch.views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert batch.views.min() >= 0 and batch.views.max() <= 1 and batch.views.std() > 0.1


def test_an_epoch_shows_each_image_once(demo_test_images: ImageArray) -> None:
    sampler = Sampler(demo_test_images, POLICIES["cifar"], seed=1, batch_size=100, num_processes=2)
    assert sampler.steps_per_epoch == 10, "the incomplete last global batch is dropped"
    epochs = []
    for epoch in range(2):
        plans = [
            Sampler(demo_test_images, POLICIES["cifar"], seed=1, batch_size=100, process_index=k, num_processes=2).plan(
                epoch * 10 + step
            )
            for step in range(10)
            for k in range(2)
        ]
        epochs.append(np.concatenate([plan.image_ids for plan in plans]))
        assert len(np.unique(epochs[-1])) == 2000
    assert np.mean(epochs[0] == epochs[1]) < 0.01


def test_a_sampler_can_be_pickled(demo_test_images: ImageArray) -> None:
    """Also after use; on macOS, workers are not forked and get a pickled sampler."""
    sampler = Sampler(demo_test_images, POLICIES["cifar"], seed=1, batch_size=64)
    expected = sampler.plan(40)
    for _ in range(2):
        sampler = pickle.loads(pickle.dumps(sampler))
        np.testing.assert_array_equal(sampler.plan(40).image_ids, expected.image_ids)
        np.testing.assert_array_equal(sampler.plan(40).commands.pack(), expected.commands.pack())


def test_unreferenced_pipelines_are_collected_before_workers_are_forked(demo_test_images: ImageArray) -> None:
    """A worker that collects one would wait forever for its threads, which were not forked."""
    sampler = Sampler(demo_test_images, Policy(), seed=1, batch_size=4)

    def abandoned_batches() -> weakref.ref[Any]:
        batches = Loader(sampler, backend="dali", device=CPU, workers=1).batches(0)
        next(batches)
        cycle: list[Any] = [batches]
        cycle.append(cycle)
        return weakref.ref(batches)

    gc.disable()
    try:
        abandoned = abandoned_batches()
        assert abandoned() is not None
        next(Loader(sampler, backend="torchvision", device=CPU, workers=1).batches(0))
        assert abandoned() is None
    finally:
        gc.enable()


def test_a_data_set_smaller_than_the_global_batch_is_an_error(demo_test_images: ImageArray) -> None:
    with pytest.raises(UserError, match=r"--batch_size 1024\b"):
        Sampler(demo_test_images, POLICIES["cifar"], seed=1, batch_size=2000, num_processes=2)


def test_solarized_views_are_exact(demo_test_images: ImageArray) -> None:
    policy = Policy(p_color_jitter=-1, p_grayscale=-1, p_solarize=1.0)
    plain = Policy(p_color_jitter=-1, p_grayscale=-1)
    (solarized,) = take(loader(demo_test_images, policy), 1)
    (views,) = take(loader(demo_test_images, plain), 1)
    assert difference(solarized.views, reference.solarize(views.views)) < 1e-4


def test_gray_views_are_gray(demo_test_images: ImageArray) -> None:
    (batch,) = take(loader(demo_test_images, Policy(p_color_jitter=-1, p_grayscale=1.0)), 1)
    assert torch.equal(batch.views[:, :, 0], batch.views[:, :, 1])
    assert torch.equal(batch.views[:, :, 0], batch.views[:, :, 2])
    (theirs,) = take(loader(demo_test_images, Policy(p_color_jitter=-1, p_grayscale=1.0), "torchvision"), 1)
    assert torch.equal(batch.views, theirs.views)


@pytest.mark.gpu
def test_decoded_views_are_those_of_the_cpu(photographs: ImageFiles) -> None:
    """Of JPEG files; on equal pixels they are equal bit by bit (tests/test_gpu_executor.py)."""
    policy = dataclasses.replace(POLICIES["plain"], size=32)
    for one, two in zip(take(loader(photographs, policy), 3), take(loader(photographs, policy, device=GPU), 3)):
        levels = 255 * (one.views - two.views.cpu()).abs().numpy()
        assert levels.mean() < 0.5 and np.percentile(levels, 99.9) < 4


@pytest.mark.gpu
def test_half_precision_on_a_gpu(demo_test_images: ImageArray) -> None:
    sampler = Sampler(demo_test_images, POLICIES["cifar"], seed=1, batch_size=64)
    (half,) = take(Loader(sampler, backend="dali", device=GPU, workers=2, half=True), 1)
    (full,) = take(Loader(sampler, backend="dali", device=GPU, workers=2), 1)
    assert half.views.dtype == torch.float16
    assert half.views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert (half.views.float() - full.views).abs().max() < 1e-3


def test_evaluation_of_files_equals_that_of_torchvision(photographs: ImageFiles) -> None:
    """Shorter side resized, center cropped; every image once, in order, including the incomplete last batch."""
    transform = transforms.Compose([transforms.Resize(73), transforms.CenterCrop(64), transforms.ToTensor()])
    expected = torch.stack([transform(photographs.open(n)) for n in range(2, 63)])
    for backend in ("dali", "torchvision"):
        plain = EvaluationLoader(
            photographs, size=64, resize_px=73, batch_size=25, backend=backend, device=CPU, workers=0
        )
        batches = list(plain.batches(np.arange(2, 63)))
        assert [len(batch.labels) for batch in batches] == [25, 25, 11]
        assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.from_numpy(photographs.labels[2:63]))
        images = torch.cat([batch.images for batch in batches])
        assert (images - expected).abs().max() * 255 < (1.01 if backend == "dali" else 0.01)


FAULTS = ["gone", "truncated", "no image"]


def damage(images: ImageFiles, image_id: int, fault: str) -> None:
    """Remove or damage the file of an image."""
    file = images.path(image_id)
    if fault == "gone":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:700])
    else:
        file.write_text("no image")


@pytest.fixture
def copied(photographs: ImageFiles, tmp_path: Path) -> ImageFiles:
    """A copy of the photographs that the test may change."""
    shutil.copytree(photographs.root, tmp_path / "copy")
    return dataclasses.replace(
        photographs, root=tmp_path / "copy", needs_pillow=photographs.needs_pillow.copy(), faults={}
    )


PLAIN_64 = dataclasses.replace(POLICIES["plain"], size=64)


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_image_is_replaced(
    copied: ImageFiles, backend: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the same position; it is reported once and listed, and no other view changes."""
    bad = BadImages(copied, max_fraction=0.05)
    bad.list_in(tmp_path / "bad-images.tsv", report=print)
    # The last two of four steps of an epoch, and the first two of the next.
    whole = take(loader(copied, PLAIN_64, backend, batch_size=16), 4, first_step=2)
    (at,) = np.flatnonzero(whole[1].image_ids == whole[1].image_ids[5])
    image_id = int(whole[1].image_ids[at])
    damage(copied, image_id, fault)
    batches = take(loader(copied, PLAIN_64, backend, batch_size=16, bad=bad), 4, first_step=2)
    for ours, before in zip(batches, whole):
        np.testing.assert_array_equal(ours.positions, before.positions)
        assert image_id not in ours.image_ids
        same = before.image_ids != image_id
        np.testing.assert_array_equal(ours.image_ids[same], before.image_ids[same])
        assert torch.equal(ours.views[torch.from_numpy(same)], before.views[torch.from_numpy(same)])
    # The replacement has its own size, and so its own command.
    replacement = reference.execute(copied.open(batches[1].image_ids[at]), batches[1].commands, PLAIN_64, int(at), 0)
    assert difference(batches[1].views[at, 0], replacement) < 1
    assert capsys.readouterr().out.count(f"{image_id}.jpg") == 1
    (line,) = (tmp_path / "bad-images.tsv").read_text().splitlines()
    listed_id, name, reason, _, _ = line.split("\t")
    assert (int(listed_id), name) == (image_id, str(copied.path(image_id))) and reason


@pytest.mark.parametrize(
    ("backend", "scale"), [("dali", 2), ("dali", 1), ("dali", 0.5), ("torchvision", 2), ("torchvision", 0.5)]
)
def test_a_file_overwritten_by_an_image_of_another_size_is_used(
    copied: ImageFiles, backend: str, scale: float, tmp_path: Path
) -> None:
    """Its commands are drawn for its new size; it is not bad, and the index file is removed.

    DALI's decoders on GPUs do not fail on a truncated file, so a change of the bytes alone must be noticed as well.
    """
    index = tmp_path / "index.npz"
    index.touch()
    images = dataclasses.replace(
        copied, sizes=copied.sizes.copy(), size_bytes=copied.size_bytes.copy(), index_file=index
    )
    bad = BadImages(images)
    before = take(loader(copied, PLAIN_64, backend, batch_size=16), 4)
    # Five in one batch, and one in another.
    overwritten = [*before[1].image_ids[3:8], before[2].image_ids[0]]
    for image_id in overwritten:
        height, width = images.sizes[image_id].tolist()
        picture = smooth_image(int(scale * height), int(scale * width), int(image_id))
        Image.fromarray(picture).save(images.path(image_id), quality=95)
    after = take(loader(images, PLAIN_64, backend, batch_size=16, bad=bad), 4)
    assert bad.count == 0 and not index.exists()
    for ours, old in zip(after, before):
        np.testing.assert_array_equal(ours.image_ids, old.image_ids)
        for n, image_id in enumerate(ours.image_ids):
            opened = images.open(int(image_id))
            assert (int(ours.commands.source_width[n, 0]), int(ours.commands.source_height[n, 0])) == opened.size
            expected = reference.execute(opened, ours.commands, PLAIN_64, n, 1)
            assert difference(ours.views[n, 1], expected) < 1
            if image_id not in overwritten:
                assert torch.equal(ours.views[n], old.views[n])


def test_bad_images_need_no_new_pipeline(copied: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of the first epoch fails while others are in flight; views are as if all had been known before."""
    for image_id in range(0, 64, 5):
        damage(copied, image_id, "truncated")
    built: list[Any] = []
    build = graph.training_pipeline

    def build_and_count(*arguments: Any, **options: Any) -> Any:
        built.append(build(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(graph, "training_pipeline", build_and_count)
    bad = BadImages(copied, max_fraction=0.5)
    batches = take(loader(copied, PLAIN_64, batch_size=16, bad=bad), 12)
    assert bad.count == 13 and len(built) == 1
    known = BadImages(copied, max_fraction=0.5)
    known.add([copied.bad(n, "truncated") for n in range(0, 64, 5)])
    for ours, straight in zip(batches, take(loader(copied, PLAIN_64, batch_size=16, bad=known), 12)):
        np.testing.assert_array_equal(ours.image_ids, straight.image_ids)
        assert torch.equal(ours.views, straight.views)


DECODING, RESIZING = "MIXED operator `nvidia.dali.fn.decoders.image_slice`", "GPU operator `nvidia.dali.fn.resize`"
TRACEBACK = ',\nwhich was used with this traceback:\n\n  File "/cuda/out of memory.py", line 1\n\nencountered:\n\n'


@pytest.mark.parametrize(
    ("message", "bad_images"),
    [
        (f"Error in {DECODING}{TRACEBACK}Failed to decode sample #5 :", 1),
        (f"Error in {DECODING}{TRACEBACK}CUDA allocation failed: out of memory", 0),
        (f"Error in {DECODING}{TRACEBACK}std::bad_alloc", 0),
        (f"Error in {RESIZING}{TRACEBACK}an illegal memory access was encountered (700)", 0),
        ("CUDA runtime API error cudaErrorInsufficientDriver (35):\nCUDA driver version is insufficient", 0),
    ],
)
def test_only_failures_on_images_make_images_bad(
    copied: ImageFiles, monkeypatch: pytest.MonkeyPatch, message: str, bad_images: int
) -> None:
    """The batch that fails has a truncated image, which is looked for only if it may be the cause."""
    damage(copied, 0, "truncated")
    run = Pipeline.run
    failures = [RuntimeError(f"Critical error in pipeline:\n{message}\nCurrent pipeline object is no longer valid.")]

    def failing(self: Pipeline, *arguments: object) -> object:
        if failures:
            with contextlib.suppress(RuntimeError):
                run(self, *arguments)
            raise failures.pop()
        return run(self, *arguments)

    monkeypatch.setattr(Pipeline, "run", failing)
    bad = BadImages(copied, max_fraction=0.5)
    source = loader(copied, PLAIN_64, batch_size=64, bad=bad)
    if bad_images:
        take(source, 1)
    else:
        with pytest.raises(UserError, match="--backend torchvision") as error:
            take(source, 1)
        assert "\n" not in str(error.value) and ".py" not in str(error.value)
    assert bad.count == bad_images


def test_images_in_memory_are_copied_to_a_device_once(demo_test_images: ImageArray) -> None:
    pixels = pixels_on_device(demo_test_images, CPU)
    np.testing.assert_array_equal(pixels.numpy(), demo_test_images.pixels)
    assert pixels_on_device(demo_test_images, CPU) is pixels
    assert len(pixels_on_device(demo_test_images.limited(5), CPU)) == 5


def test_replacements_do_not_depend_on_which_process_finds_bad_images(copied: ImageFiles, tmp_path: Path) -> None:
    """Two processes that share the list, one that resumes from it, and one alone make the same batches."""
    sampler = {"batch_size": 32, "seed": 4}
    for image_id in (3, 17, 40):
        damage(copied, image_id, "no image")
    bad = BadImages(copied, max_fraction=0.05)
    alone = take(loader(copied, PLAIN_64, bad=bad, **sampler), 4)
    assert bad.count == 3

    lines: list[str] = []
    halves = []
    for k in range(2):
        bad = BadImages(copied, max_fraction=0.05)
        bad.list_in(tmp_path / "bad-images.tsv", report=lines.append)
        halves.append(
            take(
                loader(copied, PLAIN_64, bad=bad, **{**sampler, "batch_size": 16}, process_index=k, num_processes=2),
                4,
            )
        )
    for step in range(4):
        assert torch.equal(alone[step].views, torch.cat([half[step].views for half in halves]))

    def reports() -> int:
        return sum(f"{copied.root}/{image_id}.jpg" in line for line in lines for image_id in (3, 17, 40))

    assert reports() == 3, "one process reports each"

    resumed = BadImages(copied, max_fraction=0.05)
    resumed.list_in(tmp_path / "bad-images.tsv", report=lines.append)
    (last,) = take(loader(copied, PLAIN_64, bad=resumed, **sampler), 1, first_step=3)
    assert torch.equal(last.views, alone[3].views)
    assert reports() == 3


def test_too_many_bad_images_are_an_error(copied: ImageFiles) -> None:
    """Those found during the run, and those that the index knows."""
    for image_id in range(3):
        damage(copied, image_id, "gone")
    with pytest.raises(UserError, match=r"3 of 64\b.*--max_bad_fraction 0\.02"):
        take(loader(copied, PLAIN_64, bad=BadImages(copied, max_fraction=0.02)), 2)
    known = dataclasses.replace(copied, faults=dict.fromkeys(range(2), "no image"))
    with pytest.raises(UserError, match="2 of 64"):
        BadImages(known, max_fraction=0.02)


def test_a_bad_image_in_an_evaluation_is_an_error(copied: ImageFiles) -> None:
    """An accuracy without it would not be that of the data set."""
    for fault, backend in itertools.product(("gone", "truncated"), ("dali", "torchvision")):
        damage(copied, 9, fault) if copied.path(9).exists() else None
        plain = EvaluationLoader(copied, size=64, resize_px=73, batch_size=25, backend=backend, device=CPU, workers=0)
        with pytest.raises(UserError, match=r"copy/9\.jpg"):
            list(plain.batches(np.arange(64)))


def test_images_that_dali_cannot_decode_are_opened_by_pillow(copied: ImageFiles) -> None:
    """Also if the index has not marked them as such."""
    Image.open(copied.path(7)).convert("CMYK").save(copied.path(7).with_suffix(".tif"))
    copied.path(7).with_suffix(".tif").replace(copied.path(7))
    bad = BadImages(copied)
    ours = take(loader(copied, PLAIN_64, bad=bad), 1)[0]
    theirs = take(loader(copied, PLAIN_64, "torchvision"), 1)[0]
    assert 7 in ours.image_ids and bad.count == 0
    assert difference(ours.views, theirs.views) < 0.1


def in_shards(images: ImageFiles, folder: Path, per_shard: int = 8) -> ImageFiles:
    """The same images in tar archives."""
    folder.mkdir()
    offsets, shards = [], range(0, len(images), per_shard)
    for shard in shards:
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for n in range(shard, shard + per_shard):
                archive.add(images.path(n), f"{n:04d}.jpg")
        with tarfile.open(folder / f"{shard:05d}.tar") as archive:
            offsets += [member.offset_data for member in archive.getmembers()]
    return dataclasses.replace(
        images,
        root=folder,
        files=Names.of([b"%05d.tar" % shard for shard in shards]),
        file_of=np.arange(len(images), dtype=np.int32) // per_shard,
        offset=np.array(offsets),
    )


def test_shards_have_the_views_of_loose_files(photographs: ImageFiles, tmp_path: Path) -> None:
    shards = in_shards(photographs, tmp_path / "shards")
    for backend in ("dali", "torchvision"):
        for one, two in zip(
            take(loader(photographs, PLAIN_64, backend), 2), take(loader(shards, PLAIN_64, backend), 2)
        ):
            np.testing.assert_array_equal(one.image_ids, two.image_ids)
            assert torch.equal(one.views, two.views)
        plain = [
            EvaluationLoader(images, size=64, resize_px=73, batch_size=25, backend=backend, device=CPU, workers=0)
            for images in (photographs, shards)
        ]
        for one, two in zip(*(each.batches(np.arange(64)) for each in plain)):
            assert torch.equal(one.images, two.images)


def test_a_truncated_shard_has_bad_images(photographs: ImageFiles, tmp_path: Path) -> None:
    shards = in_shards(photographs, tmp_path / "shards")
    shard = shards.path(63)
    shard.write_bytes(shard.read_bytes()[: int(shards.offset[63]) + 100])
    bad = BadImages(shards, max_fraction=0.02)
    (batch,) = take(loader(shards, PLAIN_64, bad=bad), 1)
    assert bad.count == 1 and 63 not in batch.image_ids


def test_shards_are_shuffled_window_by_window(photographs: ImageFiles, tmp_path: Path) -> None:
    """Every image once per epoch, few shards at a time, in an order that differs by epoch and not by processes."""
    shards = in_shards(photographs, tmp_path / "shards")
    sampler = Sampler(shards, PLAIN_64, seed=1, batch_size=8, shuffle_window=2)
    epochs = [np.concatenate([sampler.plan(8 * epoch + step).image_ids for step in range(8)]) for epoch in range(2)]
    for image_ids in epochs:
        np.testing.assert_array_equal(np.sort(image_ids), np.arange(64))
        for window in image_ids.reshape(4, 16):
            assert len(np.unique(shards.shard_of[window])) == 2
            assert len(np.unique(shards.shard_of[window][:8])) == 2, "both shards of a window are mixed"
    assert np.mean(epochs[0] == epochs[1]) < 0.2
    halves = [
        Sampler(shards, PLAIN_64, seed=1, batch_size=4, process_index=k, num_processes=2, shuffle_window=2)
        for k in range(2)
    ]
    for step in (0, 11):
        both = np.concatenate([half.plan(step).image_ids for half in halves])
        np.testing.assert_array_equal(both, sampler.plan(step).image_ids)
    unwindowed = Sampler(shards, PLAIN_64, seed=1, batch_size=16, shuffle_window=0)
    assert len(np.unique(shards.shard_of[unwindowed.plan(0).image_ids])) > 4


def test_evaluation_of_images_in_memory(demo_test_images: ImageArray) -> None:
    plain = EvaluationLoader(
        demo_test_images, size=32, resize_px=None, batch_size=300, backend="auto", device=CPU, workers=1
    )
    batches = list(plain.batches(np.arange(len(plain))))
    images = torch.cat([batch.images for batch in batches])
    expected = torch.from_numpy(demo_test_images.pixels).permute(0, 3, 1, 2) / 255
    assert torch.equal(images, expected)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.from_numpy(demo_test_images.labels))


def test_the_private_operator_for_compiled_functions_has_the_arguments_in_use() -> None:
    """``CompiledViews`` relies on DALI's private ``NumbaFuncImpl``: another version may rename it or its arguments."""
    schema = TryGetSchema("NumbaFuncImpl")
    assert schema is not None, (
        "DALI has no NumbaFuncImpl; executors/cpu.py needs another way to call compiled functions"
    )
    used = CompiledViews(VIEWS, 32, in_memory=True).arguments.keys()
    assert used <= set(schema.GetArgumentNames())


def test_compiled_code_reads_and_writes_at_an_address() -> None:
    """``cpu_kernels`` makes arrays of addresses with Numba's ``intrinsic`` and ``cgutils``, which may change with any
    version."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)

    @njit  # type: ignore[untyped-decorator]
    def double(address: int) -> Any:
        array = cpu_kernels._at(address, (2, 3), np.float32)
        array *= 2
        return array.sum()

    assert double(values.ctypes.data) == 30
    np.testing.assert_array_equal(values, [[0, 2, 4], [6, 8, 10]])
