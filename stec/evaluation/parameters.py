"""The command from view i to view j, decoded from the features of both views.

Shapes: N pairs of views, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from pipelines.commands import PACKED_COLUMNS, Commands
from pipelines.loader import Loader
from stec.evaluation.decoding import R2, decode
from stec.evaluation.evaluate import encode_batches, gather_rows
from stec.geometry import Convention, relative_factors, relative_windows
from stec.models.encoder import ImageEncoder
from stec.targets import TARGETS

FIT_PAIRS, TEST_PAIRS = 15_000, 5_000
"""The maximum numbers of pairs on which decoders are fitted (with validation) and tested. An encoder of 2,048 features
has 4,096 per pair, a third of the samples; 5,000 leave an R2 uncertain by about .01."""
FIT_SEED, TEST_SEED = 0, 1
"""Of the images of the pairs, and of their commands."""
TEST_FRACTION = 0.25
"""Fraction of the pairs that test, if all are of the same images."""


def command_entries(commands: Commands, convention: Convention) -> dict[str, NDArray[np.float32]]:
    """The entries [N] by name, of view j relative to view i.

    The matrix of the crop box, the differences of the color factors, of the blur's sigma in px, of solarization and of
    gray (1 if only view j is, -1 if only view i is). Colors of a gray view cannot be decoded: NaN.
    """
    window, factors = relative_windows(commands, convention=convention), relative_factors(commands)
    is_gray = commands.gray.astype(np.float32)
    colors = np.where(commands.gray.any(axis=1, keepdims=True), np.float32(np.nan), factors[:, :4])
    return {
        **dict(zip(itertools.chain(*TARGETS["window"].entries), window.reshape(-1, 6).T, strict=True)),
        **dict(zip(("brightness", "contrast", "saturation", "hue"), colors.T, strict=True)),
        "blur": factors[:, 4],
        "solarize": factors[:, 5],
        "gray": is_gray[:, 1] - is_gray[:, 0],
    }


def decode_commands(
    encoder: ImageEncoder, fit: Loader | None, test: Loader, convention: Convention, accelerator: Accelerator
) -> dict[str, R2]:
    """R2 of each entry on pairs of ``test``, decoded as on pairs of ``fit``; entries that never vary are omitted.

    With ``fit`` None, the decoders are fitted on other pairs of ``test``, of other images. All processes share the
    encoding and return the same.
    """
    if fit is None:
        features, commands = encode_pairs(encoder, test, FIT_PAIRS + TEST_PAIRS, accelerator)
        tested = int(len(features) * TEST_FRACTION)
        fit_features, test_features = features[tested:], features[:tested]
        fit_commands, test_commands = commands[tested:], commands[:tested]
    else:
        fit_features, fit_commands = encode_pairs(encoder, fit, FIT_PAIRS, accelerator)
        test_features, test_commands = encode_pairs(encoder, test, TEST_PAIRS, accelerator)
    fit_values, test_values = (command_entries(commands, convention) for commands in (fit_commands, test_commands))
    return decode(fit_features, fit_values, test_features, test_values)


def encode_pairs(
    encoder: ImageEncoder, loader: Loader, limit: int, accelerator: Accelerator
) -> tuple[Tensor, Commands]:
    """Concatenated features [N, 2D] of both views of the loader's first pairs, on the host, and their commands.

    As many full batches of the first epoch as ``limit`` allows, but at least one. The loader is that of a single
    process: the processes share its batches.
    """
    size = loader.sampler.batch_size
    steps = range(max(1, min(loader.steps_per_epoch, limit // size)))
    shares = np.array_split(steps, accelerator.num_processes)
    own, longest = shares[accelerator.process_index], len(shares[0])
    features = torch.zeros(longest * size, 2 * encoder.feature_dim, device=accelerator.device)
    packed = torch.zeros(longest * size, 2, PACKED_COLUMNS["end"], device=accelerator.device)
    batches = itertools.islice(loader.batches(int(own[0])), len(own)) if len(own) else iter(())

    def views() -> Iterator[Tensor]:
        for n, batch in enumerate(batches):
            packed[n * size : (n + 1) * size] = torch.from_numpy(batch.commands.pack())
            yield batch.views.flatten(0, 1)

    for n, encoded in enumerate(encode_batches(encoder, views(), accelerator)):
        features[n * size : (n + 1) * size] = encoded.view(size, -1)
    counts = [len(share) * size for share in shares]
    commands = Commands.unpack(gather_rows(packed, counts, accelerator).numpy())
    return gather_rows(features, counts, accelerator), commands
