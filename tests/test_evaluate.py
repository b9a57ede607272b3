"""Measures of features against scikit-learn and NumPy, and ``launch.py eval`` as a user starts it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import launch
from pipelines.batch import PlainBatch
from pipelines.commands import Policy
from pipelines.datasets import demo
from stec.cli.evaluate import EvalConfig, pair_policy
from stec.config import ModelSettings
from stec.evaluation.evaluate import (
    MEASURES,
    Features,
    class_balanced,
    evaluate,
    knn_votes,
    linear_probing_logits,
    score,
)
from stec.models.encoder import Encoder
from stec.models.model import Model
from stec.weights.export import to_official_names
from stec.weights.pretrained import read_trained
from tests.conftest import smooth_image
from tests.runs import SMALL_DEMO, together
from tests.test_embed import write_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clusters() -> tuple[Features, Features]:
    """300 and 200 features of 12 numbers in 7 overlapping classes."""
    rng = np.random.default_rng(0)
    centers = rng.normal(0, 1, (7, 12))
    made = []
    for count in (300, 200):
        labels = rng.integers(0, 7, count)
        values = (centers[labels] + rng.normal(0, 1.5, (count, 12))) * rng.uniform(0.5, 3, 12) + 5
        made.append(Features(features=torch.from_numpy(values).float(), labels=torch.from_numpy(labels)))
    return made[0], made[1]


def test_the_linear_probing_is_scikit_learns_logistic_regression(clusters: tuple[Features, Features]) -> None:
    """Whose penalty is that of a sum over the images, not of a mean."""
    bank, queries = clusters
    scaler = StandardScaler().fit(bank.features.numpy())
    theirs = LogisticRegression(C=1 / (2e-4 * len(bank.labels)), max_iter=5000, tol=1e-8)
    theirs.fit(scaler.transform(bank.features.numpy()), bank.labels.numpy())
    expected = theirs.predict_proba(scaler.transform(queries.features.numpy()))
    ours = linear_probing_logits(bank, queries, 7, CPU).softmax(1).numpy()
    np.testing.assert_allclose(ours, expected, atol=5e-3)
    assert 0.4 < (ours.argmax(1) == queries.labels.numpy()).mean() < 0.9


def test_neighbors_are_scikit_learns(clusters: tuple[Features, Features]) -> None:
    bank, queries = clusters
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    theirs.fit(bank.features.double().numpy(), bank.labels.numpy())
    expected = theirs.predict_proba(queries.features.double().numpy())
    votes = knn_votes(bank, queries, 7, CPU)
    np.testing.assert_allclose((votes / votes.sum(1, keepdim=True)).numpy(), expected, atol=1e-4)
    few = knn_votes(bank[torch.arange(5)], queries, 7, CPU)
    assert ((few > 0).sum(1) <= 5).all()


def test_scores_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 1, (50, 8)).astype(np.float32), rng.integers(0, 7, 50)
    right: list[bool] = []
    right5: list[bool] = []
    by_class: list[list[bool]] = [[] for _ in range(8)]
    loss = 0.0
    for row, label in zip(logits.astype(float), labels, strict=True):
        order = sorted(range(8), key=lambda k: -row[k])
        right.append(order[0] == label)
        right5.append(label in order[:5])
        by_class[label].append(order[0] == label)
        loss -= (row[label] - np.log(np.exp(row).sum())) / len(labels)
    found = score(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.accuracy == pytest.approx(np.mean(right)) and found.top5_accuracy == pytest.approx(np.mean(right5))
    assert found.class_accuracies == [pytest.approx(np.mean(k)) if k else None for k in by_class]
    assert found.class_accuracies[7] is None
    assert found.loss == pytest.approx(loss, abs=1e-6)


def test_fractions_are_balanced_nested_and_repeatable() -> None:
    labels = np.repeat([0, 1, 2, 4], [400, 300, 290, 10])
    shuffled = np.random.default_rng(0).permutation(labels)
    tenth, hundredth = (class_balanced(shuffled, fraction, 3) for fraction in (0.1, 0.01))
    assert np.bincount(shuffled[tenth]).tolist() == [25, 25, 25, 0, 10]
    assert np.bincount(shuffled[hundredth]).tolist() == [2, 2, 2, 0, 2]
    assert set(hundredth) < set(tenth) and (np.diff(tenth) > 0).all()
    np.testing.assert_array_equal(tenth, class_balanced(shuffled, 0.1, 3))
    assert set(tenth) != set(class_balanced(shuffled, 0.1, 4))
    assert len(class_balanced(shuffled, 1e-6, 3)) == 4, "one of each class"


class Counting:
    """Random images, each of which is counted when it is asked for."""

    batch_size = 16

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        self.labels = np.arange(count) % 4
        self.asked = np.zeros(count, int)
        self.factors = {"mean": self.images.mean((1, 2, 3)).numpy(), "constant": np.zeros(count, np.float32)}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, *stretches: NDArray[np.int64]) -> Iterator[PlainBatch]:
        for ids in (stretch[k : k + 16] for stretch in stretches for k in range(0, len(stretch), 16)):
            self.asked[ids] += 1
            yield PlainBatch(images=self.images[ids], labels=torch.from_numpy(self.labels[ids]))


def test_each_image_passes_the_encoder_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all measures together; where there are many labeled images, only those that some measure needs."""
    encoder, accelerator = Encoder("resnet18", "cifar", 4), Accelerator(cpu=True)
    for limit in (1000, 50):
        monkeypatch.setattr("stec.evaluation.evaluate.MAX_LABELED", limit)
        labeled, test = Counting(200), Counting(40)
        arguments: dict[str, Any] = {"labeled": labeled, "test": test, "classes": 4, "accelerator": accelerator}
        evaluation = evaluate(encoder, torch.nn.Linear(32, 4), measures=MEASURES, **arguments)
        scores = evaluation.scores
        assert list(scores) == [
            "online_classifier",
            "linear_probing",
            "linear_probing_10_percent",
            "linear_probing_1_percent",
            "knn20",
        ]
        assert [of.labeled_images for of in scores.values()] == [None, min(limit, 200), 20, 4, min(limit, 200)]
        assert (test.asked == 1).all() and labeled.asked.max() == 1
        assert labeled.asked.sum() == (
            200 if limit == 1000 else len({*range(0, 200, 4), *class_balanced(labeled.labels, 0.1, 0)})
        )
        assert list(evaluation.factors) == ["mean"], "what does not vary is omitted"
        assert evaluation.rankme is not None and 1 < evaluation.rankme < 32
        alone = evaluate(encoder, None, measures=("knn",), **arguments)
        assert alone.scores["knn20"] == scores["knn20"] and alone.rankme is None and not alone.factors


