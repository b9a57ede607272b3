"""Use the losses in a plain PyTorch loop with torchvision's encoder and transforms: ``python examples/custom_loop.py``.

The commands that this loop executes are also the target of the inverse model.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms import functional as F

import stec
from pipelines import open_data_set

STEPS, BATCH, SIZE_PX, SEED = 8, 32, 32, 0


def make_view(image: Image, commands: stec.Commands, n: int, v: int) -> Tensor:
    """View ``v`` of image ``n``, float32 [3, 32, 32]. Only crop box and flip: the policy changes no colors."""
    crop_box = [int(getattr(commands, name)[n, v]) for name in ("top", "left", "height", "width")]
    view = F.resized_crop(image, *crop_box, [SIZE_PX, SIZE_PX])
    return torch.as_tensor(F.to_tensor(F.hflip(view) if commands.flip[n, v] else view))


def main() -> list[float]:
    """Train for ``STEPS`` steps and return their losses."""
    torch.manual_seed(SEED)
    images = open_data_set("demo", None).train
    policy = stec.Policy(size=SIZE_PX, p_color_jitter=0, p_grayscale=0)
    encoder = resnet18()
    encoder.fc = nn.Identity()
    projection, inverse_model = stec.Projection(512, 512, 64), stec.InverseModel(512, 512, n_bins=6)
    optimizer = torch.optim.Adam(nn.ModuleList([encoder, projection, inverse_model]).parameters(), lr=1e-3)

    losses = []
    for step in range(STEPS):
        ids = np.arange(step * BATCH, (step + 1) * BATCH)
        commands = stec.draw(policy, seed=SEED, epoch=0, first_position=int(ids[0]), image_hw=images.image_hw(ids))
        opened = [images.open(int(image_id)) for image_id in ids]
        views = torch.stack([make_view(image, commands, n, v) for v in (0, 1) for n, image in enumerate(opened)])

        h_i, h_j = encoder(views).chunk(2)
        contrastive, *_ = stec.nt_xent(projection(h_i), projection(h_j), temperature=0.2)
        command, all_pairs = torch.from_numpy(stec.relative_windows(commands)), torch.ones(BATCH, dtype=torch.bool)
        inverse, accuracy = stec.inverse_loss(inverse_model(h_i, h_j), command, all_pairs)
        loss = 2 * contrastive + inverse
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {loss:.3f}, accuracy of the inverse model {accuracy:.1%}")
    return losses


if __name__ == "__main__":
    main()
