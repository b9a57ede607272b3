"""Weights from elsewhere: official checkpoints, hostile files, files that do not fit."""

from __future__ import annotations

import collections
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import launch
from pipelines.errors import UserError
from stec.config import ModelSettings
from stec.models.model import Model
from stec.weights.export import from_official_names, load_weights, read_weights, to_official_names, write_safetensors


def small_model(classes: int = 10, **changes: Any) -> Model:
    torch.manual_seed(0)
    return Model(ModelSettings(width=4, feat_dim=8, **changes), stem="cifar", classes=classes)


@pytest.fixture
def lightning(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for PyTorch Lightning while a file is written; gone when it is read."""
    module = types.ModuleType("pytorch_lightning")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning"})  # type: ignore[attr-defined]
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    return module


def official_checkpoint(state: dict[str, Tensor], lightning: types.ModuleType) -> dict[str, object]:
    """What Lightning 1.5 stores: hyper-parameters in a class of its own, callbacks under their class."""
    hyper_parameters = lightning.AttributeDict(arch="resnet18", temperature=0.5)
    hyper_parameters["callback"] = lightning.ModelCheckpoint()
    return {
        "epoch": 999,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": collections.OrderedDict(state),
        "callbacks": {lightning.ModelCheckpoint: {"best_model_score": torch.tensor(1.5), "dirpath": "/x"}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}}],
        "hyper_parameters": hyper_parameters,
    }


def test_official_checkpoints_are_read_without_lightning(
    tmp_path: Path, lightning: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    state = {**to_official_names(model.state_dict()), "encoder.fc.weight": torch.zeros(1000, 32)}
    torch.save(official_checkpoint(state, lightning), tmp_path / "official.ckpt")
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    weights = read_weights(tmp_path / "official.ckpt")
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor)


@pytest.mark.parametrize("where", ["state_dict", "hyper_parameters"])
def test_a_file_that_wants_something_called_is_refused(
    where: str, tmp_path: Path, lightning: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {tmp_path / 'executed'}",))

    checkpoint = official_checkpoint(to_official_names(small_model().state_dict()), lightning)
    checkpoint[where] = {"trap": Hostile()}
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    assert launch.main(["import", str(tmp_path / "hostile.ckpt"), str(tmp_path / "out.safetensors")]) == 2
    output = capsys.readouterr().err
    assert "requests a call of posix.system" in output and "Traceback" not in output
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("call", [eval, getattr, __import__, torch.load])
def test_no_other_callable_is_called(call: object, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (call, ("1",))

    torch.save({"state_dict": {"encoder.conv1.weight": Hostile()}}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match=r"requests a call of .*"):
        read_weights(tmp_path / "hostile.ckpt")


def test_torchscript_archives_are_refused_unexecuted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """torch.load would run their code."""

    class Scripted(torch.nn.Module):
        @torch.jit.export
        def __getstate__(self) -> int:
            return 1

        @torch.jit.export
        def __setstate__(self, state: int) -> None:
            print("executed")
            self.training = False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Scripted()).save(str(tmp_path / "script.ckpt"))
    capfd.readouterr()
    with pytest.raises(UserError, match="TorchScript archive"):
        read_weights(tmp_path / "script.ckpt")
    assert "executed" not in capfd.readouterr().out


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    torch.save({"state_dict": small_model().state_dict()}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    cases = {
        "truncated.ckpt": (whole[: len(whole) // 2], "is damaged or not a PyTorch checkpoint"),
        "empty.ckpt": (b"", "is damaged or not a PyTorch checkpoint"),
        "text.ckpt": (b"hello, this is text\n" * 50, "is damaged or not a PyTorch checkpoint"),
        "broken.safetensors": (b"\x08\0\0\0\0\0\0\0{}      ", "holds no encoder"),
        "text.safetensors": (b"hello", "is damaged or not a safetensors file"),
    }
    for name, (content, sentence) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            read_weights(tmp_path / name)
    with pytest.raises(UserError, match="There is no file"):
        read_weights(tmp_path / "absent.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds no encoder"):
        read_weights(tmp_path / "other.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match="holds a list"):
        read_weights(tmp_path / "list.ckpt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["encoder.conv1.weight", "encoder.bn1.running_var", "classifier.bias"])
def test_weights_that_are_not_finite_are_refused(value: float, name: str, tmp_path: Path) -> None:
    state = small_model().state_dict()
    state[name].view(-1)[-1] = value
    files = [tmp_path / "x.safetensors", tmp_path / "x.pt", tmp_path / "official.ckpt"]
    write_safetensors(state, files[0], {})
    torch.save({"state_dict": state}, files[1])
    torch.save({"state_dict": to_official_names(state)}, files[2])
    for file in files:
        with pytest.raises(UserError, match=f"{name}"):
            read_weights(file)


@pytest.mark.parametrize("command", ["eval", "embed", "export", "import", "train"])
def test_no_command_takes_weights_that_are_not_finite(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = small_model().state_dict()
    state["encoder.layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    weights = tmp_path / "x.safetensors"
    write_safetensors(state, weights, {})
    arguments: dict[str, list[str | Path]] = {
        "eval": ["--dataset", "demo", "--ckpt_path", weights],
        "embed": [tmp_path / "out.npy", "--dataset", "demo", "--ckpt_path", weights],
        "export": [weights, tmp_path / "out.safetensors", "--format", "full"],
        "import": [weights, tmp_path / "out.safetensors"],
        "train": ["--width", "4", "--limit_train", "256", "--ckpt_path", weights, "--results_path", tmp_path / "run"],
    }
    assert launch.main([command, *map(str, arguments[command])]) == 2
    assert "encoder.layer1.0.conv1.weight" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [weights]


def test_what_does_not_fit_is_listed() -> None:
    state, path = small_model().state_dict(), Path("x.ckpt")
    with pytest.raises(UserError, match=r"classifier.weight is \(10, 32\) instead of \(100, 32\)"):
        load_weights(small_model(classes=100), state, path, required=("encoder",))
    with pytest.raises(UserError, match=r"bn3.bias is missing.*and \d+ more"):
        load_weights(small_model(arch="resnet50"), state, path, required=("encoder",))
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    with pytest.raises(UserError, match="it has no classifier"):
        load_weights(small_model(), encoder, path, required=("encoder", "classifier"))


def test_encoder_files_load_as_the_encoder_alone(tmp_path: Path) -> None:
    trained, model = small_model(), small_model()
    torch.nn.init.normal_(trained.encoder.conv1.weight)
    write_safetensors(trained.encoder.state_dict(), tmp_path / "encoder.safetensors", {})
    classifier = model.classifier.weight.clone()
    parts = load_weights(model, read_weights(tmp_path / "encoder.safetensors"), tmp_path, required=("encoder",))
    assert parts == ["encoder"]
    assert torch.equal(model.encoder.conv1.weight, trained.encoder.conv1.weight)
    assert torch.equal(model.classifier.weight, classifier)


def test_import_writes_our_names(tmp_path: Path, lightning: types.ModuleType) -> None:
    state = to_official_names(small_model().state_dict())
    torch.save(official_checkpoint(state, lightning), tmp_path / "official.ckpt")
    assert launch.main(["import", str(tmp_path / "official.ckpt"), str(tmp_path / "ours.safetensors")]) == 0
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == from_official_names(state).keys()


def test_import_tells_wrong_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": small_model().state_dict()}, tmp_path / "c.ckpt")
    assert launch.main(["import", str(tmp_path / "c.ckpt"), str(tmp_path / "c.pt")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert launch.main(["import", str(tmp_path / "c.ckpt"), str(tmp_path / "no" / "c.safetensors")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_private_functions_of_torch_in_use() -> None:
    """``inert_pickle`` names functions that torch keeps private; without them no checkpoint could be read safely."""
    tensor = torch.arange(6.0)
    storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
    rebuilt = torch._utils._rebuild_tensor_v2(storage, 2, (2, 2), (2, 1), False, None)
    assert rebuilt.tolist() == [[2, 3], [4, 5]]
    assert isinstance(torch._utils._rebuild_parameter(tensor, True, None), torch.nn.Parameter)
    assert hasattr(torch._C.PyTorchFileReader, "get_all_records")
