"""How image files enter a DALI graph: they are read and decoded, on a CPU only the part that the views need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math, pipeline_def, types

from pipelines.commands import Commands
from pipelines.datasets.images import ImageFiles
from pipelines.executors import DataNode

FileForm = Literal["path", "bytes", "either"]
"""How files are given to the graph: by name; by content; or each by one of the two."""
FORM_INPUTS: dict[FileForm, tuple[str, ...]] = {
    "path": ("path",),
    "bytes": ("content",),
    "either": ("has_content", "content", "path"),
}
EMPTY = np.zeros(1, np.uint8)
HINT_QUANTILE = 0.999
"""Of the images' sizes, for which a GPU's decoder reserves memory. Not 1: one huge image would determine it. Larger
images are decoded as well."""


def file_form(images: ImageFiles) -> FileForm:
    """DALI reads files itself, except images in shards and those that Pillow must decode."""
    if images.in_shards:
        return "bytes"
    return "either" if images.needs_pillow.any() else "path"


def needed_part(commands: Commands) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The bounding box of an image's crop boxes: top-left [N, 2], and height and width [N, 2], in source px."""
    first = np.stack([commands.top.min(1), commands.left.min(1)], -1)
    last = np.stack([(commands.top + commands.height).max(1), (commands.left + commands.width).max(1)], -1)
    return first, last - first


def encoded_inputs(images: ImageFiles, image_ids: NDArray[np.int64], form: FileForm) -> dict[str, Any]:
    """The inputs of ``encoded_image``. Raises BadImage for an image that cannot be read."""
    if form == "path":
        return {"path": images.path_bytes(image_ids)}
    by_pillow = images.needs_pillow[image_ids]
    pairs = zip(image_ids.tolist(), by_pillow.tolist())
    if form == "bytes":
        return {"content": [_as_ppm(images, n) if pillow else images.encoded(n) for n, pillow in pairs]}
    content = [_as_ppm(images, n) if pillow else EMPTY for n, pillow in pairs]
    return {"has_content": by_pillow, "content": content, "path": images.path_bytes(image_ids)}


def _as_ppm(images: ImageFiles, image_id: int) -> NDArray[np.uint8]:
    """An image that DALI would decode differently from Pillow, in a format of plain pixels."""
    image = images.open(image_id)
    return np.frombuffer(b"P6 %d %d 255\n" % image.size + image.tobytes(), np.uint8)


def encoded_image(nodes: Mapping[str, DataNode], form: FileForm) -> DataNode:
    """The content of a file."""
    if form == "bytes":
        return nodes["content"]
    if form == "path":
        return fn.io.file.read(nodes["path"], dont_use_mmap=True)
    # A condition per image.
    if nodes["has_content"]:
        encoded = nodes["content"]
    else:
        encoded = fn.io.file.read(nodes["path"], dont_use_mmap=True)
    return encoded


def stored_size(encoded: DataNode, images: ImageFiles) -> DataNode:
    """[3] int64: height and width in px, and bytes, that an image's file has now.

    Commands rely on the size that it had when they were drawn, and GPUs decode truncated JPEGs without an error.
    """
    shape = fn.peek_image_shape(encoded, adjust_orientation=images.exif_orientation)
    return fn.cat(shape[:2], encoded.shape())


def gpu_decoder_options() -> dict[str, Any]:
    """Options of DALI's decoders on a GPU."""
    # As libjpeg decodes; nvJPEG's default differs by up to 9 levels where the color is subsampled.
    options: dict[str, Any] = {"jpeg_fancy_upsampling": True}
    if torch.are_deterministic_algorithms_enabled():
        # The hardware decoder differs slightly from the CUDA decoder, and DALI divides each batch between the two.
        options["hw_decoder_load"] = 0.0
    return options


class Files:
    """Images in files, which a graph decodes.

    A GPU decodes whole images. Of parts, nvImageCodec 0.9 leaves the decoding to the CPU if nvJPEG is older than 13.2,
    which decodes their borders wrongly, and crashes on H100 if it is newer (github.com/NVIDIA/nvImageCodec/issues/55).
    """

    def __init__(self, images: ImageFiles, device: str) -> None:
        self.images, self.device, self.form = images, device, file_form(images)
        self.names = FORM_INPUTS[self.form] if device == "gpu" else (*FORM_INPUTS[self.form], "origin", "extent")

    def inputs(self, image_ids: NDArray[np.int64], commands: Commands) -> dict[str, Any]:
        """The inputs of ``decode``: the files, and on a CPU the part to decode.

        Raises BadImage for an image that cannot be read.
        """
        inputs = encoded_inputs(self.images, image_ids, self.form)
        if self.device != "gpu":
            inputs["origin"], inputs["extent"] = needed_part(commands)
        return inputs

    def decode(self, nodes: Mapping[str, DataNode]) -> tuple[DataNode, DataNode]:
        """The image, or the part of it, [h, w, 3] uint8 on the device, and its ``stored_size``."""
        encoded = encoded_image(nodes, self.form)
        # DALI 2.4's image_slice crashes the process if a sample is no image. Reading the header first is an error then.
        size = stored_size(encoded, self.images)
        options: Any = {"output_type": types.RGB, "adjust_orientation": self.images.exif_orientation}
        if self.device == "gpu":
            # Not the largest: one huge image would determine the memory of every thread. Larger ones are decoded too.
            height, width = np.ceil(np.quantile(self.images.sizes, HINT_QUANTILE, axis=0)).astype(int).tolist()
            options |= {"preallocate_height_hint": height, "preallocate_width_hint": width, **gpu_decoder_options()}
            return fn.decoders.image(encoded, device="mixed", **options), size
        # It also crashes if a sample is smaller than its slice; a smaller slice makes that detectable afterwards.
        origin = math.min(nodes["origin"], size[:2] - 1)
        extent = math.min(nodes["extent"], size[:2] - origin)
        options |= {"normalized_anchor": False, "normalized_shape": False}
        return fn.decoders.image_slice(encoded, origin, extent, axes=[0, 1], **options), size


def evaluation_pipeline(
    images: ImageFiles, source: Any, size: int, *, device: str, form: FileForm, **pipeline_options: Any
) -> Any:
    """A pipeline that resizes images and crops a square.

    ``source`` returns the inputs of ``encoded_image``, the sizes to resize to [N, 2] and the top-left corners of the
    squares [N, 2]. The pipeline returns images [N, size, size, 3] uint8 on ``device``, and their ``stored_size``
    [N, 3].
    """
    names = evaluation_inputs(form)

    @pipeline_def(enable_conditionals=True, exec_dynamic=True, **pipeline_options)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[DataNode, ...]:
        nodes = dict(zip(names, fn.external_source(source, num_outputs=len(names), batch=True, no_copy=True)))
        encoded = encoded_image(nodes, form)
        size_now = stored_size(encoded, images)
        image = fn.decoders.image(
            encoded,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=images.exif_orientation,
            **(gpu_decoder_options() if device == "gpu" else {}),
        )
        resized = fn.resize(
            image,
            size=nodes["resized_hw"],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            minibatch_size=Pipeline.current().max_batch_size,
        )
        # As keywords, which stay on the host; positional ones would be copied to the GPU and back.
        return fn.slice(resized, start=nodes["corner"], shape=[size, size], axes=[0, 1]), size_now

    return pipeline()


def evaluation_inputs(form: FileForm) -> Sequence[str]:
    """Names of the inputs of ``evaluation_pipeline``."""
    return (*FORM_INPUTS[form], "resized_hw", "corner")
