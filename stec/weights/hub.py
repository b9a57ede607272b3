"""The encoder as a model of the Hugging Face Hub, with its model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.datasets.registry import DATA_SETS
from pipelines.errors import UserError
from stec.architectures import TIMM
from stec.config import BASE_TITLES, TrainConfig, with_settings
from stec.models.encoder import Encoder, ImageEncoder, Stem
from stec.models.preprocessing import Preprocessing
from stec.models.timm_encoder import TimmEncoder
from stec.normalization import NORMALIZATIONS, Normalization
from stec.recipes import RECIPES, flags
from stec.runs.run_folder import RESULTS
from stec.weights.export import write_safetensors
from stec.weights.pretrained import WEIGHTS, Trained

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
except ImportError as error:
    raise UserError(
        "The Hugging Face Hub needs the package huggingface_hub; run pip install -e '.[export]'."
    ) from error

CARD = """\
# {name}

An image encoder: {network}. It takes RGB images [N, 3, H, W] in [0, 1], {normalization},
and gives features [N, {feature_dim}].{view_size} {method}

{preprocessing}

## Load it

{loading}
## Training

{training}
## Results

{results}"""
"""The text of a card after its YAML."""


def hub_encoder(trained: Trained, metadata: dict[str, Any]) -> HubEncoder | HubTimmEncoder:
    """An encoder for the Hub that shares the tensors of a trained one."""
    encoder: HubEncoder | HubTimmEncoder
    if isinstance(trained.encoder, TimmEncoder):
        assert trained.view_size_px is not None
        with torch.random.fork_rng(devices=[]):
            encoder = HubTimmEncoder(trained.arch, trained.view_size_px, metadata)
    else:
        assert trained.stem is not None and trained.width is not None
        with torch.device("meta"):
            encoder = HubEncoder(trained.arch, trained.stem, trained.width, metadata)
    encoder.load_state_dict(trained.encoder.state_dict(), assign=True)
    return encoder


class _OnTheHub(ImageEncoder, PyTorchModelHubMixin):
    """What ``save_pretrained`` and ``push_to_hub`` write of an encoder: its weights with metadata, and its card."""

    metadata: dict[str, Any]
    """As returned by ``stec.weights.formats.describe``."""

    def _describe(self, metadata: dict[str, Any] | None) -> None:
        self.metadata = metadata or {}
        if "preprocessing" in self.metadata:
            self.preprocessing = Preprocessing.from_json(self.metadata["preprocessing"])
        self.eval()  # older mixins load into training mode

    def _save_pretrained(self, save_directory: Path) -> None:
        """As the mixin does, with metadata in the file, so that it can be loaded without its folder."""
        write_safetensors(self.state_dict(), save_directory / WEIGHTS, self.metadata)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of the folder."""
        config = self.metadata.get("config", {})
        encoder = self.metadata.get("encoder", {})
        results = self.metadata.get("results", {})
        data_set = config.get("dataset")
        hub_name = DATA_SETS[data_set].hub_name if data_set in DATA_SETS else None
        method, how = _method(config)
        if self.metadata.get("weights") == "target":
            how += " This is its target network, the moving average of the encoder that was trained."
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
            network=f"{encoder['arch']}, width {encoder['width']}, {encoder['stem']} stem"
            if "stem" in encoder
            else f"the network {encoder['arch'].removeprefix(TIMM)} of timm",
            feature_dim=encoder["feature_dim"],
            view_size=f" It was trained on views of {encoder['view_size_px']} px." if encoder["view_size_px"] else "",
            method=how,
            normalization="from which no mean is subtracted"
            if self.normalize == "none"
            else f"which its first operation normalizes as {self.normalize}",
            preprocessing=_preprocessing(self.preprocessing),
            loading=_loading(encoder, self),
            training=_training(self.metadata),
            results=_table(
                ["accuracy on the test images", ""], [[title, f"{measured[title]:.4f}"] for title in measured]
            )
            if measured
            else "Unknown.\n",
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


