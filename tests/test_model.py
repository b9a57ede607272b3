"""The encoder is torchvision's ResNet, and the heads are those of the method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision

from stec.config import ModelSettings
from stec.models import batch_norm
from stec.models.encoder import Encoder
from stec.models.heads import InverseModel, Projection
from stec.models.model import Model
from tests.precision import assert_as_exact, exact, images_for, one_step


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_imagenet_encoder_is_torchvisions(arch: str) -> None:
    """The state dict loads into torchvision's model, strictly but for fc, and gives the same features."""
    torch.manual_seed(0)
    ours = Encoder(arch, "imagenet")
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1, 0.1)
    theirs = torchvision.models.get_model(arch, weights=None)
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys
    theirs.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.double().eval()(images), theirs.double().eval()(images))


@pytest.mark.parametrize(("stem", "size", "stride"), [("cifar", 32, 1), ("stl10", 96, 2), ("imagenet", 96, 4)])
def test_stems_reduce_the_image(stem: str, size: int, stride: int) -> None:
    encoder = Encoder("resnet18", stem, width=4)
    shapes = []
    encoder.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert encoder(torch.rand(2, 3, size, size)).shape == (2, 32)
    assert shapes == [(2, 4, size // stride, size // stride)]


@pytest.mark.parametrize(("arch", "features"), [("resnet18", 8 * 12), ("resnet50", 8 * 12 * 4)])
def test_narrow_encoders_scale_every_stage(arch: str, features: int) -> None:
    encoder = Encoder(arch, "cifar", width=12)
    assert encoder.feature_dim == features
    assert [stage[-1].conv2.out_channels for stage in (encoder.layer1, encoder.layer4)] == [12, 96]
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, features)


def test_initial_weights() -> None:
    """Convolutions with variance 1 / fan-in; a bottleneck's last scale at 0, a basic block's at 1."""
    torch.manual_seed(0)
    weight = Encoder("resnet18", "cifar").layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx(1 / np.sqrt(512 * 9), rel=0.01)
    assert (Encoder("resnet50", "cifar", width=4).layer2[0].bn3.weight == 0).all()
    assert (Encoder("resnet18", "cifar", width=4).layer2[0].bn2.weight == 1).all()


def test_heads_give_unit_vectors_and_one_logit_per_bin() -> None:
    projection = Projection(16, 8, 5)
    z = projection(torch.randn(7, 16))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(7))
    assert not projection.bn_output.bias.requires_grad
    assert InverseModel(16, 8, n_bins=9)(torch.randn(7, 16), torch.randn(7, 16)).shape == (7, 9, 2, 3)


def small_model(**settings: int) -> Model:
    torch.manual_seed(0)
    return Model(ModelSettings(width=4, feat_dim=8), stem="cifar", classes=3, **settings)


def test_the_online_classifier_does_not_train_the_encoder() -> None:
    model = small_model()
    model(torch.rand(4, 2, 3, 32, 32)).class_logits.square().sum().backward()
    assert model.classifier.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def test_the_inverse_model_gets_i_then_j_and_trains_the_encoder() -> None:
    model = small_model().eval()
    views = torch.rand(4, 2, 3, 32, 32)
    logits = model(views).inverse["window"]
    h = model.encoder(views.flatten(0, 1)).view(4, 2, -1)
    torch.testing.assert_close(logits, model.inverse_models["window"](h[:, 0], h[:, 1]))
    assert not torch.allclose(logits, model(views.flip(1)).inverse["window"])
    logits.sum().backward()
    assert model.encoder.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("stop_gradient", [0, 1, 2])
def test_what_the_online_classifier_trains(stop_gradient: int) -> None:
    """With labeled views: the encoder as well (0), only itself (1), or there is nothing else to train (2)."""
    model = small_model(stop_gradient=stop_gradient)
    views, labeled_views = torch.rand(4, 2, 3, 32, 32), torch.rand(4, 1, 3, 32, 32)
    outputs = model(labeled_views) if stop_gradient == 2 else model(views, labeled_views)
    assert outputs.class_logits.shape == (4, 1, 3)
    outputs.class_logits.square().sum().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == ({"encoder", "classifier"} if stop_gradient == 0 else {"classifier"})
    with torch.no_grad():
        features = model.eval().encoder(labeled_views[:, 0])
        logits = model(*((labeled_views,) if stop_gradient == 2 else (views, labeled_views))).class_logits
        torch.testing.assert_close(logits[:, 0], model.classifier(features))


def test_all_batch_norms_have_the_base_class() -> None:
    """``_BatchNorm`` is not public: without it, ``stec.models.batch_norm`` must find batch norms in another way."""
    kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm, batch_norm.SyncBatchNorm)
    assert all(issubclass(kind, batch_norm._BatchNorm) for kind in kinds)
    model = small_model().train()
    with batch_norm.untracked(model):
        model(torch.rand(2, 2, 3, 32, 32))
    assert model.encoder.bn1.num_batches_tracked == model.projection.bn_hidden.num_batches_tracked == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_synchronized_batch_norm_is_pytorchs(compiled: bool) -> None:
    """In one process, in double precision, also as one compiled graph; several are in tests/test_processes.py."""
    torch.manual_seed(0)
    ours, theirs = (kind(3).double() for kind in (batch_norm.SyncBatchNorm, torch.nn.BatchNorm2d))
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    x = 2 + torch.randn(4, 3, 5, 6, dtype=torch.float64)
    results = []
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
        norm.bias.data.copy_(bias)
        leaf = x.clone().requires_grad_()
        run = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled and norm is ours else norm
        y = run(leaf)
        (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        results.append([y, leaf.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_simclr_has_no_inverse_model() -> None:
    model = small_model(with_inverse_model=False)
    assert model(torch.rand(4, 2, 3, 32, 32)).inverse == {}
    assert not [name for name in model.state_dict() if name.startswith("inverse_models")]


@pytest.mark.parametrize("width", [4, 16])
def test_the_encoder_compiles_as_one_graph(width: int) -> None:
    """Nothing in it falls back to Python (``--compile 1``), and features and gradients stay the same."""
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "cifar", width)
    images = images_for(encoder, 8, 16)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    plain, reference = one_step(encoder, images), one_step(exact(encoder), images)
    outcome = {name.removeprefix("_orig_mod."): value for name, value in one_step(compiled, images).items()}
    assert_as_exact(outcome, plain, reference)
