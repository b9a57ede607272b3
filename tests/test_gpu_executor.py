"""The executor on a GPU: its graph and inputs without one, its check on first use, and its views on one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines.loader
from pipelines.batch import Batch
from pipelines.commands import VIEWS, Policy
from pipelines.datasets.images import ImageArray, ImageFiles, Images
from pipelines.errors import UserError
from pipelines.executors import gpu, self_check
from pipelines.executors.gpu import GpuExecutor
from pipelines.executors.gpu_compiler import KERNELS, LoadedKernel
from pipelines.executors.graph import training_pipeline
from pipelines.executors.image_arrays import addresses
from pipelines.executors.image_files import evaluation_pipeline
from pipelines.feed import TrainingFeed
from pipelines.loader import Loader
from pipelines.sampler import Sampler
from tests.test_gpu_kernels import HostKernels, host_kernels, needs_compiler

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
POLICY = Policy(size=48, jitter_strength=1.0, p_blur=0.5, p_solarize=0.3)
__all__ = ["host_kernels"]


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph can be defined, and images in memory have addresses on the host."""
    kernels = {name: LoadedKernel(address=n + 1, blocks=1056) for n, name in enumerate(KERNELS)}
    monkeypatch.setattr(gpu, "load_kernels", lambda reach, device: kernels)
    monkeypatch.setattr(gpu, "addresses", lambda images, image_ids, device: addresses(images, image_ids, CPU))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("in_files", [False, True])
def test_the_graph_can_be_defined_without_a_gpu(
    without_gpu: None, in_files: bool, half: bool, demo_test_images: ImageArray, photographs: ImageFiles
) -> None:
    images: Images = photographs if in_files else demo_test_images
    executor = GpuExecutor(images, POLICY, VIEWS, GPU, half=half)
    batch_size = 1 if executor.batch_is_sample else 8
    pipeline = training_pipeline(
        executor, lambda: [], batch_size=batch_size, num_threads=1, device_id=0, prefetch_queue_depth=2
    )
    views, commands, record, *_ = pipeline._graph_out
    assert views.device == "gpu" and commands.device == record.device == "cpu"
    operators = operators_of(pipeline)
    for operator in operators:
        (device,) = {node.device for node in operator.outputs}
        assert device == "gpu" or "gpu" not in {node.device for node in operator.inputs}, "pixels stay on the GPU"
    kernels = [operator for operator in operators if "NumbaFuncImpl" in str(operator.spec)]
    first, second = sorted(kernels, key=lambda operator: len(operator.outputs), reverse=True)
    assert [len(first.outputs), len(second.outputs)] == [2, 1]
    assert [node.name for node in first.outputs] == [node.name for node in second.inputs[:2]]
    used = [int(str(kernel.spec).split("run_fn: ")[1].split()[0].rstrip(",}")) - 1 for kernel in (first, second)]
    expected = ["crop_of_decoded" if in_files else "crop_of_memory", "color_to_half" if half else "color_to_float"]
    assert [KERNELS[n] for n in used] == expected


@needs_compiler
@pytest.mark.parametrize("layout", ["HWC", "CWH"])
def test_inputs_of_a_batch_make_its_views(
    without_gpu: None, host_kernels: Any, layout: Any, demo_test_images: ImageArray
) -> None:
    """What the graph gets for a batch, given to the kernels as DALI would: the batch is one sample."""
    pixels = demo_test_images.pixels[:32]
    images = dataclasses.replace(
        demo_test_images.limited(32),
        pixels=np.ascontiguousarray(pixels.transpose(0, 3, 2, 1)) if layout == "CWH" else pixels,
        layout=layout,
    )
    sampler = Sampler(images, POLICY, seed=2, batch_size=16)
    executor = GpuExecutor(images, POLICY, VIEWS, GPU)
    inputs = TrainingFeed(sampler, executor, 0).inputs(0)
    assert {len(values) for values in inputs} == {1}
    where, weights, packed, record = (values[0] for values in inputs)
    kernels: HostKernels = host_kernels(POLICY)
    cropped, sums = kernels._outputs(len(packed), POLICY.size)
    kernels._call("run_crop_of_memory", 7, len(packed), POLICY.size, cropped, sums, where, packed)
    views = np.empty(cropped.shape, np.float32)
    kernels._call("run_color_to_float", 7, len(packed), POLICY.size, views, cropped, sums, packed, weights)
    (expected,) = itertools.islice(Loader(sampler, backend="dali", device=CPU, workers=1).batches(0), 1)
    shape = (16, VIEWS, POLICY.size, POLICY.size, 3)
    np.testing.assert_array_equal(views.reshape(shape), expected.views.movedim(2, -1).numpy())
    np.testing.assert_array_equal(record[:, 2], expected.image_ids)


