"""Images in Parquet files: read as pyarrow wrote them, and trained on as from files."""

from __future__ import annotations

import io
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from pipelines.datasets import images as images_module
from pipelines.datasets import row_groups
from pipelines.datasets.image_folders import splits_below
from pipelines.datasets.images import UNLABELED, ImageFiles
from pipelines.datasets.registry import open_data_set, open_split
from pipelines.errors import BadImage, UserError
from pipelines.sampler import Sampler
from pipelines.splits import read_split
from tests.conftest import smooth_image
from tests.runs import Run, SignalAtStep
from tests.test_faults import SMALL, TOTAL_STEPS, assert_same_outcome
from tests.test_pipelines import PLAIN_64, loader, take


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(seed: int, kind: str = "JPEG", height: int = 40, width: int = 56) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth_image(height, width, seed)).save(buffer, kind)
    return buffer.getvalue()


def write(file: Path, contents: Sequence[bytes | None], labels: Any = None, *, rows: int = 7, **columns: Any) -> Path:
    """A Parquet file as of the Hugging Face Hub, with so many rows in a row group."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": content, "path": f"{n}.jpg"} for n, content in enumerate(contents)]
    table = {"image": images, **columns}
    if labels is not None:
        table["label"] = labels
    parquet.write_table(pyarrow.table(table), file, row_group_size=rows)
    return file


CONTENTS = [encoded(n, "PNG" if n % 5 == 0 else "JPEG", 40 + n, 60) for n in range(40)]
LABELS = [n % 3 for n in range(40)]


@pytest.fixture
def train_and_val(tmp_path: Path) -> Path:
    """Two files of a split and one of another in one folder, as on the Hub."""
    folder = tmp_path / "data"
    write(folder / "train-00000-of-00002.parquet", CONTENTS[:25], LABELS[:25])
    write(folder / "train-00001-of-00002.parquet", CONTENTS[25:], LABELS[25:])
    write(folder / "validation-00000-of-00001.parquet", CONTENTS[:9], LABELS[:9])
    return folder


def assert_equal_to_files(images: ImageFiles, files: Sequence[Path]) -> None:
    """Compare with what pyarrow reads from the files as tables."""
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    assert len(images) == len(rows)
    for n, row in enumerate(rows):
        assert images.encoded(n).tobytes() == row["image"]["bytes"]
        assert images.labels[n] == row["label"]
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert tuple(images.sizes[n]) == (image.height, image.width)
            np.testing.assert_array_equal(np.asarray(images.open(n)), np.asarray(image.convert("RGB")))


def test_splits_of_the_hub_are_data_sets(train_and_val: Path) -> None:
    data_set = open_data_set("imagenet", train_and_val)
    assert isinstance(data_set.train, ImageFiles) and isinstance(data_set.test, ImageFiles)
    assert data_set.classes == ("0", "1", "2") and not data_set.notes
    assert_equal_to_files(data_set.train, sorted(train_and_val.glob("train-*")))
    assert_equal_to_files(data_set.test, sorted(train_and_val.glob("validation-*")))
    np.testing.assert_array_equal(data_set.train.shard_of[[0, 6, 7, 24, 25, 39]], [0, 0, 1, 3, 4, 6])
    names = {data_set.train.name(n) for n in range(40)}
    assert len(names) == 40, "lists of bad images identify images by name"
    restored = pickle.loads(pickle.dumps(data_set.train))
    assert restored.encoded(39).tobytes() == CONTENTS[39], "workers get a copy"
    assert open_split("imagenet", train_and_val, "test")[0].labels.tolist() == LABELS[:9]
    assert set(splits_below(train_and_val)) == {"train", "val"}


def test_folders_of_splits(train_and_val: Path) -> None:
    for split in ("train", "validation"):
        folder = train_and_val / {"validation": "val"}.get(split, split)
        folder.mkdir()
        for file in train_and_val.glob(f"{split}-*"):
            file.rename(folder / file.name)
    data_set = open_data_set("imagenet", train_and_val)
    assert isinstance(data_set.train, ImageFiles)
    assert_equal_to_files(data_set.train, sorted(train_and_val.glob("train/*")))
    unlabeled = open_data_set("folder", train_and_val / "train").train
    assert len(unlabeled) == 40 and (unlabeled.labels == UNLABELED).all()


def test_columns_that_others_write(tmp_path: Path) -> None:
    """Another name and type of the column, a label that is missing, an image that is."""
    kind = pyarrow.struct([("path", pyarrow.string()), ("bytes", pyarrow.large_binary())])
    pictures = pyarrow.array([{"bytes": content, "path": None} for content in (*CONTENTS[:3], None)], kind)
    table = pyarrow.table({"id": [1, 2, 3, 4], "img": pictures, "label": pyarrow.array([0, None, -1, 2])})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    images = read_split(tmp_path, "loose images").images
    assert images.labels.tolist() == [0, UNLABELED, UNLABELED, 2] and list(images.faults) == [3]
    assert [images.encoded(n).tobytes() for n in range(3)] == CONTENTS[:3]
    with pytest.raises(BadImage):
        images.open(3)


def test_parquet_files_next_to_images_are_metadata(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"file_name": ["a.jpg"]}), tmp_path / "metadata.parquet")
    (tmp_path / "a.jpg").write_bytes(CONTENTS[1])
    index = read_split(tmp_path, "loose images")
    assert index.layout == "loose images" and index.skipped == {".parquet": 1}


def test_unusable_files_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            open_data_set("folder", folder)
        return str(error.value)

    file = write(tmp_path / "cut" / "a.parquet", CONTENTS, LABELS)
    file.write_bytes(file.read_bytes()[:-100])
    assert str(file) in message(file.parent)
    file = write(tmp_path / "labels" / "a.parquet", CONTENTS[:2], [0, -7])
    assert str(file) in message(file.parent) and "-7" in message(file.parent)
    file = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), file)
    assert str(file) in message(tmp_path) and "text, label" in message(tmp_path)
    file = write(tmp_path / "damaged" / "a.parquet", CONTENTS, LABELS)
    content = bytearray(file.read_bytes())
    content[4:200] = b"\xff" * 196  # the first page's header
    file.write_bytes(content)
    assert "a.parquet" in message(file.parent)
    write(tmp_path / "good" / "a.parquet", CONTENTS)
    images = open_data_set("folder", tmp_path / "good").train
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for modules in [name for name in sys.modules if name.startswith("pyarrow.")]:
        monkeypatch.delitem(sys.modules, modules)
    with pytest.raises(UserError, match=r"stec\[parquet\]"):
        images.open(0)
    assert "stec[parquet]" in message(tmp_path / "cut")


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_views_are_those_of_files(photographs: ImageFiles, backend: str, tmp_path: Path) -> None:
    write(tmp_path / "data/a.parquet", [photographs.path(n).read_bytes() for n in range(64)])
    images = open_data_set("folder", tmp_path / "data").train
    for one, two in zip(
        take(loader(photographs, PLAIN_64, backend), 2), take(loader(images, PLAIN_64, backend, shuffle_window=0), 2)
    ):
        np.testing.assert_array_equal(one.image_ids, two.image_ids)
        assert torch.equal(one.views, two.views)


def test_memory_is_bounded_and_each_row_group_decoded_once_per_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [encoded(n) for n in range(96)]
    write(tmp_path / "data/a.parquet", contents, rows=4)
    images = open_data_set("folder", tmp_path / "data").train
    assert isinstance(images, ImageFiles)
    limit = 8 * max(sum(map(len, contents[n : n + 4])) for n in range(0, 96, 4)) + 1000
    for module in (images_module, row_groups):
        monkeypatch.setattr(module, "CACHE_BYTES", limit)
    decoded: Counter[int] = Counter()
    read = row_groups.encoded_images

    def counted(path: Path, group: int) -> Any:
        decoded[group] += 1
        return read(path, group)

    monkeypatch.setattr(row_groups, "encoded_images", counted)
    for window in (16, 0):
        sampler = Sampler(images, PLAIN_64, seed=3, batch_size=4, shuffle_window=window)
        assert sampler.shuffle_window == 4
        decoded.clear()
        for step in range(24):
            for image_id in sampler.plan(step).image_ids.tolist():
                assert images.encoded(image_id).tobytes() == contents[image_id]
                assert sum(kept.nbytes for kept in images._row_groups._kept.values()) <= limit
        assert decoded == Counter(range(24))
    assert Sampler(images, PLAIN_64, seed=3, batch_size=4, shuffle_window=3).shuffle_window == 3


def test_read_ahead_and_lost_files(train_and_val: Path) -> None:
    images = open_data_set("folder", train_and_val).train
    assert isinstance(images, ImageFiles)
    file = images.path(0)
    with parquet.ParquetFile(file) as opened:
        first, size = row_groups.byte_range(file, 1)
        parts = [opened.metadata.row_group(1).column(k) for k in range(3)]
        (column,) = (part for part in parts if part.path_in_schema == "image.bytes")
        assert first <= column.data_page_offset < first + size == first + column.total_compressed_size
    images.read_ahead(1)
    file.unlink()
    images.read_ahead(0)
    with pytest.raises(BadImage):
        images.open(0)


def test_a_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    """With few images per row group, stopped by a signal and killed."""
    contents = [encoded(n, height=32, width=32) for n in range(128)]
    write(tmp_path / "data/a.parquet", contents, rows=10)
    settings = [*SMALL, "--dataset", "folder", "--data_dir", str(tmp_path / "data"), "--view_size", "32"]
    settings += ["--shuffle_window", "3", "--manip_lambda", "1", "--warmup_epochs", "0"]
    Run(*settings, "--results_path", tmp_path / "whole").end()
    resumed = [*settings, "--results_path", tmp_path / "run", "--resume", "auto"]
    Run(*resumed, prepare=SignalAtStep(5, signal.SIGKILL)).end(-signal.SIGKILL)
    Run(*resumed, "--stop_exit_code", "85", prepare=SignalAtStep(7, signal.SIGUSR1)).end(85)
    Run(*resumed).end()
    assert TOTAL_STEPS == 24
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
