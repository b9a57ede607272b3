"""Data pipelines: they execute commands on images and hand both on as a batch.

They need nothing of ``stec``. For use in your programs (``examples/``): ``open_data_set`` opens a data set by its name;
``ImageArray`` and ``ImageFiles`` are your images; a ``Sampler`` gives each position of an epoch an image and the
``Commands`` drawn from a ``Policy``; a ``Loader`` makes each ``Batch``, and an ``EvaluationLoader`` batches without
augmentation. Each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from pipelines.lazy import lazily

_MODULES = {
    "Batch": "pipelines.batch",
    "Commands": "pipelines.commands",
    "DataSet": "pipelines.datasets.index",
    "EvaluationLoader": "pipelines.loader",
    "ImageArray": "pipelines.datasets.images",
    "ImageFiles": "pipelines.datasets.images",
    "Loader": "pipelines.loader",
    "Sampler": "pipelines.sampler",
    "Policy": "pipelines.commands",
    "UserError": "pipelines.errors",
    "draw": "pipelines.commands",
    "open_data_set": "pipelines.datasets.index",
}

if TYPE_CHECKING:
    from pipelines.batch import Batch as Batch
    from pipelines.commands import Commands as Commands
    from pipelines.commands import Policy as Policy
    from pipelines.commands import draw as draw
    from pipelines.datasets.images import ImageArray as ImageArray
    from pipelines.datasets.images import ImageFiles as ImageFiles
    from pipelines.datasets.index import DataSet as DataSet
    from pipelines.datasets.index import open_data_set as open_data_set
    from pipelines.errors import UserError as UserError
    from pipelines.loader import EvaluationLoader as EvaluationLoader
    from pipelines.loader import Loader as Loader
    from pipelines.sampler import Sampler as Sampler
else:
    __getattr__, __dir__ = lazily(__name__, _MODULES)
