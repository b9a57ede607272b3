"""Data pipelines: they execute commands on images and hand both on as a batch.

For use in programs of one's own (``examples/``): ``open_data_set`` opens a data set by its name; ``ImageArray`` and
``ImageFiles`` are images of one's own; an ``Order`` says which of them stands where, with which commands; a ``Loader``
makes ``stec.Batch`` of it, and an ``EvaluationLoader`` batches without augmentation. Each is imported when it is first
used.
"""

from typing import TYPE_CHECKING

from stec.lazy import lazily

_MODULES = {
    "DataSet": "index",
    "EvaluationLoader": "loader",
    "ImageArray": "images",
    "ImageFiles": "images",
    "Loader": "loader",
    "Order": "order",
    "open_data_set": "index",
}

if TYPE_CHECKING:
    from pipelines.images import ImageArray as ImageArray
    from pipelines.images import ImageFiles as ImageFiles
    from pipelines.index import DataSet as DataSet
    from pipelines.index import open_data_set as open_data_set
    from pipelines.loader import EvaluationLoader as EvaluationLoader
    from pipelines.loader import Loader as Loader
    from pipelines.order import Order as Order
else:
    __getattr__, __dir__ = lazily(__name__, _MODULES)
