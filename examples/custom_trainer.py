"""Use the two-view loader, without ``stec``, in a trainer of another method: ``python examples/custom_trainer.py``."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from pipelines import Loader, Policy, Sampler, open_data_set

STEPS, BATCH, SEED = 8, 32, 0


def barlow_twins(z_i: Tensor, z_j: Tensor, off_diagonal: float = 5e-3) -> Tensor:
    """The loss of Zbontar et al. 2021 on projections [N, F]: brings their cross-correlation close to the identity."""
    z_i, z_j = ((z - z.mean(0)) / (z.std(0) + 1e-6) for z in (z_i, z_j))
    error = (z_i.T @ z_j / len(z_i) - torch.eye(z_i.shape[1])).square()
    on_diagonal = error.diagonal().sum()
    return on_diagonal + off_diagonal * (error.sum() - on_diagonal)


def main() -> list[float]:
    """Train for ``STEPS`` steps and return their losses."""
    torch.manual_seed(SEED)
    policy = Policy(size=32, jitter_strength=1.0, p_blur=0.5)
    sampler = Sampler(open_data_set("demo", None).train, policy, seed=SEED, batch_size=BATCH)
    loader = Loader(sampler, backend="auto", device=torch.device("cpu"), workers=2)

    encoder = resnet18(num_classes=64)
    model = nn.Sequential(encoder, nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    # The iterator is endless. To resume a run, pass its next step: the batches are a function of seed and step.
    for step, batch in enumerate(islice(loader.batches(0), STEPS)):
        z = model(batch.views.flatten(0, 1)).view(BATCH, 2, -1)
        loss = barlow_twins(z[:, 0], z[:, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        blurred = batch.commands.blur.mean()
        print(f"step {step}: loss {loss:.2f}, blurred views {blurred:.0%}")
    return losses


if __name__ == "__main__":
    main()