def test_each_score_is_of_the_measure_that_it_is_called_by() -> None:
    encoder, accelerator = Encoder("resnet18", "cifar", 4).eval(), Accelerator(cpu=True)
    labeled, test = Counting(200), Counting(40)
    scores = evaluate(
        encoder,
        None,
        labeled=labeled,
        test=test,
        classes=4,
        measures=("linear_probing", "knn"),
        accelerator=accelerator,
    ).scores
    with torch.no_grad():
        bank, queries = (
            Features(features=encoder(images.images), labels=torch.from_numpy(images.labels))
            for images in (labeled, test)
        )
    expected = {
        "linear_probing": score(linear_probing_logits(bank, queries, 4, CPU), queries.labels),
        "knn20": score(knn_votes(bank, queries, 4, CPU), queries.labels),
    }
    assert {name: of.class_accuracies for name, of in scores.items()} == {
        name: of.class_accuracies for name, of in expected.items()
    }
    assert expected["knn20"].class_accuracies != expected["linear_probing"].class_accuracies
    assert scores["knn20"].loss is None, "votes are no probabilities"
    assert scores["linear_probing"].loss == pytest.approx(expected["linear_probing"].loss, rel=1e-3)


# --- The command ---


@pytest.fixture(autouse=True)
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in SMALL_DEMO.items():
        monkeypatch.setitem(demo.IMAGES, split, count)


