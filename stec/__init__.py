"""S-TEC: SimCLR with an inverse model that recovers the command between two views.

For use in programs of one's own (``examples/``; the loaders are in ``pipelines``):

* ``draw`` draws the ``Commands`` of a ``Policy``: what is done to each image to make its views;
* ``relative_windows`` turns them into the command between two views, which the inverse model recovers;
* ``nt_xent`` and ``inverse_loss`` are the two losses, ``Objective`` their sum, with ``Weights``;
* ``Encoder``, ``Projection`` and ``InverseModel`` are networks, ``Model`` all of them together;
* ``load_encoder`` loads a trained encoder from a file, an exported folder or the Hugging Face Hub.

Each is imported when it is first used.
"""

from typing import TYPE_CHECKING

from stec.lazy import lazily

__version__ = "0.1.0"

_MODULES = {
    "Batch": "batch",
    "Commands": "commands",
    "Encoder": "encoder",
    "InverseModel": "heads",
    "Model": "model",
    "Objective": "objective",
    "Policy": "commands",
    "Projection": "heads",
    "UserError": "errors",
    "Weights": "objective",
    "draw": "commands",
    "inverse_loss": "objective",
    "load_encoder": "pretrained",
    "nt_xent": "objective",
    "relative_windows": "geometry",
}

if TYPE_CHECKING:
    from stec.batch import Batch as Batch
    from stec.commands import Commands as Commands
    from stec.commands import Policy as Policy
    from stec.commands import draw as draw
    from stec.encoder import Encoder as Encoder
    from stec.errors import UserError as UserError
    from stec.geometry import relative_windows as relative_windows
    from stec.heads import InverseModel as InverseModel
    from stec.heads import Projection as Projection
    from stec.model import Model as Model
    from stec.objective import Objective as Objective
    from stec.objective import Weights as Weights
    from stec.objective import inverse_loss as inverse_loss
    from stec.objective import nt_xent as nt_xent
    from stec.pretrained import load_encoder as load_encoder
else:
    __getattr__, __dir__ = lazily(__name__, _MODULES)
