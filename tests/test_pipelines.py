"""Pipelines: what comes out is what was commanded, wherever and however it is executed."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pipelines import reference
from pipelines.graphs import Form, argument_names, training_pipeline
from pipelines.images import ImageArray, ImageFiles, Images
from pipelines.loader import EvaluationLoader, Loader
from pipelines.order import Order
from stec.batch import Batch
from stec.commands import PROBE_STREAM, VIEWS, Policy
from stec.errors import UserError

CPU = torch.device("cpu")
POLICIES = {
    "cifar": Policy(),
    "stl10": Policy(jitter_strength=1.0, p_blur=0.5, p_solarize=0.2),
    "plain": Policy(p_color_jitter=-1, p_grayscale=-1),
}


def loader(
    images: Images, policy: Policy, backend: str = "dali", device: torch.device = CPU, workers: int = 2, **order: int
) -> Loader:
    """A loader of small batches. torchvision's works in this process: forking beside DALI's threads may deadlock."""
    settings = {"seed": 11, "batch_size": 64, **order}
    workers = workers if backend == "dali" else 0
    return Loader(Order(images, policy, **settings), backend=backend, device=device, workers=workers)


def take(source: Loader, count: int, first_step: int = 0) -> list[Batch]:
    return list(itertools.islice(source.batches(first_step), count))


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """Mean absolute difference in 1/255."""
    return float((one - two).abs().mean() * 255)


@pytest.mark.parametrize(("name", "tolerance"), [("plain", 0.3), ("cifar", 3.6), ("stl10", 4.5)])
def test_dali_executes_what_torchvision_executes(demo_test_images: ImageArray, name: str, tolerance: float) -> None:
    """Mean differences in 1/255. Jitter differs by design: one affine map instead of four clamped steps."""
    for ours, theirs in zip(
        take(loader(demo_test_images, POLICIES[name]), 4),
        take(loader(demo_test_images, POLICIES[name], "torchvision"), 4),
    ):
        np.testing.assert_array_equal(ours.commands.pack(), theirs.commands.pack())
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        assert torch.equal(ours.labels, theirs.labels)
        assert difference(ours.views, theirs.views) < tolerance


@pytest.mark.parametrize(("name", "tolerance"), [("plain", 0.3), ("stl10", 4.5)])
def test_files_are_decoded_like_pillow_decodes_them(photographs: ImageFiles, name: str, tolerance: float) -> None:
    """Only the part that the two windows need is decoded, and yet the views are those of the whole image."""
    policy = dataclasses.replace(POLICIES[name], size=64)
    for ours, theirs in zip(
        take(loader(photographs, policy, batch_size=16), 8),
        take(loader(photographs, policy, "torchvision", batch_size=16), 8),
    ):
        np.testing.assert_array_equal(ours.commands.pack(), theirs.commands.pack())
        assert torch.equal(ours.labels, theirs.labels)
        assert difference(ours.views, theirs.views) < tolerance


def test_column_major_images_come_out_upright(demo_test_images: ImageArray) -> None:
    """STL-10's storage of the same images gives the same views."""
    columns = ImageArray(
        pixels=np.ascontiguousarray(demo_test_images.pixels.transpose(0, 3, 2, 1)),
        labels=demo_test_images.labels,
        layout="CWH",
    )
    for backend in ("dali", "torchvision"):
        (one,) = take(loader(demo_test_images, POLICIES["cifar"], backend), 1)
        (two,) = take(loader(columns, POLICIES["cifar"], backend), 1)
        assert torch.equal(one.views, two.views)


def test_labelled_images_accompany_unlabelled_ones(demo_test_images: ImageArray) -> None:
    """The probe's images are cycled through beside the others, one view each, with labels and commands of their own."""
    labelled, policy = demo_test_images.limited(100), POLICIES["plain"]
    orders = [
        Order(demo_test_images, policy, seed=3, batch_size=64),
        Order(labelled, policy, seed=3, batch_size=64, views=1, command_stream=PROBE_STREAM, epoch_length=2048),
    ]
    both = Loader(orders[0], backend="dali", device=CPU, workers=2, probe_order=orders[1])
    (batch,) = take(both, 1, first_step=40)
    share = orders[1].share(40)
    np.testing.assert_array_equal(share.image_ids, orders[0].share(40).image_ids % 100)
    np.testing.assert_array_equal(batch.labels, labelled.labels[share.image_ids])
    assert batch.probe_views is not None and batch.probe_views.shape == (64, 1, 3, 32, 32)
    for n in range(0, 64, 9):
        view = reference.execute(labelled.open(int(share.image_ids[n])), share.commands, policy, n, 0)
        assert difference(batch.probe_views[n, 0], view) < 0.5


def test_a_view_can_be_made_again_from_its_command(demo_test_images: ImageArray) -> None:
    """Only the source image and the command that came with the batch are used; a slipped pairing cannot pass.

    Batches from the middle of the second epoch, several of them in flight.
    """
    policy = POLICIES["plain"]
    for batch in take(loader(demo_test_images, policy), 3, first_step=32 + 17):
        assert batch.epoch == 1
        for n in range(0, 64, 7):
            for v in range(VIEWS):
                view = reference.execute(demo_test_images.open(batch.image_ids[n]), batch.commands, policy, n, v)
                assert difference(batch.views[n, v], view) < 0.5
                assert batch.labels[n] == demo_test_images.labels[batch.image_ids[n]]