class HubEncoder(
    Encoder,
    _OnTheHub,
    library_name="stec",
    pipeline_tag="image-feature-extraction",
    tags=["self-supervised-learning", "image-feature-extraction", "resnet"],
):
    """An ``Encoder`` for ``save_pretrained`` and ``push_to_hub``, with its card."""

    def __init__(self, arch: str, stem: Stem, width: int = 64, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(arch, stem, width, _normalization(metadata))
        self._describe(metadata)


class HubTimmEncoder(
    TimmEncoder,
    _OnTheHub,
    library_name="stec",
    pipeline_tag="image-feature-extraction",
    tags=["self-supervised-learning", "image-feature-extraction", "timm"],
):
    """A ``TimmEncoder`` for ``save_pretrained`` and ``push_to_hub``, with its card."""

    def __init__(self, arch: str, view_size_px: int, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(arch, view_size_px, _normalization(metadata))
        self._describe(metadata)


def _normalization(metadata: Mapping[str, Any] | None) -> Normalization:
    name: Normalization = (metadata or {}).get("encoder", {}).get("normalize", "none")
    return name


def _method(config: Mapping[str, Any]) -> tuple[str, str]:
    """The name of the method (empty if unknown) and a sentence about it."""
    if not config:
        return "", "Its training is unknown."
    if config.get("stop_gradient") == 2:
        return (
            "",
            f"Its weights are those of {config.get('ckpt_path') or 'timm'}, on which an online linear classifier was "
            f"trained.",
        )
    with_labels = ", and by the labels" if config.get("stop_gradient") == 0 else ""
    base = BASE_TITLES[config.get("objective", "simclr")]
    if not config.get("manip_lambda"):
        return base, f"It was trained by {base}{with_labels}."
    return "S-TEC" if base == "SimCLR" else f"S-TEC with {base}", (
        f'It was trained by S-TEC ("Self-supervised Learning Through Efference Copies", Scherr, Guo, Moraitis, NeurIPS '
        f"2022): {base} plus an inverse model that recovers the command between two views{with_labels}."
    )


def _preprocessing(preprocessing: Preprocessing | None) -> str:
    """Sentences about the images of evaluation."""
    if preprocessing is None:
        return "The size of its images is unknown."
    return (
        f"For evaluation, the shorter side of an image is resized to {preprocessing.resize_px} px and the center of "
        f"{preprocessing.size_px} px is cropped; `encoder.transform` of this project's code does both."
    )


def _loading(encoder: Mapping[str, Any], module: ImageEncoder) -> str:
    """Python that loads ``model.safetensors`` with torchvision or timm, if possible, and with this project."""
    ours = "With this project's code: `encoder = stec.load_encoder(FOLDER)`, or the model's `owner/name` on the Hub.\n"
    values, normalize = NORMALIZATIONS[encoder.get("normalize", "none")], ""
    if values is not None:
        normalize = f"model = torch.nn.Sequential(torchvision.transforms.Normalize(*{values}), model)\n"
    if isinstance(module, TimmEncoder):
        size = ""
        if (fixed_size_px := module.fixed_size_px) is not None:
            size = f", img_size={fixed_size_px}"
            if module.preprocessing is not None and module.preprocessing.size_px != fixed_size_px:
                normalize += (
                    f"resize = torchvision.transforms.Resize(({fixed_size_px}, {fixed_size_px}))\n"
                    "model = torch.nn.Sequential(resize, model)\n"
                )
        return (
            "With timm alone:\n\n```python\n"
            "import timm\nimport torch\nimport torchvision\nfrom safetensors.torch import load_file\n\n"
            f'model = timm.create_model("{encoder["arch"].removeprefix(TIMM)}", num_classes=0{size})\n'
            'state = load_file("model.safetensors")\n'
            'model.load_state_dict({name.removeprefix("network."): tensor for name, tensor in state.items()})\n'
            f"{normalize}model.eval()\n```\n\n" + ours
        )
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
        f'model.load_state_dict(load_file("model.safetensors"))\n{normalize}model.eval()\n```\n\n' + ours
    )


def _training(metadata: Mapping[str, Any]) -> str:
    """The recipe, the data and the versions, as far as known."""
    config, environment = metadata.get("config", {}), metadata.get("environment", {})
    if not config:
        return "Unknown.\n"
    settings = with_settings(TrainConfig(), config, "The configuration")
    recipe = next((name for name, make in RECIPES.items() if make().identity() == settings.identity()), None)
    command = f"--recipe {recipe}" if recipe else flags(settings)
    rows = [["settings", f"`{command}`"]]
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
    """Download a file of a model on the Hub, or take it from the cache. Raises UserError if that fails."""
    here = f"There is no file or folder {repo_id} here, and"
    try:
        return Path(hf_hub_download(repo_id, name))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{here} there is no such model on the Hugging Face Hub; correct the name, or, if it is private, run hf "
            f"auth login."
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{here} the Hugging Face Hub cannot be reached; correct the path, or connect to the network "
            f"(HF_HUB_OFFLINE must not be set)."
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"{here} the model on the Hugging Face Hub has no {name}; choose another one.") from error
    except Exception as error:  # downloads raise exceptions without a common base
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"{here} it could not be downloaded from the Hugging Face Hub ({reason}); try again."
        ) from error