COMMANDS = ("x scale", "x shift", "y scale", "y shift", "brightness", "contrast", "saturation", "hue", "gray")
"""The entries that the policy of the demo set varies."""
EVAL = "eval --dataset demo --num_workers 1 --batch_size 24 --ckpt_path".split()


def test_all_measures_on_one_process_and_on_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.safetensors"
    write_weights(weights, stem="cifar", trained_on="demo", width=4)
    arguments = [*EVAL, str(weights), "--json"]
    processes = together(2, *arguments, tmp_path / "2.json")
    assert launch.main([*arguments, str(tmp_path / "1.json")]) == 0
    output = capsys.readouterr().out
    for process in processes:
        process.end()
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert list(one["measures"]) == [
        "online_classifier",
        "linear_probing",
        "linear_probing_10_percent",
        "linear_probing_1_percent",
        "knn20",
        "rankme",
        "parameters",
    ]
    for name, expected in one["measures"].items():
        found = two["measures"][name]
        for value in {"accuracy", "class_accuracies", "policy"} & expected.keys():
            assert found[value] == expected[value]
    assert two["measures"]["rankme"]["rankme"] == pytest.approx(one["measures"]["rankme"]["rankme"], rel=1e-5)
    for kind, names in (("commands", COMMANDS), ("factors", demo.FACTORS)):
        assert tuple(one["measures"]["parameters"][kind]) == tuple(two["measures"]["parameters"][kind]) == names
        for name in names:
            values = (results["measures"]["parameters"][kind][name] for results in (one, two))
            assert next(values) == pytest.approx(next(values), abs=1e-3)
    classifier = one["measures"]["online_classifier"]
    assert output.splitlines()[-1] == f"accuracy {classifier['accuracy']:.4f}" == f"accuracy {one['accuracy']:.4f}"
    assert list(classifier["class_accuracies"]) == list(demo.CLASSES)
    for shown in (
        "linear probing",
        "low-shot 10 %",
        "kNN, k 20",
        "hourglass",
        f"{one['measures']['knn20']['accuracy']:.1%}",
    ):
        assert shown in output


def test_an_encoder_is_evaluated_on_another_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its own first layers and without its online linear classifier, whose classes, though as many, are others."""
    weights = tmp_path / "weights.safetensors"
    write_weights(weights, stem="stl10", trained_on="stl10", width=4)
    assert launch.main([*EVAL, str(weights), "--json", str(tmp_path / "out.json")]) == 0
    output = capsys.readouterr().out
    assert "Not measured: online_classifier." in output and "was trained on stl10" in output
    measured = json.loads((tmp_path / "out.json").read_text())
    assert list(measured["measures"]) == [
        "linear_probing",
        "linear_probing_10_percent",
        "linear_probing_1_percent",
        "knn20",
        "rankme",
        "parameters",
    ]
    assert measured["trained_on"] == "stl10" and "accuracy" not in measured
    assert launch.main([*EVAL, str(weights), "--measures", "online_classifier", "knn"]) == 2
    assert "online_classifier cannot be measured: The online linear classifier of" in capsys.readouterr().err
    assert launch.main([*EVAL, str(weights), "--trained_on", "demo"]) == 2
    assert "encoder.conv1.weight is (4, 3, 7, 7) instead of (4, 3, 3, 3)" in capsys.readouterr().err


def test_a_runs_folder_and_an_official_checkpoint_need_no_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is that of a finished run; what flags say of the encoder must be true."""
    folder, official = tmp_path / "run", tmp_path / "official.ckpt"
    folder.mkdir()
    (folder / "starts.jsonl").write_text("{}\n")
    write_weights(folder / "model.safetensors", stem="cifar", trained_on="demo", width=4)
    classifier = ["--measures", "online_classifier"]
    assert launch.main([*EVAL, str(folder), *classifier]) == 2
    assert "is not finished: it has no results.json yet" in capsys.readouterr().err
    (folder / "results.json").write_text("{}")
    model = Model(ModelSettings(arch="resnet50", width=8, hidden_mlp=4, feat_dim=4), stem="cifar", classes=10)
    torch.save({"state_dict": to_official_names(model.state_dict())}, official)
    for path, flags, wrong, truth in (
        (folder, ["--arch", "resnet18"], ["--width", "5"], "does not match --width 5: it is a resnet18 of width 4"),
        (official, [], ["--arch", "resnet18"], "does not match --arch resnet18: it is a resnet50 of width 8"),
    ):
        assert launch.main([*EVAL, str(path), *classifier, *flags]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("accuracy ")
        assert launch.main([*EVAL, str(path), *classifier, *wrong]) == 2
        assert truth in capsys.readouterr().err


def test_the_probe_needs_the_test_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for n in range(30):
        file = tmp_path / "data" / "val" / f"class {n % 10}" / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_image(50, 60, seed=n)).save(file)
    weights = tmp_path / "weights.safetensors"
    write_weights(weights, stem="imagenet", trained_on="imagenet", width=4)
    arguments = [
        *EVAL,
        str(weights),
        "--dataset",
        "imagenet",
        "--data_dir",
        str(tmp_path / "data"),
        "--view_size",
        "32",
    ]
    assert launch.main(arguments) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-1].startswith("accuracy ") and "Not measured: knn." in output
    assert launch.main([*arguments, "--measures", "knn"]) == 2
    assert "knn cannot be measured: --data_dir" in capsys.readouterr().err

    (tmp_path / "data" / "train" / "another").mkdir(parents=True)
    Image.fromarray(smooth_image(50, 60, seed=1)).save(tmp_path / "data" / "train" / "another" / "1.png")
    assert launch.main(arguments) == 2
    assert "have other classes than the labeled ones" in capsys.readouterr().err