def test_batches_stay_as_they_are_while_more_are_made(demo_test_images: ImageArray) -> None:
    """Batches are handed over without a copy, so DALI must not reuse their memory."""
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
def test_a_resumed_loader_goes_on_exactly(demo_test_images: ImageArray, backend: str) -> None:
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
    order = Order(demo_test_images, POLICIES["cifar"], seed=1, batch_size=100, num_processes=2)
    assert order.steps_per_epoch == 10, "the incomplete last global batch is dropped"
    epochs = []
    for epoch in range(2):
        shares = [
            Order(demo_test_images, POLICIES["cifar"], seed=1, batch_size=100, process_index=k, num_processes=2).share(
                epoch * 10 + step
            )
            for step in range(10)
            for k in range(2)
        ]
        epochs.append(np.concatenate([share.image_ids for share in shares]))
        assert len(np.unique(epochs[-1])) == 2000
    assert np.mean(epochs[0] == epochs[1]) < 0.01


def test_a_data_set_smaller_than_the_batch_is_refused(demo_test_images: ImageArray) -> None:
    with pytest.raises(UserError, match="use --batch_size 1024 or less"):
        Order(demo_test_images, POLICIES["cifar"], seed=1, batch_size=2000, num_processes=2)


def test_solarized_views_are_exact(demo_test_images: ImageArray) -> None:
    policy = Policy(p_color_jitter=-1, p_grayscale=-1, p_solarize=1.0)
    plain = Policy(p_color_jitter=-1, p_grayscale=-1)
    (solarized,) = take(loader(demo_test_images, policy), 1)
    (views,) = take(loader(demo_test_images, plain), 1)
    assert difference(solarized.views, reference.solarize(views.views)) < 1e-4


def test_grey_views_are_grey(demo_test_images: ImageArray) -> None:
    (batch,) = take(loader(demo_test_images, Policy(p_color_jitter=-1, p_grayscale=1.0)), 1)
    assert torch.equal(batch.views[:, :, 0], batch.views[:, :, 1])
    assert torch.equal(batch.views[:, :, 0], batch.views[:, :, 2])
    (theirs,) = take(loader(demo_test_images, Policy(p_color_jitter=-1, p_grayscale=1.0), "torchvision"), 1)
    assert (batch.views - theirs.views).abs().max() * 255 <= 2.01, "rounding once in the window, once in the grey"


@pytest.mark.parametrize("form", ["HWC", "CWH", "file"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_gpu_graph_can_be_defined_without_a_gpu(name: str, form: Form) -> None:
    """Defining checks operators, arguments and placement; only building needs the device."""
    pipeline = training_pipeline(
        lambda: [],
        POLICIES[name],
        form=form,
        views=VIEWS,
        device="gpu",
        batch_size=8,
        num_threads=1,
        device_id=0,
        prefetch_queue_depth=2,
    )
    views, commands, record, *_ = pipeline._graph_out
    assert views.device == "gpu" and commands.device == record.device == "cpu"


def test_stages_that_never_happen_are_left_out() -> None:
    assert len(argument_names(POLICIES["plain"])) < len(argument_names(POLICIES["cifar"]))
    assert len(argument_names(POLICIES["cifar"])) < len(argument_names(POLICIES["stl10"]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_gpu_and_cpu_agree(demo_test_images: ImageArray, name: str) -> None:
    gpu = take(loader(demo_test_images, POLICIES[name], device=torch.device("cuda", 0)), 3)
    for one, two in zip(take(loader(demo_test_images, POLICIES[name]), 3), gpu):
        assert two.views.device.type == "cuda"
        assert difference(one.views, two.views.cpu()) < 0.5


def test_files_are_evaluated_like_torchvision_does(photographs: ImageFiles) -> None:
    """Shorter side resized, centre cut out; every image once, in order, the incomplete last batch included."""
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


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
@pytest.mark.parametrize("fault", ["gone", "truncated", "no image", "larger", "smaller"])
def test_a_file_that_is_not_what_it_was_is_named(
    photographs: ImageFiles, backend: str, fault: str, tmp_path: Path
) -> None:
    """Not to be found, not to be decoded, or overwritten by an image of another size than its command was drawn for."""
    shutil.copytree(photographs.root, tmp_path / "copy")
    images = dataclasses.replace(photographs, root=tmp_path / "copy")
    file = images.file(5)
    height, width = (int(side) for side in images.sizes[5])
    if fault == "gone":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:700])
    elif fault == "no image":
        file.write_text("no image")
    else:
        scale = 2 if fault == "larger" else 0.5
        Image.new("RGB", (int(scale * width), int(scale * height))).save(file)
    policy = dataclasses.replace(POLICIES["plain"], size=64)
    with pytest.raises(UserError, match=r"copy/5\.jpg") as told:
        take(loader(images, policy, backend), 1)
    assert told.value.local and "\n" not in str(told.value)


def test_evaluation_sees_every_image_once_in_order(demo_test_images: ImageArray) -> None:
    plain = EvaluationLoader(
        demo_test_images, size=32, resize_px=None, batch_size=300, backend="auto", device=CPU, workers=1
    )
    batches = list(plain.batches(np.arange(len(plain))))
    images = torch.cat([batch.images for batch in batches])
    expected = torch.from_numpy(demo_test_images.pixels).permute(0, 3, 1, 2) / 255
    assert torch.equal(images, expected)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.from_numpy(demo_test_images.labels))
