"""Data pipelines that execute commands on images and return both as a batch; independent of ``stec``.

For your programs (``examples/``): ``open_data_set`` opens a data set by its name; ``ImageArray`` and ``ImageFiles``
hold your images; a ``Sampler`` chooses the image at each position of an epoch and draws its ``Commands`` from a
``Policy``; a ``Loader`` makes a ``Batch`` of them, and an ``EvaluationLoader`` makes batches without augmentation. Each
name is imported at first use.
"""

from typing import TYPE_CHECKING

from pipelines.lazy import lazy_names

if TYPE_CHECKING:
    from pipelines.batch import Batch as Batch
    from pipelines.commands import Commands as Commands
    from pipelines.commands import Policy as Policy
    from pipelines.commands import draw as draw
    from pipelines.datasets.images import ImageArray as ImageArray
    from pipelines.datasets.images import ImageFiles as ImageFiles
    from pipelines.datasets.registry import DataSet as DataSet
    from pipelines.datasets.registry import open_data_set as open_data_set
    from pipelines.datasets.urls import RemoteFolder as RemoteFolder
    from pipelines.errors import UserError as UserError
    from pipelines.loader import EvaluationLoader as EvaluationLoader
    from pipelines.loader import Loader as Loader
    from pipelines.sampler import Sampler as Sampler
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "pipelines.batch": "Batch",
            "pipelines.commands": "Commands Policy draw",
            "pipelines.datasets.images": "ImageArray ImageFiles",
            "pipelines.datasets.registry": "DataSet open_data_set",
            "pipelines.datasets.urls": "RemoteFolder",
            "pipelines.errors": "UserError",
            "pipelines.loader": "EvaluationLoader Loader",
            "pipelines.sampler": "Sampler",
        },
    )
