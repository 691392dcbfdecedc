"""The pair of image tasks: one to pretrain on, one to fine-tune on.

MNIST and Fashion-MNIST where their files can be had; otherwise the embedded pair, and a loud note saying so.
"""

import hashlib
import logging
import os
import shutil
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from curvlab.data.embedded import RawSet, embedded_digits, embedded_letters
from curvlab.storage import cache_folder

if TYPE_CHECKING:  # torchvision takes two seconds to import, and is needed only where its files are read
    from torchvision.datasets import MNIST

_log = logging.getLogger("curvlab")

# MD5 of the files once unpacked, for folders without the .gz; torchvision knows only the packed ones.
_UNPACKED_MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
_NETWORK_SECONDS = 5.0
_WHAT_TO_DO = "set CURVLAB_DATA or --data to a folder with MNIST/raw and FashionMNIST/raw, or use --dataset embedded"


@dataclass(frozen=True)
class ImageSet:
    """Standardised images x (N, 1, 28, 28) float32 and labels y (N,) int64.

    `checksum` is the SHA-256 of the raw pixels and labels, or, for a subset, of the parent's checksum and the
    rows taken.
    """

    x: Tensor
    y: Tensor
    name: str
    checksum: str

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ImagePair:
    """Two image tasks of ten classes each; `note` is empty, or says why embedded data replace the real."""

    name: str
    pretrain_train: ImageSet
    pretrain_test: ImageSet
    finetune_train: ImageSet
    finetune_test: ImageSet
    note: str = ""

    def provenance(self) -> dict[str, str | int]:
        """Flat record of what the data are: names, sizes and checksums, ready for columns of a table."""
        parts = ("pretrain_train", "pretrain_test", "finetune_train", "finetune_test")
        sets: dict[str, ImageSet] = {part: getattr(self, part) for part in parts}
        together = hashlib.sha256("".join(s.checksum for s in sets.values()).encode()).hexdigest()
        record: dict[str, str | int] = {"dataset": self.name, "dataset_checksum": together[:16]}
        for part, images in sets.items():
            record[f"{part}_name"] = images.name
            record[f"{part}_size"] = len(images)
            record[f"{part}_checksum"] = images.checksum[:16]
        record["dataset_note"] = self.note
        return record


def load_pair(dataset: Literal["auto", "mnist", "embedded"] = "auto", root: str | Path | None = None) -> ImagePair:
    """The pair of tasks: "mnist" (MNIST, then Fashion-MNIST), "embedded" (digits, then letters) or "auto".

    The files are looked for in `root`, else in the folder CURVLAB_DATA names (both in torchvision's layout,
    packed or unpacked, only ever read), else torchvision downloads them. Packed files are unpacked in the
    folder CURVLAB_CACHE names, else ~/.cache/curvlab. "auto" takes the embedded pair where the files cannot
    be had, with a warning and a `note`.

    Every image is standardised as (pixel/255 - mean) / std with the mean and standard deviation of the
    pretrain task's train set, in both tasks, so that one network sees one convention.

    Raises FileNotFoundError when "mnist" cannot be had, and ValueError for an unknown dataset or a file whose
    MD5 is not the published one, be it "auto" or not.
    """
    if dataset not in ("auto", "mnist", "embedded"):
        raise ValueError(f"unknown dataset {dataset!r}; choose auto, mnist or embedded")
    if dataset == "embedded":
        return _embedded_pair()
    from torchvision.datasets import MNIST, FashionMNIST

    given = root or os.environ.get("CURVLAB_DATA") or None
    try:
        folder = None if given is None else Path(given).expanduser()
        pretrain, finetune = _raw(MNIST, folder), _raw(FashionMNIST, folder)
    except FileNotFoundError as error:
        if dataset == "mnist":
            raise
        note = f"EMBEDDED DATA, NOT MNIST AND FASHION-MNIST: {error}"
        _log.warning(note)
        return _embedded_pair(note)
    return _pair("mnist", ("MNIST", *pretrain), ("FashionMNIST", *finetune))


