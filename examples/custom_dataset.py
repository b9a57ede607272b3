"""Train on your data set with the loader, model and objective of this project: ``python examples/custom_dataset.py``.

Images in memory or in a memory-mapped file are an ``ImageArray``: uint8 [N, H, W, 3] of any size. For image files use
``open_data_set("folder", path)``.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

import stec
from pipelines import ImageArray, Loader, Sampler

STEPS, BATCH, SIZE_PX, SEED = 8, 32, 32, 0


def paint(count: int) -> NDArray[np.uint8]:
    """Colored waves, uint8 [count, 48, 64, 3]. Read your images here."""
    random = np.random.default_rng(SEED)
    y, x = np.mgrid[0:48, 0:64] / 8
    angle, color = random.uniform(0, np.pi, (count, 1, 1)), random.uniform(0, 1, (count, 1, 1, 3))
    wave = 0.5 + 0.5 * np.sin(np.cos(angle) * x + np.sin(angle) * y)
    return (255 * wave[..., None] * color).astype(np.uint8)


def main() -> list[float]:
    """Train for ``STEPS`` steps and return their losses."""
    torch.manual_seed(SEED)
    # Label -1 means unlabeled. Without labels there is no online linear classifier, hence ``classes=0`` below.
    images = ImageArray(pixels=paint(256), labels=np.full(256, -1))
    sampler = Sampler(images, stec.Policy(size=SIZE_PX), seed=SEED, batch_size=BATCH)
    loader = Loader(sampler, backend="auto", device=torch.device("cpu"), workers=2)

    model = stec.Model(stec.ModelSettings(width=8, feat_dim=64), stem="cifar", classes=0)
    objective = stec.Objective(stec.ObjectiveSettings(manip_lambda=1.0, temperature=0.2))
    # What the inverse model predicts: the crop box of view j relative to that of view i.
    copy = stec.EfferenceCopy()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for step, batch in enumerate(islice(loader.batches(0), STEPS)):
        values = copy.values([batch.commands], SIZE_PX, batch.views.device)
        loss, _ = objective(model(batch.views), batch.labels, values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