def test_images_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their rank and the commands of their views are measured, those that the policy varies; all else needs labels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for n in range(40):
        Image.fromarray(smooth_image(50, 60, seed=n)).save(tmp_path / "data" / f"{n}.png")
    weights = tmp_path / "weights.safetensors"
    write_weights(weights, stem="imagenet", trained_on="imagenet", width=4)
    arguments = [*EVAL, str(weights), "--dataset", "folder", "--data_dir", str(tmp_path / "data"), "--view_size", "32"]
    assert launch.main([*arguments, "--json", str(tmp_path / "1.json")]) == 0
    output = capsys.readouterr().out
    assert "the 40 images of folder" in output and "Not measured: knn. --dataset folder has no labels" in output
    measured = json.loads((tmp_path / "1.json").read_text())["measures"]
    assert list(measured) == ["rankme", "parameters"] and 1 <= measured["rankme"]["rankme"] <= 32
    found = measured["parameters"]
    assert found["policy"]["size"] == 32 and found["policy"]["p_blur"] == 0.5 and not found["factors"]
    assert "blur" in found["commands"] and not {"x shear", "y shear"} & found["commands"].keys()

    assert launch.main([*arguments, "--json", str(tmp_path / "2.json")]) == 0
    assert (tmp_path / "2.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    assert launch.main([*arguments, "--measures", "knn"]) == 2
    assert "knn cannot be measured: --dataset folder has no labels" in capsys.readouterr().err


def test_views_are_those_of_the_training(tmp_path: Path) -> None:
    """The policy in the weights' metadata, or that of the data set's recipes, at the size that is asked for."""
    write_weights(tmp_path / "w.safetensors", stem="cifar", trained_on="demo", width=4)
    trained = read_trained(tmp_path / "w.safetensors")
    trained.metadata["config"] |= {"view_size": 16, "p_grayscale": 0.0, "use_gaussian_blur": 1, "unheard_of": 3}

    def policy(*flags: Any) -> Policy:
        return pair_policy(EvalConfig(ckpt_path=Path("w"), **dict(zip(flags[::2], flags[1::2]))), trained, "demo")

    assert policy("dataset", "demo") == Policy(size=16, jitter_strength=1.0, p_grayscale=0, p_blur=0.5)
    assert policy("dataset", "cifar10") == Policy(size=32, jitter_strength=0.5, p_grayscale=0, p_blur=0.5)
    assert policy("dataset", "demo", "view_size", 24).size == 24
    trained.metadata["config"] = {}
    assert policy("dataset", "stl10") == Policy(size=96, jitter_strength=1.0, p_blur=0.5, p_solarize=0.2)
