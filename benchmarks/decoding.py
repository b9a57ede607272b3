"""Executors that decode images from files, completely or the part that their views need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from nvidia.dali import fn, types

from pipelines.commands import PACKED_COLUMNS, Policy
from pipelines.datasets.images import Images
from pipelines.executors.cpu import CompiledViews, CpuExecutor
from pipelines.executors.graph import training_pipeline
from pipelines.executors.image_files import encoded_image
from pipelines.feed import TrainingFeed
from pipelines.loader import pipeline_options
from pipelines.sampler import Sampler

Part = Literal["the whole image", "the union of both crop boxes", "each crop box"]
CPU = torch.device("cpu")


class DecodingExecutor(CpuExecutor):
    """Decodes the given part, and makes the views only with ``execute``; otherwise the outputs are what was decoded."""

    def __init__(self, images: Images, policy: Policy, views: int, part: Part, *, execute: bool) -> None:
        super().__init__(images, policy, views, CPU)
        self.part, self.execute = part, execute

    def views(self, nodes: Mapping[str, Any], commands: Any) -> tuple[Any, ...]:
        decoded = self.decode(nodes, commands)
        if not self.execute:
            # DALI warns about unused inputs.
            return *(image for image, _ in decoded), *(nodes[name] for name in self.input_names)
        views = []
        for v, (image, origin) in enumerate(decoded):
            placement = fn.cat(fn.cast(origin, dtype=types.INT64), nodes["placement"][2:3])
            of_view = commands if len(decoded) == 1 else commands[v : v + 1]
            execute = CompiledViews(self.num_views // len(decoded), self.policy.size, in_memory=False)
            views.append(execute(image, placement, of_view))
        return (views[0] if len(views) == 1 else fn.cat(*views)), *(nodes[name] for name in self.input_names)

    def decode(self, nodes: Mapping[str, Any], commands: Any) -> list[tuple[Any, Any]]:
        """Images [H, W, 3] uint8 for all views, or one for each, and the top-left of each in the source."""
        assert self.files is not None
        if self.part == "the union of both crop boxes":
            return [(self.files.decode(nodes)[0], nodes["origin"])]
        if self.part == "the whole image":
            encoded = encoded_image(nodes, self.files.form)
            image = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
            return [(image, nodes["origin"] - nodes["origin"])]
        top, height = PACKED_COLUMNS["top"], PACKED_COLUMNS["height"]
        decoded = []
        for v in range(self.num_views):
            origin = fn.cast(commands[v, top : top + 2], dtype=types.INT32)
            extent = fn.cast(commands[v, height : height + 2], dtype=types.INT32)
            decoded.append((self.files.decode({**nodes, "origin": origin, "extent": extent})[0], origin))
        return decoded


def batches(sampler: Sampler, part: Part, *, threads: int, execute: bool) -> Iterator[Any]:
    """Endless outputs of a pipeline that decodes the images of ``sampler`` and, with ``execute``, makes their views.

    The first outputs are the views [N, V, size, size, 3] float32 or the decoded parts.
    """
    executor = DecodingExecutor(sampler.images, sampler.policy, sampler.views, part, execute=execute)
    feed = TrainingFeed(sampler, executor, 0)
    options = pipeline_options(sampler.batch_size, threads, CPU)
    pipeline = training_pipeline(executor, feed.next_inputs, **options)
    pipeline.build()
    while True:
        yield pipeline.run()
