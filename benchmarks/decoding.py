"""DALI graphs that decode images from files, wholly or the part that their views need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines.commands import PACKED_COLUMNS
from pipelines.executors import graphs
from pipelines.loader import PREFETCH_DEPTH, _TrainingSource
from pipelines.sampler import Sampler

Part = Literal["the whole image", "the union of both windows", "each window"]


def decoded(inputs: list[Any], packed: Any, form: graphs.Form, part: Part, views: int) -> list[tuple[Any, Any]]:
    """Images [H, W, 3] uint8 for all views, or one for each, and the top-left of each in the source.

    ``inputs`` are those of ``graphs.open_image``, ``packed`` the commands of the sample.
    """
    *given, origin, _ = inputs
    if part == "the union of both windows":
        return [(graphs.open_image(inputs, form, "cpu")[0], origin)]
    if part == "the whole image":
        encoded = graphs._encoded(given, form)
        return [(fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False), origin - origin)]
    top, height = PACKED_COLUMNS["top"], PACKED_COLUMNS["height"]
    windows = [
        (
            fn.cast(packed[v, top : top + 2], dtype=types.INT32),
            fn.cast(packed[v, height : height + 2], dtype=types.INT32),
        )
        for v in range(views)
    ]
    return [(graphs.open_image([*given, *window], form, "cpu")[0], window[0]) for window in windows]


def batches(sampler: Sampler, part: Part, *, threads: int, execute: bool) -> Iterator[Any]:
    """Endless outputs of a pipeline that decodes the images of ``sampler`` and, with ``execute``, makes their views.

    First the views [N, V, size, size, 3] float32 or the parts that are decoded, then what the pipeline was fed.
    """
    source = _TrainingSource(sampler, 0, "compiled", torch.device("cpu"))
    opening = {"path": 3, "bytes": 3, "either": 5}[source.form]
    views, size = sampler.views, sampler.policy.size

    @pipeline_def(  # type: ignore[untyped-decorator]
        enable_conditionals=True,
        exec_dynamic=True,
        batch_size=sampler.batch_size,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=PREFETCH_DEPTH,
    )
    def graph() -> tuple[Any, ...]:
        *inputs, placing, packed, record = fn.external_source(source, num_outputs=opening + 3, batch=True, no_copy=True)
        # DALI warns of inputs that nobody uses.
        fed = (*inputs, placing, packed, record)
        images = decoded(inputs, packed, source.form, part, views)
        if not execute:
            return *(image for image, _ in images), *fed
        made = []
        for v, (image, origin) in enumerate(images):
            where = fn.cat(fn.cast(origin, dtype=types.INT64), placing[2:3])
            commands = packed if len(images) == 1 else packed[v : v + 1]
            made.append(graphs._Compiled(views // len(images), size, source.form)(image, where, commands))
        return (made[0] if len(made) == 1 else fn.cat(*made)), *fed

    pipeline: Any = graph()
    pipeline.build()
    while True:
        yield pipeline.run()
