"""The GPU's kernels without a GPU: compiled for the CPU, they make the views of the CPU's function, bit by bit, and
they compile for GPUs."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from numpy.typing import NDArray

from pipelines.commands import Commands, Policy, draw
from pipelines.errors import UserError
from pipelines.executors import cpu_kernels, gpu_compiler
from pipelines.executors.gpu_compiler import KERNELS, MAX_REACH, SOURCE, compile_kernels, largest_reach, num_tiles

HOST_SOURCE = Path(__file__).with_name("gpu_kernels_on_host.cpp")
POLICIES = {
    "cifar": Policy(),
    "stl10": Policy(size=96, jitter_strength=0.5, p_blur=0.5, p_solarize=0.2),
    "imagenet": Policy(size=224, jitter_strength=1.0, p_blur=0.5, p_solarize=0.2),
    "odd": Policy(size=37, jitter_strength=1.0, p_color_jitter=1.0, p_blur=0.9, p_solarize=0.5),
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class HostKernels:
    """The kernels on the CPU, with so many threads per block."""

    def __init__(self, library: Path, reach: int) -> None:
        self.library, self.reach = ctypes.CDLL(str(library)), reach

    def crop(self, commands: Commands, size: int, image: NDArray[np.uint8], blocks: int = 7) -> tuple[Any, Any]:
        """Views of ``image`` [H, W, 3], of any strides, in memory: uint8 [N V, size, size, 3], and sums."""
        packed = flat(commands)
        where = np.tile(np.array([image.ctypes.data, *image.strides]), (len(packed), 1))
        views, sums = self._outputs(len(packed), size)
        self._call("run_crop_of_memory", blocks, len(packed), size, views, sums, where, packed)
        return views, sums

    def crop_decoded(self, commands: Commands, size: int, image: NDArray[np.uint8]) -> tuple[Any, Any]:
        """The same of a decoded image."""
        packed = flat(commands)
        views, sums = self._outputs(len(packed), size)
        self._call("run_crop_of_decoded", 3, len(packed), size, views, sums, image, *image.shape[:2], packed)
        return views, sums

    def color(self, commands: Commands, policy: Policy, pixels: Any, sums: Any, *, half: bool = False) -> Any:
        """The second kernel on the outputs of the first: [N V, size, size, 3]."""
        packed = flat(commands)
        views = np.empty(pixels.shape, np.float16 if half else np.float32)
        views.view(np.uint8).fill(255)  # NaN
        weights = cpu_kernels.blur_weights(np.ravel(commands.sigma_px), policy.blur_window_px, self.reach)
        name = "run_color_to_half" if half else "run_color_to_float"
        self._call(name, 5, len(packed), policy.size, views, pixels, sums, packed, weights)
        return views

    def _outputs(self, count: int, size: int) -> tuple[Any, Any]:
        return np.zeros((count, size, size, 3), np.uint8), np.full((count, num_tiles(size)), -1, np.int32)

    def _call(self, name: str, *arguments: Any) -> None:
        for array in arguments:
            assert not isinstance(array, np.ndarray) or array.flags.c_contiguous
        getattr(self.library, name)(
            *(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments)
        )


def flat(commands: Commands) -> NDArray[np.float32]:
    packed = commands.pack()
    return np.ascontiguousarray(packed.reshape(-1, packed.shape[-1]))


def build(output: Path, *flags: str, reach: int, threads: int, source: Path = SOURCE) -> Path:
    defined = {**gpu_compiler.definitions(reach), "THREADS": threads, "KERNELS": f'"{source}"'}
    # Products are rounded before they are added, as NVRTC is told.
    command = ["g++", "-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-pthread", *flags, str(HOST_SOURCE)]
    command += [f"-D{name}={value}" for name, value in defined.items()]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


@pytest.fixture(scope="module")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HostKernels]:
    folder = tmp_path_factory.mktemp("kernels")

    @cache
    def of(policy: Policy, threads: int = 1) -> HostKernels:
        reach = largest_reach(policy)
        library = folder / f"{reach}-{threads}.so"
        if not library.exists():
            build(library, "-shared", reach=reach, threads=threads)
        return HostKernels(library, reach)

    return of


@njit  # type: ignore[untyped-decorator]
def _cpu_views(image: Any, strides: Any, image_hw: Any, origin: Any, commands: Any, window: int, views: Any) -> None:
    for n in range(len(views)):
        cpu_kernels._make_views(image, strides, image_hw, origin, commands[n : n + 1], window, views[n : n + 1])


def cpu_views(commands: Commands, policy: Policy, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The views that the CPU's function makes, [N V, size, size, 3]."""
    packed = flat(commands)
    views = np.empty((len(packed), policy.size, policy.size, 3), np.float32)
    memory = np.lib.stride_tricks.as_strided(image, (image.size,), (1,))
    _cpu_views(memory, np.array(image.strides), image.shape[:2], (0, 0), packed, policy.blur_window_px, views)
    return views