def subset(images: ImageSet, n: int, seed: int) -> ImageSet:
    """n random images of a set, as near to equally many of each class as the set allows.

    Rows are drawn without replacement from a generator seeded with `seed` and come in random order. Raises
    ValueError unless 1 ≤ n ≤ N.
    """
    if not 1 <= n <= len(images):
        raise ValueError(f"cannot take {n} of the {len(images)} images of {images.name}; n must be 1..{len(images)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    labels = images.y[order]
    # Each image's turn within its class; taking all first turns, then all second ones, keeps classes level.
    turn = torch.empty_like(labels)
    for label in labels.unique():
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    rows = order[torch.argsort(turn, stable=True)[:n]]
    rows = rows[torch.randperm(n, generator=generator)]
    digest = hashlib.sha256(images.checksum.encode() + rows.numpy().tobytes()).hexdigest()
    return ImageSet(images.x[rows], images.y[rows], f"{images.name}[{n}, seed {seed}]", digest)


def _embedded_pair(note: str = "") -> ImagePair:
    return _pair("embedded", ("embedded digits", *embedded_digits()), ("embedded letters", *embedded_letters()), note)


def _pair(
    name: str, pretrain: tuple[str, RawSet, RawSet], finetune: tuple[str, RawSet, RawSet], note: str = ""
) -> ImagePair:
    """Both tasks, each (name, train, test), standardised by the first one's train set."""
    # From counts of the 256 grey values: no rounding over millions of pixels.
    counts = torch.bincount(pretrain[1].images.flatten(), minlength=256).double()
    grey = torch.arange(256, dtype=torch.float64) / 255
    mean = float((counts * grey).sum() / counts.sum())
    std = float((counts * (grey - mean) ** 2).sum() / counts.sum()) ** 0.5
    return ImagePair(
        name,
        pretrain_train=_standardise(pretrain[1], f"{pretrain[0]} train", mean, std),
        pretrain_test=_standardise(pretrain[2], f"{pretrain[0]} test", mean, std),
        finetune_train=_standardise(finetune[1], f"{finetune[0]} train", mean, std),
        finetune_test=_standardise(finetune[2], f"{finetune[0]} test", mean, std),
        note=note,
    )


def _standardise(raw: RawSet, name: str, mean: float, std: float) -> ImageSet:
    digest = hashlib.sha256(raw.images.numpy().data)
    digest.update(raw.labels.numpy().data)
    x = raw.images.unsqueeze(1).float().div_(255).sub_(mean).div_(std)
    return ImageSet(x, raw.labels.clone(), name, digest.hexdigest())


def _raw(kind: "type[MNIST]", root: Path | None) -> tuple[RawSet, RawSet]:
    """Train and test set of one torchvision dataset, from root, or without one from cache or network."""
    unpacked = _UNPACKED_MD5[kind.__name__]
    if root is None:
        folder = _in_cache(kind, source=None)
    elif not _missing(kind, root, unpacked):
        folder = root
    else:
        packed = dict(kind.resources)
        missing = _missing(kind, root, packed)
        if missing:
            raise FileNotFoundError(
                f"{_files(kind, root)} lacks {', '.join(missing)} (packed or unpacked); {_WHAT_TO_DO}"
            )
        _check_md5(kind, root, packed)
        folder = _in_cache(kind, source=root)
    _check_md5(kind, folder, unpacked)
    train, test = kind(folder, train=True), kind(folder, train=False)
    return RawSet(train.data, train.targets), RawSet(test.data, test.targets)


def _in_cache(kind: "type[MNIST]", source: Path | None) -> Path:
    """The cache's root holding this dataset unpacked; filled from `source`'s packed files, or the network."""
    cache = cache_folder()
    # Named after the contents, so that other files never meet under one name.
    key = hashlib.md5("".join(md5 for _, md5 in kind.resources).encode(), usedforsecurity=False).hexdigest()
    final = cache / f"{kind.__name__}-{key[:12]}"
    if not _missing(kind, final, _UNPACKED_MD5[kind.__name__]):
        return final
    if source is None and not any(_reachable(mirror + kind.resources[0][0]) for mirror in kind.mirrors):
        raise FileNotFoundError(
            f"no data folder was given, {final} does not hold {kind.__name__} "
            f"and none of its servers answers; {_WHAT_TO_DO}"
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Filled aside and renamed in one step: another process sees all of it or nothing.
        aside = tempfile.TemporaryDirectory(dir=cache, prefix=".unpacking-")
    except OSError as error:
        raise PermissionError(
            f"cannot write into the cache folder {cache} ({error}); set CURVLAB_CACHE to a writable folder"
        ) from error
    with aside as name:
        staged = Path(name) / "root"
        _unpack(kind, source, staged)
        if final.is_dir() and _missing(kind, final, _UNPACKED_MD5[kind.__name__]):
            shutil.rmtree(final)
        try:
            staged.rename(final)
        except OSError:
            # Another process was first, with the same contents.
            if not final.is_dir():
                raise
    return final


def _unpack(kind: "type[MNIST]", source: Path | None, root: Path) -> None:
    """Fill `root` with the dataset unpacked, from `source`'s packed files or from the network."""
    if source is not None:
        _files(kind, root).mkdir(parents=True)
        for name, _ in kind.resources:
            shutil.copyfile(_files(kind, source) / name, _files(kind, root) / name)
        # Sound files keep torchvision from reaching for the network.
        _check_md5(kind, root, dict(kind.resources))
        kind(root, download=True)
    else:
        try:
            with _socket_timeout(_NETWORK_SECONDS):
                kind(root, download=True)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"torchvision could not download {kind.__name__}: {error}; {_WHAT_TO_DO}"
            ) from error
    for name, _ in kind.resources:
        (_files(kind, root) / name).unlink()


def _files(kind: "type[MNIST]", root: Path) -> Path:
    return root / kind.__name__ / "raw"


def _missing(kind: "type[MNIST]", root: Path, names: dict[str, str]) -> list[str]:
    return [name for name in names if not (_files(kind, root) / name).is_file()]


def _check_md5(kind: "type[MNIST]", root: Path, expected: dict[str, str]) -> None:
    for name, md5 in expected.items():
        path = _files(kind, root) / name
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != md5:
            raise ValueError(
                f"{path} is damaged or is not {kind.__name__}: its MD5 is {found}, expected {md5}; "
                "put the published file there, or delete it"
            )


def _reachable(url: str) -> bool:
    """Whether a server answers for url in time; in a thread, since looking up a name knows no timeout."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "curvlab"})
        try:
            with urllib.request.urlopen(request, timeout=_NETWORK_SECONDS):
                answers.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_NETWORK_SECONDS)
    return bool(answers)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision's downloader takes no timeout; lend it the default one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