def test_outputs_have_the_shapes_that_kernels_write() -> None:
    """DALI calls the function of shapes with pointers to the shapes of all samples, output by output."""
    import ctypes

    from pipelines.executors.cpu_kernels import gpu_shape_function

    signature = ctypes.CFUNCTYPE(
        None, *[ctypes.c_uint64] * 2, ctypes.c_int32, *[ctypes.c_uint64] * 2, ctypes.c_int32, ctypes.c_int32
    )
    shape_function = signature(gpu_shape_function(48, 12))
    samples, num_views = 3, [4, 6, 8]
    inputs = [np.array([99, 99], np.int64) for _ in range(samples)]
    inputs += [np.array([count, 20], np.int64) for count in num_views]
    outputs = [np.zeros(4, np.int64) for _ in range(samples)] + [np.zeros(2, np.int64) for _ in range(samples)]
    pointers = [np.array([array.ctypes.data for array in arrays], np.uint64) for arrays in (outputs, inputs)]
    shape_function(pointers[0].ctypes.data, 0, 2, pointers[1].ctypes.data, 0, 2, samples)
    assert [shape.tolist() for shape in outputs[:samples]] == [[count, 48, 48, 3] for count in num_views]
    assert [shape.tolist() for shape in outputs[samples:]] == [[count, 12] for count in num_views]


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """Views for the GPU are made on the CPU; each value of theirs is off by the number of levels in the dictionary."""
    off = {"levels": 0}
    real = pipelines.loader.dali_batches

    def dali_batches(sampler: Sampler, device: torch.device, **options: Any) -> Iterator[Batch]:
        for batch in real(sampler, CPU, **options):
            levels = off["levels"] if device == GPU else 0
            yield dataclasses.replace(batch, views=batch.views + levels / 255) if levels else batch

    monkeypatch.setattr(pipelines.loader, "dali_batches", dali_batches)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(self_check, "_fingerprint", lambda name: "fingerprint")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return off