def image_of(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise in one half, areas of one color in the other: with saturated and equal values."""
    rng = np.random.default_rng(seed)
    areas = np.kron(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)), np.ones((8, 8, 1)))[:height, :width]
    noise = rng.integers(0, 256, (height, width, 3))
    return np.where(np.arange(width)[None, :, None] < width // 2, noise, areas).astype(np.uint8)


def commands_of(policy: Policy, hw: tuple[int, int], count: int, seed: int = 3) -> Commands:
    return draw(policy, image_hw=np.broadcast_to(hw, (count, 2)), seed=seed, epoch=0, first_position=0)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "hw", "count"),
    [
        ("cifar", (32, 32), 500),
        ("stl10", (96, 96), 500),
        ("imagenet", (375, 500), 60),
        # Enlarged, of one row or column, and reduced by more than the weights that a kernel keeps.
        ("odd", (5, 700), 100),
        ("odd", (1, 1), 10),
        ("odd", (400, 1), 50),
        ("odd", (1500, 2000), 15),
    ],
)
def test_views_are_those_of_the_cpu(
    host_kernels: Callable[..., HostKernels], name: str, hw: tuple[int, int], count: int
) -> None:
    policy, image = POLICIES[name], image_of(*hw)
    commands, kernels = commands_of(policy, hw, count), host_kernels(POLICIES[name])
    if count >= 500:
        assert len(np.unique(commands.order.reshape(-1, 4), axis=0)) == 24, "every order of the jitter occurs"
    expected = cpu_views(commands, policy, image)
    pixels, sums = kernels.crop(commands, policy.size, image)
    views = kernels.color(commands, policy, pixels, sums)
    np.testing.assert_array_equal(views, expected)
    np.testing.assert_array_equal(kernels.color(commands, policy, pixels, sums, half=True), expected.astype(np.float16))


@needs_compiler
def test_images_may_be_in_any_layout(host_kernels: Callable[..., HostKernels]) -> None:
    policy = POLICIES["stl10"]
    columns = np.ascontiguousarray(image_of(96, 90).transpose(2, 1, 0))
    image, commands = columns.transpose(2, 1, 0), commands_of(POLICIES["stl10"], (96, 90), 20)
    pixels, sums = host_kernels(policy).crop(commands, policy.size, image)
    views = host_kernels(policy).color(commands, policy, pixels, sums)
    np.testing.assert_array_equal(views, cpu_views(commands, policy, np.ascontiguousarray(image)))


@needs_compiler
@pytest.mark.parametrize("lost", [0, 20])
def test_views_of_a_decoded_image(host_kernels: Callable[..., HostKernels], lost: int) -> None:
    """Also if the file has become smaller than it was when its command was drawn: nothing is read out of bounds."""
    policy, image = POLICIES["odd"], image_of(90, 120)
    kernels = host_kernels(policy)
    for seed in range(20):
        commands = commands_of(policy, (90, 120), 1, seed)
        decoded = np.ascontiguousarray(image[: 90 - lost, : 120 - lost])
        pixels, sums = kernels.crop_decoded(commands, policy.size, decoded)
        views = kernels.color(commands, policy, pixels, sums)
        np.testing.assert_array_equal(views, cpu_views(commands, policy, decoded))


@needs_compiler
def test_the_number_of_threads_does_not_matter(host_kernels: Callable[..., HostKernels]) -> None:
    policy, image = POLICIES["odd"], image_of(60, 70)
    commands = commands_of(policy, (60, 70), 3)
    one, five = host_kernels(policy), host_kernels(policy, threads=5)
    pixels, sums = five.crop(commands, policy.size, image)
    np.testing.assert_array_equal(five.color(commands, policy, pixels, sums), cpu_views(commands, policy, image))
    np.testing.assert_array_equal(sums, one.crop(commands, policy.size, image)[1])


@needs_compiler
@pytest.mark.parametrize("removed", [None, *range(SOURCE.read_text().count("__syncthreads();"))])
def test_threads_of_a_block_do_not_race(removed: int | None, tmp_path: Path) -> None:
    """By the thread sanitizer; it reports each barrier that is removed."""
    parts = SOURCE.read_text().split("__syncthreads();")
    text = parts[0]
    for n, part in enumerate(parts[1:]):
        text += ("" if n == removed else "__syncthreads();") + part
    source = tmp_path / "kernels.cu"
    source.write_text(text)
    program = tmp_path / "races"
    try:
        flags = ("-DMAIN", "-g", "-fsanitize=thread")
        build(program, *flags, reach=largest_reach(POLICIES["odd"]), threads=4, source=source)
    except subprocess.CalledProcessError:
        pytest.skip("g++ has no thread sanitizer")
    policy, image = POLICIES["odd"], image_of(60, 70)
    commands = commands_of(policy, (60, 70), 4)
    sigma = np.ravel(commands.sigma_px)
    weights = cpu_kernels.blur_weights(sigma, policy.blur_window_px, largest_reach(policy))
    with (tmp_path / "inputs").open("wb") as file:
        np.array([len(sigma), policy.size, num_tiles(policy.size), *image.shape[:2]], np.int64).tofile(file)
        for array in (image, flat(commands), weights):
            file.write(array.tobytes())
    result = subprocess.run([str(program), str(tmp_path / "inputs")], capture_output=True, text=True)
    assert ("data race" in result.stderr) == (result.returncode != 0), result.stderr
    assert (result.returncode != 0) == (removed is not None), result.stderr


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("reach", [0, 8])
def test_kernels_compile_for_gpus(architecture: str, reach: int) -> None:
    code = compile_kernels(reach, architecture)
    assert code.cubin[:4] == b"\x7fELF"
    resources = code.resources()
    assert sorted(resources) == sorted(KERNELS)
    for used in resources.values():
        # Four blocks of 256 threads per multiprocessor, nothing in local memory, static shared memory for all of them.
        assert 0 < used["registers"] <= 64 and used["spilled_bytes"] == 0 and 0 < used["shared_bytes"] <= 12 * 1024


def test_the_largest_blur_fits_into_shared_memory() -> None:
    shared = {name: used["shared_bytes"] for name, used in compile_kernels(MAX_REACH, "sm_80").resources().items()}
    assert max(shared.values()) <= 48 * 1024
    with pytest.raises(UserError, match="--backend torchvision"):
        largest_reach(Policy(size=1024, p_blur=0.5))
    assert largest_reach(Policy(size=1024)) == 0


def test_kernels_take_the_parameters_that_dali_passes() -> None:
    """For each array: four that are not used, the data, the shape and the strides, of 8 bytes each."""
    from cuda.bindings import nvrtc

    options = [f"-D{name}={value}" for name, value in gpu_compiler.definitions(4).items()]
    options.append("--gpu-architecture=compute_80")
    _, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"", 0, [], [])
    nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    _, length = nvrtc.nvrtcGetPTXSize(program)
    ptx = bytearray(length)
    nvrtc.nvrtcGetPTX(program, ptx)
    entries = re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx.decode())
    parameters = {name: re.findall(r"\.param \.(\w+)", text) for name, text in entries}
    ranks = {
        "crop_of_memory": (4, 2, 2, 2),
        "crop_of_decoded": (4, 2, 3, 2),
        "color_to_float": (4, 4, 2, 2, 2),
        "color_to_half": (4, 4, 2, 2, 2),
    }
    assert {name: len(types) for name, types in parameters.items()} == {
        name: sum(5 + 2 * rank for rank in of) for name, of in ranks.items()
    }
    assert {kind for types in parameters.values() for kind in types} <= {"u64", "b64"}


def test_machine_code_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = gpu_compiler.cached_cubin(0, "sm_80")
    monkeypatch.setattr(gpu_compiler, "compile_kernels", None)
    assert gpu_compiler.cached_cubin(0, "sm_80") == first
    with pytest.raises(TypeError):
        gpu_compiler.cached_cubin(1, "sm_80")


def test_blur_weights_are_torchvisions() -> None:
    """Where the official kernel is not cut off after four sigmas."""
    from torchvision.transforms.v2.functional._misc import _get_gaussian_kernel1d

    sigma = np.array([0.3, 0.0, 1.0, 1.9], np.float32)
    weights = cpu_kernels.blur_weights(sigma, 23, 8)
    assert weights.shape == (4, 17) and not weights[1].any()
    for row, s in zip(weights, sigma.tolist()):
        if s:
            theirs = _get_gaussian_kernel1d(23, s, torch.float64, torch.device("cpu")).numpy()
            reach = min(11, int(np.ceil(4 * s)))
            np.testing.assert_allclose(row[: 2 * reach + 1], theirs[11 - reach : 12 + reach], atol=1e-4)
            assert not row[2 * reach + 1 :].any()
