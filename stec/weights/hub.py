"""The encoder as a model of the Hugging Face Hub, with its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.datasets.registry import DATA_SETS
from pipelines.errors import UserError
from stec.config import TrainConfig, with_settings
from stec.models.encoder import Encoder, Stem
from stec.recipes import RECIPES, flags
from stec.runs.run_folder import RESULTS
from stec.weights.export import write_safetensors
from stec.weights.pretrained import WEIGHTS, Trained

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
except ImportError as error:
    raise UserError(
        "The Hugging Face Hub needs the package huggingface_hub; install it by pip install -e '.[export]'."
    ) from error

CARD = """\
# {name}

An image encoder: {arch}, width {width}, {stem} stem. It takes RGB images [N, 3, H, W] in [0, 1], from which no mean is
subtracted, and gives features [N, {feature_dim}].{view_size} {method}

## Load it

{loading}
## Training

{training}
## Results

{results}"""
"""What follows a card's YAML."""


class HubEncoder(
    Encoder,
    PyTorchModelHubMixin,
    library_name="stec",
    pipeline_tag="image-feature-extraction",
    tags=["self-supervised-learning", "image-feature-extraction", "resnet"],
):
    """An ``Encoder`` that ``save_pretrained`` writes to a folder and ``push_to_hub`` to the Hub, with its card."""

    def __init__(self, arch: str, stem: Stem, width: int = 64, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(arch, stem, width)
        self.metadata = metadata or {}
        """As ``stec.weights.formats.describe`` makes it."""
        self.eval()  # older mixins leave what they load in training mode

    @classmethod
    def of(cls, trained: Trained, metadata: dict[str, Any]) -> HubEncoder:
        """A trained encoder, whose tensors it shares."""
        with torch.device("meta"):
            encoder = cls(trained.arch, trained.stem, trained.width, metadata)
        encoder.load_state_dict(trained.encoder.state_dict(), assign=True)
        return encoder

    def _save_pretrained(self, save_directory: Path) -> None:
        """As the mixin does, with metadata in the file, so that it can be loaded without its folder, too."""
        write_safetensors(self.state_dict(), save_directory / WEIGHTS, self.metadata)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """What the README.md of the folder is, here as on the Hub."""
        config = self.metadata.get("config", {})
        encoder = self.metadata.get("encoder", {})
        results = self.metadata.get("results", {})
        data_set = config.get("dataset")
        hub_name = DATA_SETS[data_set].hub_name if data_set in DATA_SETS else None
        method, how = _method(config)
        model_name = " ".join(filter(None, [method, encoder["arch"], data_set]))
        measured = {title: results[f"{name}_after"] for name, title in RESULTS.items() if f"{name}_after" in results}
        data = ModelCardData(
            license=self.metadata["license"],
            library_name="stec",
            pipeline_tag="image-feature-extraction",
            tags=self._hub_mixin_info.model_card_data.tags,
            datasets=[hub_name] if hub_name else None,
            metrics=["accuracy"] if measured else None,
            model_name=model_name,
            eval_results=[
                EvalResult(
                    task_type="image-classification",
                    dataset_type=hub_name or data_set,
                    dataset_name=data_set,
                    metric_type="accuracy",
                    metric_name=title,
                    metric_value=value,
                )
                for title, value in measured.items()
            ]
            or None,
        )
        text = CARD.format(
            name=model_name,
            **{key: encoder[key] for key in ("arch", "width", "stem", "feature_dim")},
            view_size=f" It was trained on views of {encoder['view_size_px']} px." if encoder["view_size_px"] else "",
            method=how,
            loading=_loading(encoder),
            training=_training(self.metadata),
            results=_table(["share of the test images", ""], [[title, f"{measured[title]:.4f}"] for title in measured])
            if measured
            else "None are known.\n",
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _method(config: Mapping[str, Any]) -> tuple[str, str]:
    """What the method is called, empty where it is not known, and a sentence about it."""
    if not config:
        return "", "How it was trained is not known."
    if config.get("stop_gradient") == 2:
        return (
            "",
            f"Its weights are those of {config.get('ckpt_path')}, on which an online linear classifier was fitted.",
        )
    with_labels = ", and by the labels" if config.get("stop_gradient") == 0 else ""
    if not config.get("manip_lambda"):
        return "SimCLR", f"It was trained by SimCLR{with_labels}."
    return "S-TEC", (
        f'It was trained by S-TEC ("Self-supervised Learning Through Efference Copies", Scherr, Guo, Moraitis, NeurIPS '
        f"2022), which is SimCLR plus an inverse model that recovers the command between two views{with_labels}."
    )


def _loading(encoder: Mapping[str, Any]) -> str:
    """Python that loads ``model.safetensors``: by torchvision where that can, and by this project."""
    ours = "With this project's code: `encoder = stec.load_encoder(FOLDER)`, or the model's `owner/name` on the Hub.\n"
    if encoder["width"] != 64:
        return ours
    stem = {
        "imagenet": "",
        "stl10": "model.maxpool = torch.nn.Identity()\n",
        "cifar": "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)\n"
        "model.maxpool = torch.nn.Identity()\n",
    }[encoder["stem"]]
    return (
        "With torchvision alone:\n\n```python\n"
        "import torch\nimport torchvision\nfrom safetensors.torch import load_file\n\n"
        f"model = torchvision.models.{encoder['arch']}()\n{stem}model.fc = torch.nn.Identity()\n"
        'model.load_state_dict(load_file("model.safetensors"))\nmodel.eval()\n```\n\n' + ours
    )


def _training(metadata: Mapping[str, Any]) -> str:
    """The recipe, the data and the versions, as far as they are known."""
    config, environment = metadata.get("config", {}), metadata.get("environment", {})
    if not config:
        return "Nothing is known of it.\n"
    settings = with_settings(TrainConfig(), config, "The configuration")
    recipe = next((name for name, make in RECIPES.items() if make().identity() == settings.identity()), None)
    asked = f"--recipe {recipe}" if recipe else flags(settings)
    rows = [["settings", f"`{asked}`"]]
    if "step" in metadata:
        rows.append(["steps", str(metadata["step"])])
    rows.append(["data set", config["dataset"]])
    named = {
        "training_images": "training images",
        "data_fingerprint": "fingerprint of the training images",
        "stec": "stec",
        "torch": "PyTorch",
        "python": "Python",
    }
    rows += [[title, str(environment[key])] for key, title in named.items() if key in environment]
    return _table(["", ""], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def download(repo_id: str, name: str) -> Path:
    """A file of a model on the Hub, fetched or from the cache. Raises UserError where it cannot be had."""
    here = f"There is no file or folder {repo_id} here, and"
    try:
        return Path(hf_hub_download(repo_id, name))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{here} the Hugging Face Hub knows no model of that name; correct it, or, if it is private, log in by hf "
            f"auth login."
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{here} the Hugging Face Hub cannot be reached; mend the path, or connect to the network (HF_HUB_OFFLINE "
            f"must not be set)."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{here} the model of that name on the Hugging Face Hub has no {name}; name another."
        ) from error
    except Exception as error:  # a transfer can fail in any way
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"{here} it could not be fetched from the Hugging Face Hub ({reason}); try again.") from error