def test_equal_views_are_checked_once(pretended_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    check = self_check.require_equal_views.__wrapped__
    differing, views = self_check.differing_views(GPU)
    assert differing == 0 and views == 2 * self_check.STEPS * self_check.BATCH_SIZE * VIEWS
    check(GPU)
    # Another process finds the outcome on disk.
    monkeypatch.setattr(self_check, "differing_views", None)
    check(GPU)
    # Another version does not.
    monkeypatch.setattr(self_check, "_fingerprint", lambda name: "another")
    with pytest.raises(TypeError):
        check(GPU)


def test_other_views_are_an_error_that_is_not_kept(pretended_gpu: dict[str, int]) -> None:
    """A loader of the user fails before its first batch."""
    self_check.require_equal_views.cache_clear()
    pretended_gpu["levels"] = 1
    images = self_check._images()
    with pytest.raises(UserError, match=r"--backend torchvision"):
        Loader(Sampler(images, POLICY, seed=0, batch_size=4), backend="dali", device=GPU, workers=1)
    pretended_gpu["levels"] = 0
    Loader(Sampler(images, POLICY, seed=0, batch_size=4), backend="dali", device=GPU, workers=1)
    self_check.require_equal_views.cache_clear()


def test_images_in_the_wrong_place_are_found(pretended_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    equal = pipelines.loader.dali_batches

    def swapped(sampler: Sampler, device: torch.device, **options: Any) -> Iterator[Batch]:
        for batch in equal(sampler, device, **options):
            yield dataclasses.replace(batch, views=batch.views.flip(0)) if device == GPU else batch

    monkeypatch.setattr(pipelines.loader, "dali_batches", swapped)
    differing, views = self_check.differing_views(GPU)
    assert differing > 0.9 * views


def test_kernels_that_do_not_run_are_an_error_with_a_remedy(
    pretended_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA failed: no kernel image")

    monkeypatch.setattr(self_check, "differing_views", fail)
    with pytest.raises(UserError, match=r"no kernel image.*--backend torchvision"):
        self_check.require_equal_views.__wrapped__(GPU)


def operators_of(pipeline: Any) -> list[Any]:
    """Every operator of a defined graph."""
    operators: dict[int, Any] = {}
    waiting = [node.source for node in pipeline._graph_out]
    while waiting:
        operator = waiting.pop()
        if id(operator) not in operators:
            operators[id(operator)] = operator
            waiting += [node.source for node in operator.inputs]
    return list(operators.values())


def decoder_specs(pipeline: Any) -> list[str]:
    return [str(operator.spec) for operator in operators_of(pipeline) if "device: mixed" in str(operator.spec)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_decoders_on_a_gpu(without_gpu: None, deterministic: bool, photographs: ImageFiles) -> None:
    """They interpolate colors as libjpeg does, and reserve memory for all but a few images.

    A deterministic run does not divide batches between two decoders.
    """
    torch.use_deterministic_algorithms(deterministic)
    try:
        sizes = photographs.sizes.repeat(2000, axis=0)
        sizes[0] = 9000
        images = dataclasses.replace(photographs, sizes=sizes)
        options = {"batch_size": 8, "num_threads": 1, "device_id": 0}
        executor = GpuExecutor(images, POLICY, VIEWS, GPU)
        training = training_pipeline(executor, lambda: [], **options)
        evaluation = evaluation_pipeline(images, lambda: [], 64, device="gpu", form="path", **options)
    finally:
        torch.use_deterministic_algorithms(False)
    specs = [*decoder_specs(training), *decoder_specs(evaluation)]
    assert len(specs) == 2
    assert not any("ImageSlice" in operator.name for operator in operators_of(training)), "whole images are decoded"
    for spec in specs:
        assert "jpeg_fancy_upsampling: True" in spec
        assert ("hw_decoder_load: 0" in spec) == deterministic
    assert f"preallocate_height_hint: {photographs.sizes[:, 0].max()}" in specs[0]


def test_evaluation_copies_nothing_to_the_host(photographs: ImageFiles) -> None:
    """A constant of an operator on the GPU would be copied there, and back for its size, for each batch."""
    pipeline = evaluation_pipeline(
        photographs, lambda: [], 64, device="gpu", form="path", batch_size=8, num_threads=1, device_id=0
    )
    operators = operators_of(pipeline)
    for operator in operators:
        (device,) = {node.device for node in operator.outputs}
        assert device == "gpu" or "gpu" not in {node.device for node in operator.inputs}
        assert "Constant" not in operator.name
    assert all(f"minibatch_size: {8}" in str(operator.spec) for operator in operators if "Resize" in operator.name)


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("in_files", [False, True])
def test_views_are_those_of_the_cpu(in_files: bool, half: bool, demo_test_images: ImageArray, tmp_path: Path) -> None:
    """Bit by bit, from memory and from files of plain pixels."""
    images: Images = self_check._images()
    if in_files:
        images = self_check._in_files(images, tmp_path)
    sampler = Sampler(images, POLICY, seed=5, batch_size=8)
    for ours, theirs in itertools.islice(
        zip(
            Loader(sampler, backend="dali", device=GPU, workers=2, half=half).batches(0),
            Loader(sampler, backend="dali", device=CPU, workers=2).batches(0),
        ),
        20,
    ):
        expected = theirs.views.half() if half else theirs.views
        assert torch.equal(ours.views.cpu(), expected)
        assert ours.views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
