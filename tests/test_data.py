"""The image pairs: what is read, what is refused, and that nothing is written where it should not be."""

import gzip
import hashlib
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import MNIST, FashionMNIST

from curvlab.data import embedded, vision
from curvlab.data.embedded import TEST_FONTS, TRAIN_FONTS, embedded_digits, embedded_letters
from curvlab.data.vision import ImagePair, ImageSet, load_pair, subset

PARTS = ("pretrain_train", "pretrain_test", "finetune_train", "finetune_test")


def _md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def _idx(values: np.ndarray) -> bytes:
    """The file format of MNIST: two zeros, type 8 (unsigned byte), number of axes, sizes, values."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own cache, and no data folder but the one it names."""
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CURVLAB_DATA", raising=False)


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """Two tiny data sets that pass for the published ones, and no way to the network."""
    rng = np.random.default_rng(0)
    made: dict[str, dict[str, np.ndarray]] = {}
    unpacked: dict[str, dict[str, str]] = {}
    for kind in (MNIST, FashionMNIST):
        values: dict[str, np.ndarray] = {}
        for part, n in (("train", 50), ("t10k", 20)):
            values[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            values[f"{part}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
        packed = {f"{name}.gz": gzip.compress(_idx(v), mtime=0) for name, v in values.items()}
        monkeypatch.setattr(kind, "resources", [(name, _md5(data)) for name, data in packed.items()])
        unpacked[kind.__name__] = {name: _md5(_idx(v)) for name, v in values.items()}
        made[kind.__name__] = values

    def no_network(*_: object, **__: object) -> None:
        raise OSError("this test has no network")

    monkeypatch.setattr(vision, "_UNPACKED_MD5", unpacked)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return made


@pytest.fixture
def root(contents: dict[str, dict[str, np.ndarray]], tmp_path: Path) -> Path:
    """A folder with the packed files."""
    for kind, values in contents.items():
        raw = tmp_path / "data" / kind / "raw"
        raw.mkdir(parents=True)
        for name, v in values.items():
            (raw / f"{name}.gz").write_bytes(gzip.compress(_idx(v), mtime=0))
    return tmp_path / "data"


def _unpack_in_place(root: Path) -> None:
    for packed in root.glob("*/raw/*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()


def _listing(root: Path) -> list[tuple[str, int, str]]:
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return [(str(p), p.stat().st_mtime_ns, _md5(p.read_bytes())) for p in files]


def test_packed_files_are_read_as_they_are(root: Path, contents: dict[str, dict[str, np.ndarray]]) -> None:
    pair = load_pair("mnist", root)
    assert pair.name == "mnist"
    assert pair.note == ""
    train = contents["MNIST"]["train-images-idx3-ubyte"] / 255
    for part, (kind, name) in zip(
        PARTS, [(k, n) for k in ("MNIST", "FashionMNIST") for n in ("train", "t10k")], strict=True
    ):
        images: ImageSet = getattr(pair, part)
        # One mean and deviation, the pretrain task's, for all four sets.
        expected = (contents[kind][f"{name}-images-idx3-ubyte"] / 255 - train.mean()) / train.std()
        np.testing.assert_allclose(images.x.squeeze(1).numpy(), expected, atol=1e-5)
        assert images.x.dtype == torch.float32
        assert images.x.shape[1:] == (1, 28, 28)
        assert images.y.dtype == torch.int64
        assert images.y.tolist() == contents[kind][f"{name}-labels-idx1-ubyte"].tolist()


def test_root_is_only_read(root: Path, tmp_path: Path) -> None:
    before = _listing(root)
    folders = [root, *(p for p in root.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        load_pair("mnist", root)
        # Who may write anywhere is not stopped by chmod, hence also the comparison.
        assert _listing(root) == before
        assert len(list(root.rglob("*"))) == len(before) + 4
    finally:
        for folder in folders:
            folder.chmod(0o755)
    cached = [p.name for p in (tmp_path / "cache").iterdir()]
    assert sorted(name.split("-")[0] for name in cached) == ["FashionMNIST", "MNIST"]


def test_unpacked_root_needs_no_cache(root: Path, tmp_path: Path) -> None:
    packed = load_pair("mnist", root).provenance()
    shutil.rmtree(tmp_path / "cache")
    _unpack_in_place(root)
    assert load_pair("mnist", root).provenance() == packed
    assert not (tmp_path / "cache").exists()


def test_environment_names_the_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CURVLAB_DATA", str(root))
    assert load_pair().name == "mnist"


def test_cache_serves_without_root_and_mends_itself(root: Path, tmp_path: Path) -> None:
    first = load_pair("mnist", root).provenance()
    assert load_pair("mnist").provenance() == first
    next((tmp_path / "cache").rglob("train-images-idx3-ubyte")).unlink()
    assert load_pair("mnist", root).provenance() == first


def test_many_at_once_fill_the_cache(root: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda _: load_pair("mnist", root).provenance()["dataset_checksum"], range(8)))
    assert len(set(sums)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("dataset", ["mnist", "auto"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_damaged_file_is_refused(root: Path, dataset: str, unpacked: bool) -> None:
    if unpacked:
        _unpack_in_place(root)
    path = next((root / "FashionMNIST" / "raw").glob("t10k-images*"))
    expected = _md5(path.read_bytes())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged") as error:
        load_pair(dataset, root)  # type: ignore[arg-type]
    for part in (str(path), expected, _md5(path.read_bytes())):
        assert part in str(error.value)


def test_damaged_cache_is_refused(root: Path, tmp_path: Path) -> None:
    load_pair("mnist", root)
    path = next((tmp_path / "cache").rglob("train-labels-idx1-ubyte"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is damaged"):
        load_pair("mnist", root)


def test_missing_file_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz") as error:
        load_pair("mnist", root)
    assert str(root) in str(error.value)
    assert "CURVLAB_DATA" in str(error.value)
    with caplog.at_level(logging.WARNING, "curvlab"):
        pair = load_pair("auto", root)
    assert pair.name == "embedded"
    assert "EMBEDDED" in pair.note
    assert "t10k-labels-idx1-ubyte.gz" in pair.note
    assert pair.provenance()["dataset_note"] == pair.note
    assert [(r.levelno, r.name, r.getMessage()) for r in caplog.records] == [(logging.WARNING, "curvlab", pair.note)]


@pytest.mark.usefixtures("contents")
def test_no_network_means_embedded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data folder was given"):
        load_pair("mnist")
    pair = load_pair("auto")
    assert pair.name == "embedded"
    assert "no data folder was given" in pair.note
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("contents")
def test_download_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float | None] = []

    def breaks_off(self: MNIST) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise RuntimeError("the line broke")

    monkeypatch.setattr(vision, "_reachable", lambda url: True)
    monkeypatch.setattr(MNIST, "download", breaks_off)
    before = socket.getdefaulttimeout()
    with pytest.raises(FileNotFoundError, match="the line broke"):
        load_pair("mnist")
    assert socket.getdefaulttimeout() == before
    assert len(timeouts) == 1
    assert timeouts[0] is not None
    assert list((tmp_path / "cache").iterdir()) == []


def test_unwritable_cache_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("CURVLAB_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(PermissionError, match="CURVLAB_CACHE"):
        load_pair("auto", root)


def test_unknown_dataset() -> None:
    with pytest.raises(ValueError, match="cifar"):
        load_pair("cifar")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair() -> ImagePair:
    return load_pair("embedded")


def test_embedded_pair(pair: ImagePair) -> None:
    assert pair.name == "embedded"
    assert pair.note == ""
    assert [len(getattr(pair, part)) for part in PARTS] == [1347 * 8, 450, 10_000, 2_000]
    for part in PARTS:
        images: ImageSet = getattr(pair, part)
        assert images.x.shape == (len(images), 1, 28, 28)
        assert images.x.dtype == torch.float32
        assert images.y.dtype == torch.int64
        counts = images.y.bincount(minlength=10)
        assert len(counts) == 10
        assert counts.min() > 0.9 * counts.max()
        # White ink on black: the border is darker than the middle.
        assert images.x[:, :, :3].mean() < images.x[:, :, 10:18].mean() - 0.3
    assert abs(float(pair.pretrain_train.x.mean())) < 1e-3
    assert abs(float(pair.pretrain_train.x.std()) - 1) < 1e-3


def test_embedded_repeats(pair: ImagePair) -> None:
    first = pair.provenance()
    embedded_digits.cache_clear()
    embedded_letters.cache_clear()
    assert load_pair("embedded").provenance() == first
    # Another process with another number of threads and another hash seed.
    code = (
        "import torch; torch.set_num_threads(1); from curvlab.data import load_pair;"
        "print(load_pair('embedded').provenance())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )
    assert done.stdout.strip() == str(first)


def test_embedded_seeds_differ() -> None:
    first, second = (embedded_letters(seed, n_train=100, n_test=20) for seed in (0, 1))
    assert not torch.equal(first[0].images, second[0].images)
    assert not torch.equal(embedded_digits(0)[1].images, embedded_digits(1)[1].images)


def _as_set(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_do_not_leak() -> None:
    train, test = embedded_digits()
    assert not _as_set(train.images) & _as_set(test.images)
    # The upright copies and the test set together are all originals, each once.
    upright = torch.cat([train.images[::8], test.images])
    labels = torch.cat([train.labels[::8], test.labels])
    originals = load_digits()
    assert len(_as_set(upright)) == len(np.unique(originals.data, axis=0)) == len(originals.data)
    assert labels.bincount().tolist() == np.bincount(originals.target).tolist()
    # The eight copies of an original share its label, and are eight different pictures.
    assert torch.equal(train.labels.view(-1, 8), train.labels[::8, None].expand(-1, 8))
    assert all(len(_as_set(copies)) == 8 for copies in train.images.split(8))


def test_letters_do_not_leak() -> None:
    assert not set(TRAIN_FONTS) & set(TEST_FONTS)
    train, test = embedded_letters()
    assert not _as_set(train.images) & _as_set(test.images)
    assert len(_as_set(train.images)) == len(train.images)
    glyphs = {f: torch.stack([embedded._glyph(f, x) for x in embedded.LETTERS]) for f in TRAIN_FONTS + TEST_FONTS}
    for name in TEST_FONTS:
        for other in TRAIN_FONTS:
            assert not torch.equal(glyphs[name], glyphs[other])
    for g in glyphs.values():
        # Ten different letters, none of them an empty box.
        assert len(_as_set(g)) == 10


def test_missing_font_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"NoSuchFont\.ttf"):
        embedded._glyph("NoSuchFont.ttf", "A")


def test_subset(pair: ImagePair) -> None:
    taken = subset(pair.finetune_train, 203, seed=3)
    again = subset(pair.finetune_train, 203, seed=3)
    other = subset(pair.finetune_train, 203, seed=4)
    assert len(taken) == 203
    assert torch.equal(taken.x, again.x)
    assert taken.checksum == again.checksum != other.checksum
    assert not torch.equal(taken.x, other.x)
    assert sorted(taken.y.bincount().tolist()) == [20] * 7 + [21] * 3
    # Labels stay with their images, and no image is taken twice.
    rows = {
        image.numpy().tobytes(): int(y) for image, y in zip(pair.finetune_train.x, pair.finetune_train.y, strict=True)
    }
    assert [rows[image.numpy().tobytes()] for image in taken.x] == taken.y.tolist()
    assert len(_as_set(taken.x)) == 203


def test_subset_of_uneven_classes() -> None:
    y = torch.tensor([0] * 50 + [1] * 3)
    images = ImageSet(torch.arange(53.0).reshape(53, 1, 1, 1).expand(53, 1, 28, 28), y, "uneven", "00")
    assert subset(images, 20, seed=0).y.bincount().tolist() == [17, 3]
    assert sorted(subset(images, 53, seed=0).x[:, 0, 0, 0].tolist()) == list(range(53))


@pytest.mark.parametrize("n", [0, -1, 451])
def test_subset_size_out_of_range(pair: ImagePair, n: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot take {n} of the 450.*1\.\.450"):
        subset(pair.pretrain_test, n, seed=0)


def test_provenance_is_flat_and_follows_the_data(pair: ImagePair) -> None:
    record = pair.provenance()
    assert all(isinstance(value, str | int) for value in record.values())
    assert record["dataset"] == "embedded"
    assert record["pretrain_test_size"] == 450
    smaller = ImagePair(
        pair.name,
        pair.pretrain_train,
        pair.pretrain_test,
        subset(pair.finetune_train, 9, 0),
        pair.finetune_test,
    )
    assert smaller.provenance()["dataset_checksum"] != record["dataset_checksum"]


@pytest.fixture
def real_root(tmp_path: Path) -> Iterator[Path]:
    yield Path(REAL)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


REAL = os.environ.get("CURVLAB_DATA", "")


@pytest.mark.skipif(not REAL, reason="CURVLAB_DATA names no folder with MNIST and Fashion-MNIST")
def test_real_pair(real_root: Path) -> None:
    pair = load_pair("mnist", real_root)
    assert [len(getattr(pair, part)) for part in PARTS] == [60_000, 10_000, 60_000, 10_000]
    # The class counts and first labels both data sets are known for.
    assert pair.pretrain_train.y.bincount()[:3].tolist() == [5923, 6742, 5958]
    assert pair.pretrain_train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert pair.finetune_train.y.bincount().tolist() == [6000] * 10
    assert pair.finetune_train.y[:5].tolist() == [9, 0, 0, 3, 0]
    # MNIST's mean 0.1307 and deviation 0.3081: black is standardised to -0.4242 in both tasks.
    assert float(pair.pretrain_train.x.min()) == pytest.approx(-0.4242, abs=2e-4)
    assert float(pair.finetune_train.x.min()) == pytest.approx(-0.4242, abs=2e-4)
    # Raw bytes are the same everywhere, so this may be pinned.
    assert pair.provenance()["dataset_checksum"] == "ca0464094a780ed1"
