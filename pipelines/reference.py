"""The same commands executed by torchvision: the oracle of the tests and the fallback where DALI has no wheel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from pipelines.images import Images
from pipelines.order import Order, Share
from pipelines.workers import made_by_workers
from stec.commands import Commands, Policy
from stec.errors import UserError

K = TypeVar("K")
T = TypeVar("T")

_JITTER_STEPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
_HUE = 3


def execute(image: Image.Image, commands: Commands, policy: Policy, n: int, v: int) -> Tensor:
    """View ``v`` of image ``n`` of ``commands``, made from that image in RGB: [3, size, size] float32 in [0, 1].

    As in the official code, window, jitter and grey act on 8-bit Pillow images, blur and solarization on floats.
    """
    size = policy.size
    view = F.resized_crop(
        image,
        int(commands.top[n, v]),
        int(commands.left[n, v]),
        int(commands.height[n, v]),
        int(commands.width[n, v]),
        [size, size],
    )
    if commands.flip[n, v]:
        view = F.hflip(view)
    if commands.jitter[n, v]:
        factors = [commands.brightness[n, v], commands.contrast[n, v], commands.saturation[n, v]]
        for step in commands.order[n, v]:
            if step == _HUE:
                view = F.adjust_hue(view, float(commands.hue_turns[n, v]))
            else:
                view = _JITTER_STEPS[step](view, float(factors[step]))
    if commands.grey[n, v]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    tensor: Tensor = F.to_tensor(view)
    if commands.blur[n, v]:
        tensor = blur(tensor, float(commands.sigma_px[n, v]), policy)
    if commands.solarize[n, v]:
        tensor = solarize(tensor)
    return tensor


def blur(view: Tensor, sigma_px: float, policy: Policy) -> Tensor:
    """Gaussian blur of a view [3, H, W] with the official kernel size, mirrored at the borders."""
    blurred: Tensor = F.gaussian_blur(view, [policy.blur_window_px] * 2, [sigma_px] * 2)
    return blurred


def solarize(view: Tensor) -> Tensor:
    """Invert values of one half and more of a view in [0, 1]."""
    return torch.where(view < 0.5, view, 1 - view)


def _step(order: Order, step: int) -> tuple[NDArray[np.float32], NDArray[np.int64], Share]:
    share = order.share(step)
    images, policy = order.images, share.policy
    views = np.empty((len(share.image_ids), order.views, policy.size, policy.size, 3), np.float32)
    for n, image_id in enumerate(share.image_ids):
        image = images.open(int(image_id))
        for v in range(order.views):
            views[n, v] = execute(image, share.commands, policy, n, v).permute(1, 2, 0)
    return views, images.labels[share.image_ids], share


def evaluation_view(image: Image.Image, resize_px: int | None, size: int) -> Tensor:
    """[3, size, size] float32 in [0, 1]: the plain image, or its shorter side at ``resize_px`` and the centre of it."""
    if resize_px is not None:
        image = F.center_crop(F.resize(image, resize_px), [size, size])
    tensor: Tensor = F.to_tensor(image)
    return tensor


def reference_steps(order: Order, first_step: int, workers: int) -> Iterator[tuple[Tensor, Tensor, Share]]:
    """Endless steps from ``first_step`` on, made by so many worker processes (0: in this one).

    Each is views [N, V, H, W, 3] float32 in [0, 1], labels [N] int64, and the share that was executed.
    """
    for views, labels, share in _made(partial(_step, order), itertools.count(first_step), workers):
        yield torch.from_numpy(views), torch.from_numpy(labels), share


def _evaluation_batch(
    images: Images, resize_px: int | None, size: int, image_ids: NDArray[np.int64]
) -> NDArray[np.float32]:
    opened = (images.open(int(image_id)) for image_id in image_ids)
    return np.stack([evaluation_view(image, resize_px, size).numpy() for image in opened])


def reference_evaluation(
    images: Images, batches: list[NDArray[np.int64]], resize_px: int | None, size: int, workers: int
) -> Iterator[Tensor]:
    """Batches of image ids as evaluation sees the images, each [n, 3, size, size] float32 in [0, 1]."""
    return map(torch.from_numpy, _made(partial(_evaluation_batch, images, resize_px, size), batches, workers))


def _made(make: Callable[[K], T], keys: Iterable[K], workers: int) -> Iterator[T]:
    """``make`` of each key, in this order. Raises what ``make`` raises."""
    if not workers:
        yield from map(make, keys)
        return
    for item in made_by_workers(partial(_or_error, make), keys, workers):
        if isinstance(item, UserError):
            raise item
        yield item


def _or_error(make: Callable[[K], T], key: K) -> T | UserError:
    """An error that is meant for the user is an item, too, as it must reach the main process."""
    try:
        return make(key)
    except UserError as error:
        return error
