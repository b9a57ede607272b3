"""S-TEC: SimCLR with an inverse model that recovers the command between two views.

For your programs (``examples/``; the loaders are in ``pipelines``):

* ``draw`` draws the ``Commands`` of a ``Policy``: what is done to each image to make its views;
* ``relative_windows`` computes the command between two views, which the inverse model recovers, and
  ``EfferenceCopy`` the values of all its targets;
* ``nt_xent`` and ``inverse_loss`` are the two losses, ``Objective`` their sum, with ``ObjectiveSettings``;
* ``Encoder``, ``Projection`` and ``InverseModel`` are networks, ``Model`` all of them together, with ``ModelSettings``;
* ``load_encoder`` loads a trained encoder from a file, an exported folder or the Hugging Face Hub;
* ``fit`` trains as the command line does, with the ``TrainConfig`` of ``configure``, and returns a ``Run``.

Each name is imported at first use.
"""

from typing import TYPE_CHECKING

from pipelines.lazy import lazy_names

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from pipelines.batch import Batch as Batch
    from pipelines.commands import Commands as Commands
    from pipelines.commands import Policy as Policy
    from pipelines.commands import draw as draw
    from pipelines.errors import UserError as UserError
    from stec.api import Run as Run
    from stec.api import configure as configure
    from stec.api import fit as fit
    from stec.config import ModelSettings as ModelSettings
    from stec.config import ObjectiveSettings as ObjectiveSettings
    from stec.config import TrainConfig as TrainConfig
    from stec.geometry import relative_windows as relative_windows
    from stec.models.encoder import Encoder as Encoder
    from stec.models.heads import InverseModel as InverseModel
    from stec.models.heads import Projection as Projection
    from stec.models.model import Model as Model
    from stec.objectives.inverse import EfferenceCopy as EfferenceCopy
    from stec.objectives.inverse import inverse_loss as inverse_loss
    from stec.objectives.objective import Objective as Objective
    from stec.objectives.simclr import nt_xent as nt_xent
    from stec.weights.pretrained import load_encoder as load_encoder
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "pipelines.batch": "Batch",
            "pipelines.commands": "Commands Policy draw",
            "pipelines.errors": "UserError",
            "stec.api": "Run configure fit",
            "stec.config": "ModelSettings ObjectiveSettings TrainConfig",
            "stec.models.encoder": "Encoder",
            "stec.models.heads": "InverseModel Projection",
            "stec.models.model": "Model",
            "stec.geometry": "relative_windows",
            "stec.objectives.inverse": "EfferenceCopy inverse_loss",
            "stec.objectives.objective": "Objective",
            "stec.objectives.simclr": "nt_xent",
            "stec.weights.pretrained": "load_encoder",
        },
    )
