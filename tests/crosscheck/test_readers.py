"""Every format as its own library writes it, and what must be refused: told by the bytes, nothing executed."""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from curvlab.crosscheck.formats import numpy_files, refusal, zips
from curvlab.crosscheck.parts import Stored
from curvlab.crosscheck.readers import UnreadableFile, read, survey


def one(path: Path) -> Stored:
    (stored,) = read(path)
    assert stored.path == path
    return stored


def refused(path: Path, match: str) -> None:
    with pytest.raises(UnreadableFile, match=match) as caught:
        read(path)
    assert str(caught.value).isprintable()  # one line, whatever the file's name
    assert caught.value.path == path


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Torch


@pytest.mark.parametrize(
    "name", ["layer_float32_kfac_100.npz", "a.pt", "a.pth", "a.bin", "a", "a.safetensors", "ä b\n.pt"]
)
def test_a_torch_zip_under_any_name(name: str, tmp_path: Path) -> None:
    content = {"A": random(5, 5), "B": random(3, 3, seed=1, dtype=torch.bfloat16), "N": 1234}
    torch.save(content, tmp_path / "plain.pt")
    (tmp_path / "plain.pt").rename(tmp_path / name)
    stored = one(tmp_path / name)
    assert stored.format == "torch zip"
    assert set(stored.tensors) == {"A", "B"}
    assert torch.equal(stored.tensors["A"], content["A"])
    assert stored.tensors["B"].dtype == torch.bfloat16
    assert torch.equal(stored.tensors["B"], content["B"])
    assert stored.numbers == {"N": 1234}


@pytest.mark.parametrize("zipped", [True, False])
def test_bare_nested_and_stacked_tensors(zipped: bool, tmp_path: Path) -> None:
    bare, stack = random(4, 4), random(3, 6, 6, seed=2)
    cache = {"fc.weight": {"Ua": random(4, 4), "Ub": random(2, 2), "M": random(4, 2) > 0}, "gamma": 0.9, "none": None}
    rest = {"list": [bare, (stack, {"x": torch.tensor(7)})], "sizes": [4, 2], "dtype": torch.float32, "flag": True}
    for name, content in (("bare", bare), ("stack", stack), ("cache", cache), ("rest", rest)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert torch.equal(one(tmp_path / "bare").tensors[""], bare)
    assert torch.equal(one(tmp_path / "stack").tensors[""], stack)
    found = one(tmp_path / "cache")
    assert found.format == ("torch zip" if zipped else "torch legacy")
    assert list(found.tensors) == ["fc.weight/Ua", "fc.weight/Ub", "fc.weight/M"]
    assert found.tensors["fc.weight/M"].dtype == torch.bool
    assert found.numbers == {"gamma": 0.9}
    found = one(tmp_path / "rest")
    assert torch.equal(found.tensors["list/1/0"], stack)
    assert found.numbers == {"list/1/1/x": 7, "sizes": "[4, 2]", "dtype": "torch.float32", "flag": True}


def test_views_parameters_and_shared_storages_keep_their_values(tmp_path: Path) -> None:
    whole = random(6, 8)
    parameter = torch.nn.Parameter(random(2, 3))
    content = {
        "columns": whole[:, 2:5],
        "rows": whole[1:3],
        "t": whole.mT,
        "p": parameter,
        "e": torch.ones(1).expand(9),
    }
    torch.save(content, tmp_path / "a.pt")
    found = one(tmp_path / "a.pt").tensors
    for key, tensor in content.items():
        assert torch.equal(found[key], tensor.detach()), key
        assert not found[key].requires_grad


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    torch.save({"A": torch.ones(3)}, tmp_path / "a.pt")
    np.save(tmp_path / "a.npy", np.ones(3))
    for name, key in (("a.pt", "A"), ("a.npy", "")):
        one(tmp_path / name).tensors[key].zero_()
        assert float(one(tmp_path / name).tensors[key].sum()) == 3.0


def test_numpy_numbers_and_arrays_in_a_torch_file(tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    content = {
        "N": np.int64(5), "A": array, "F": np.asfortranarray(array), "big": array.astype(">f4"), "s": np.float32(0.5),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    found = one(tmp_path / "a.pt")
    assert found.numbers == {"N": 5, "s": 0.5}
    for key in ("A", "F", "big"):
        assert torch.equal(found.tensors[key].double(), torch.from_numpy(array)), key


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path, function: Callable[..., Any] = os.system) -> None:
        self.marker, self.function = marker, function

    def __reduce__(self) -> tuple[Any, ...]:
        if self.function is os.system:
            return os.system, (f"touch {self.marker}",)
        return self.function, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize("function", [os.system, eval, exec], ids=["os.system", "eval", "exec"])
@pytest.mark.parametrize("depth", [0, 2])
def test_pickles_that_would_run_code_are_refused_unexecuted(
    function: Callable[..., Any], depth: int, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    content: Any = Evil(marker, function)
    for _ in range(depth):
        content = {"A": torch.eye(2), "x": [content]}
    torch.save(content, tmp_path / "zip.npz")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"bare{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))
    objects = np.empty(1, dtype=object)
    objects[0] = content
    np.save(tmp_path / "objects.npy", objects)
    np.savez(tmp_path / "objects.npz", A=np.eye(2), x=objects)
    for file in ("zip.npz", "legacy.pt"):
        refused(tmp_path / file, f"{function.__name__}.*nothing of it was executed")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refused(tmp_path / f"bare{protocol}.pkl", "pickle|text|no known format")
    for file in ("objects.npy", "objects.npz"):
        refused(tmp_path / file, "Python objects in a pickle")
    stored, errors = survey(tmp_path)
    assert not stored
    assert len(errors) == 4 + pickle.HIGHEST_PROTOCOL + 1
    assert not marker.exists()


def test_numpy_objects_inside_a_torch_file_are_refused_unexecuted(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    objects = np.empty(1, dtype=object)
    objects[0] = Evil(marker)
    torch.save({"A": objects}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "could run code|plain numbers")
    torch.save({"A": np.empty(1, dtype=object)}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "plain numbers")
    assert not marker.exists()


def test_a_torch_script_is_refused(tmp_path: Path) -> None:
    torch.save({"A": torch.eye(2)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("a/constants.pkl", b"")
    refused(tmp_path / "a.pt", "TorchScript")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo.*to_dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr.*to_dense"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantised.*dequantize"),
        (lambda: torch.empty(3, device="meta"), "meta tensor"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "nested|torch cannot read it|could run code",
        ),
    ],
    ids=["coo", "csr", "quantised", "meta", "nested"],
)
def test_tensors_that_are_not_plain_are_refused(make: Callable[[], Tensor], match: str, tmp_path: Path) -> None:
    torch.save({"A": torch.eye(2), "B": make()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", match)


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> None:
    """A copy of a zip with other contents."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def test_a_tensor_larger_than_its_own_bytes_is_refused(tmp_path: Path) -> None:
    """The unchecked loader gives its neighbours' bytes, or another file's."""
    torch.save({"a": torch.zeros(4), "b": torch.ones(400)}, tmp_path / "good.pt")

    def enlarge(name: str, data: bytes) -> bytes:
        return data.replace(b"K\x04", b"K\x20") if name.endswith("data.pkl") else data

    rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", enlarge)
    seen = torch.load(tmp_path / "bad.pt", mmap=True, weights_only=True)["a"]
    assert len(seen) == 32  # beyond the sixteen bytes that the file holds of it
    refused(tmp_path / "bad.pt", "storage 0 claims 128 B where the file holds 16 B")
    rewritten(tmp_path / "good.pt", tmp_path / "same.pt", lambda _, data: data)
    assert torch.equal(one(tmp_path / "same.pt").tensors["b"], torch.ones(400))


def test_an_expanded_tensor_must_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(1).expand(10**13)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"36\.4 TiB")


def test_compressed_torch_zips_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(4000)}, tmp_path / "good.pt")
    rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    refused(tmp_path / "bad.pt", "is compressed .*which torch never does")


def test_lists_without_end_are_refused(tmp_path: Path) -> None:
    laughs: Any = [torch.ones(1)]
    for _ in range(20):
        laughs = [laughs] * 10
    torch.save(laughs, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "nest without end")
    deep: Any = torch.ones(1)
    for _ in range(100):
        deep = [deep]
    torch.save(deep, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "nest without end")
    torch.save({"a/b": torch.ones(1), "a": {"b": torch.ones(2)}}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "two of its entries are named 'a/b'")


# NumPy


def layer_stats(path: Path, compressed: bool = False) -> np.ndarray:
    """As ROME's runningstats writes them: a sum, its count, and None as a marked NaN."""
    moment = random(6, 6).numpy()
    null = np.array(struct.unpack(">d", struct.pack(">Q", 0xFFF8000000000002))[0])
    content = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": 321, "mom2.mom2": moment}
    (np.savez_compressed if compressed else np.savez)(path, **content, sample_size=null)  # type: ignore[arg-type]
    return moment


@pytest.mark.parametrize("compressed", [False, True])
def test_layer_stats(compressed: bool, tmp_path: Path) -> None:
    path = tmp_path / "transformer.h.3.mlp.c_proj_float32_mom2_100000.npz"
    moment = layer_stats(path, compressed)
    stored = one(path)
    assert stored.format == "NumPy archive"
    assert list(stored.tensors) == ["mom2.mom2"]
    assert np.array_equal(stored.tensors["mom2.mom2"].numpy(), moment)  # a sum, as stored
    assert stored.numbers == {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": 321}


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i8", "u2", "u4", "?", "c8", ">f4", ">i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_dtype_and_order(dtype: str, order: Any, tmp_path: Path) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array, scalar=array[1, 1], empty=array[:0])
    for name, key in (("a.npy", ""), ("a.npz", "x")):
        assert np.array_equal(one(tmp_path / name).tensors[key].numpy(), array)
    found = one(tmp_path / "a.npz")
    assert found.tensors["empty"].shape == (0, 4)
    if "c" not in dtype:
        assert found.numbers["scalar"] == array[1, 1]


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.array([("a", 1)], dtype=[("x", "U1"), ("y", "i4")]), "plain numbers were expected"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "plain numbers were expected"),
        (np.zeros(2, dtype=np.longdouble), "which torch does not have"),
        (np.zeros(2, dtype="V2"), "plain numbers were expected"),
    ],
)
def test_arrays_that_are_no_tensors(array: np.ndarray, match: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", A=np.eye(2), x=array)
    refused(tmp_path / "a.npz", match)


def test_strings_are_described(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", name=np.array("wiki"), raw=np.array(b"x"), names=np.array(["a", "b"]))
    assert one(tmp_path / "a.npz").numbers == {"name": "wiki", "raw": "x", "names": "2 strings"}


def member(shape: tuple[int, ...], data: bytes) -> bytes:
    """A .npy file that claims float64 of `shape`."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize("shape", [(3, 3), (10**9, 10**9), (1,), (-1, 4)])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_shapes_that_disagree_with_the_bytes(shape: tuple[int, ...], compression: int, tmp_path: Path) -> None:
    data = member(shape, bytes(32))
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("A.npy", data)
    refused(tmp_path / "a.npy", "the array claims shape")
    refused(tmp_path / "a.npz", r"'A.npy' claims shape .* 32 B are there")


def test_zip_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zips, "SMALL", 2**20)
    monkeypatch.setattr(numpy_files, "_unpack", None)  # nothing is unpacked
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("A.npy", member((2**21,), bytes(2**24)))
    refused(tmp_path / "a.npz", r"claims 16\.0 MiB of content, \d+ times its size: a zip bomb")


def test_content_larger_than_the_free_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", A=random(200, 200).numpy())
    assert one(tmp_path / "a.npz").tensors["A"].shape == (200, 200)
    monkeypatch.setattr(refusal, "available", lambda: 10_000)
    refused(tmp_path / "a.npz", r"unpacking it would take 156\.\d KiB of memory, 9\.8 KiB are free")


def forged(path: Path, **fields: int) -> None:
    """Overwrite sizes in the central directory of a zip of one member."""
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    places = {"packed": 20, "unpacked": 24, "offset": 42}
    for name, value in fields.items():
        data[entry + places[name] : entry + places[name] + 4] = struct.pack("<I", value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("compression", "fields", "match"),
    [
        (zipfile.ZIP_DEFLATED, {"unpacked": 2**32 - 2}, "a zip bomb"),
        (zipfile.ZIP_DEFLATED, {"unpacked": 300}, "does not unpack to the 300 B|damaged"),
        (zipfile.ZIP_DEFLATED, {"unpacked": 100_000}, "damaged"),
        (zipfile.ZIP_DEFLATED, {"packed": 2**31}, "overlap or reach beyond"),
        (zipfile.ZIP_STORED, {"unpacked": 2**31}, "zip bomb|two different sizes"),
        (zipfile.ZIP_STORED, {"unpacked": 2**31, "packed": 2**31}, "reach beyond its end"),
        (zipfile.ZIP_STORED, {"offset": 7}, "damaged|cut short"),
        (zipfile.ZIP_STORED, {"offset": 2**30}, "damaged|cut short"),
    ],
)
def test_forged_archives(compression: int, fields: dict[str, int], match: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("A.npy", member((64,), np.arange(64.0).tobytes()))
    assert torch.equal(one(path).tensors["A"], torch.arange(64.0).double())
    forged(path, **fields)
    refused(path, match)


def test_other_zips_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "a.npz", "neither torch's nor NumPy's: it holds 'readme.txt'")
    with zipfile.ZipFile(tmp_path / "b.npz", "w"):
        pass
    refused(tmp_path / "b.npz", "empty")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("A.npy", member((4,), bytes(32)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("A.npy", member((4,), bytes(32)))
    refused(tmp_path / "c.npz", "'A.npy' more than once")


# Safetensors


def test_safetensors_with_metadata(tmp_path: Path) -> None:
    content = {"fc/A": random(4, 4, dtype=torch.bfloat16), "N": torch.tensor(9), "empty": torch.zeros(0, 3)}
    save_file(content, tmp_path / "a.bin", {"format": "pt", "gamma": "0.9"})
    found = one(tmp_path / "a.bin")
    assert found.format == "safetensors"
    assert torch.equal(found.tensors["fc/A"], content["fc/A"])
    assert found.tensors["empty"].shape == (0, 3)
    assert found.numbers == {"format": "pt", "gamma": "0.9", "N": 9}


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "X9"}}',
        '{"a": ',
        "{}",
        '{"a":1}',
    ],
)
def test_damaged_safetensors(header: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    refused(tmp_path / "a.safetensors", "safetensors file is damaged")


# What is no file of ours, and folders


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "empty"),
        (b"layer,gamma\n1,2\n", "it is text"),
        ("Änderung\n".encode(), "it is text"),
        (b"\x00" * 100, "no known format"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x1f\x8b" + bytes(50), "gzip"),
        (b"GGUF" + bytes(50), "GGUF"),
        (b"P", "it is text"),
        (b"PK\x03\x04", "zip archive is damaged"),
        (b"\x93NUMPY", "header of the array is damaged"),
        (b"\x93NUMPY\x09\x00" + bytes(50), "version"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': {'<f4'" + bytes(50), "header of the array is damaged"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"[" * 80, "header of the array is damaged"),
    ],
)
def test_what_is_no_tensor_file(data: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path / "a.npz", match)


def test_missing_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.npz", "no such file")
    (tmp_path / "dangling.npz").symlink_to(tmp_path / "none.npz")
    refused(tmp_path / "dangling.npz", "broken link")
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    refused(tmp_path / "loop.npz", "cannot be opened")
    os.mkfifo(tmp_path / "pipe.npz")
    refused(tmp_path / "pipe.npz", "no ordinary file")
    np.save(tmp_path / "a.npy", np.eye(2))

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)  # the tests may run as root, who may read everything
    refused(tmp_path / "a.npy", "may not read it")


def test_names_with_odd_characters(tmp_path: Path) -> None:
    for name in ("a\nb\x1b[31m.npy", os.fsdecode(b"\xff\xfe.npy"), "ö ü.npy"):
        np.save(tmp_path / "plain.npy", np.eye(2))
        (tmp_path / "plain.npy").rename(tmp_path / name)
        assert torch.equal(one(tmp_path / name).tensors[""], torch.eye(2).double())
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, "empty")
    for name, write in (("t", torch.save), ("s", save_file)):
        write({"A": torch.eye(2)}, tmp_path / name)
        odd = tmp_path / os.fsdecode(b"\xff" + name.encode())
        (tmp_path / name).rename(odd)
        stored, errors = survey(odd)  # read, or refused in one line
        assert len(stored) + len(errors) == 1
        assert all(str(error).isprintable() for error in errors)


def test_folders_are_read_recursively_and_once(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.npy", "a.npy", "b/m.npy", "b/c/k.npy"):
        np.save(tmp_path / name, np.eye(2))
    for name in ("config.json", "README.md", "log.txt", ".hidden.npy", "b/table.csv", "plot.PNG"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # loops
    (tmp_path / "b" / "c" / "here").symlink_to(".")
    assert [stored.path.relative_to(tmp_path).as_posix() for stored in read(tmp_path)] == [
        "a.npy", "z.npy", "b/m.npy", "b/c/k.npy",
    ]  # fmt: skip
    (tmp_path / "b" / "damaged.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnreadableFile, match=r"damaged\.pt"):
        read(tmp_path)
    stored, errors = survey(tmp_path)
    assert len(stored) == 4
    assert len(errors) == 1


def test_folders_without_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "no file in this folder may hold tensors")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no file in this folder may hold tensors")


# Damage anywhere


def samples(folder: Path) -> dict[str, bytes]:
    torch.save({"A": random(3, 3), "B": {"x": random(2, 2)}, "N": 5}, folder / "zip")
    torch.save({"A": random(3, 3), "N": 5}, folder / "legacy", _use_new_zipfile_serialization=False)
    layer_stats(folder / "stats.npz")
    layer_stats(folder / "packed.npz", compressed=True)
    np.save(folder / "a.npy", random(3, 3).numpy())
    save_file({"A": random(3, 3)}, folder / "safe", {"kind": "kfac"})
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["zip", "legacy", "stats.npz", "packed.npz", "a.npy", "safe"])
def test_truncated_files_are_refused_wherever_they_end(name: str, tmp_path: Path) -> None:
    data = samples(tmp_path)[name]
    for length in {0, *range(1, len(data), max(1, len(data) // 40)), len(data) - 1}:
        (tmp_path / name).write_bytes(data[:length])
        refused(tmp_path / name, name)


@pytest.mark.parametrize("name", ["zip", "legacy", "stats.npz", "packed.npz", "a.npy", "safe"])
def test_changed_bytes_are_read_or_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    data = samples(folder)[name]
    target = folder / "changed"

    @hypothesis_settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), min_size=1, max_size=4))
    def check(changes: list[tuple[int, int]]) -> None:
        changed = bytearray(data)
        for place, byte in changes:
            changed[place] = byte
        target.write_bytes(changed)
        stored, errors = survey(target)
        assert len(stored) + len(errors) == 1
        for tensor in (t for found in stored for t in found.tensors.values()):
            tensor.abs().sum()  # its bytes are there

    check()


# Size


def sparse_file(kind: str, path: Path, rows: int) -> None:
    """A float32 matrix (rows, 1024) of holes: nothing on disk."""
    size = rows * 1024 * 4
    if kind == "torch":
        with torch.serialization.skip_data():
            torch.save({"A": torch.empty(rows, 1024)}, path)
    elif kind == "numpy":
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, 1024)})
            file.truncate(file.tell() + size)
    else:
        header = f'{{"A":{{"dtype":"F32","shape":[{rows},1024],"data_offsets":[0,{size}]}}}}'.ljust(96)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header.encode())
            file.truncate(file.tell() + size)


@pytest.mark.parametrize("kind", ["torch", "numpy", "safetensors"])
def test_large_files_are_mapped_not_loaded(kind: str, tmp_path: Path) -> None:
    sparse_file(kind, tmp_path / "warm", 16)  # imports and caches of the libraries
    read(tmp_path / "warm")
    sparse_file(kind, tmp_path / "large", 200 * 256)
    before = psutil.Process().memory_info().rss
    (stored,) = read(tmp_path / "large")
    grown = psutil.Process().memory_info().rss - before
    tensor = next(iter(stored.tensors.values()))
    assert tensor.shape == (200 * 256, 1024)
    assert grown < 20 * 2**20
    assert float(tensor[-3:].abs().sum()) == 0.0


def test_members_of_an_archive_are_mapped_where_they_are_aligned(tmp_path: Path) -> None:
    """The names decide where members begin; both ways give the same numbers."""
    mapped = 0
    for letters in range(1, 9):
        np.savez(tmp_path / "a.npz", **{"x" * letters: random(64, 64).numpy()})
        tensor = one(tmp_path / "a.npz").tensors["x" * letters]
        assert torch.equal(tensor, random(64, 64))
        mapped += tensor.numpy().base is not None and tensor.data_ptr() % 64 != 0
    assert mapped > 0


def test_a_pickle_cannot_make_tensors_up(tmp_path: Path) -> None:
    """torch.Tensor may be called by a pickle; what it allocates stands in no file."""

    class Made:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.Tensor, (10**6,)

    for zipped in (True, False):
        torch.save({"A": Made()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "a.pt", "'A' are not in the file")


def test_tensors_of_other_devices_come_to_the_cpu(tmp_path: Path) -> None:
    torch.save({"A": random(3, 3)}, tmp_path / "cpu.pt")

    def moved(name: str, data: bytes) -> bytes:
        return data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0") if name.endswith(".pkl") else data

    rewritten(tmp_path / "cpu.pt", tmp_path / "cuda.pt", moved)
    assert b"cuda:0" in (tmp_path / "cuda.pt").read_bytes()
    assert torch.equal(one(tmp_path / "cuda.pt").tensors["A"], random(3, 3))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64])
def test_dtypes_torch_computes_little_with_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(6.0).view(2, 3)
    torch.save({"A": values.to(dtype)}, tmp_path / "a.pt")
    save_file({"A": values.to(dtype)}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        found = one(tmp_path / name).tensors["A"]
        assert torch.equal(found.double(), values.double())
        assert bool(found.isfinite().all())
        assert float(found.max()) == 5.0


def test_what_is_no_number_is_described_in_a_few_words(tmp_path: Path) -> None:
    """Their full text would be as long as their content."""
    content = {"l": list(range(10**5)), "s": torch.ones(10**6).untyped_storage(), "c": 1j, "x": b"ab"}
    torch.save(content, tmp_path / "a.pt")
    found = one(tmp_path / "a.pt")
    assert not found.tensors
    assert found.numbers == {"l": "list of 100,000", "s": "TypedStorage", "c": "1j", "x": "b'ab'"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cannot_fill_the_memory(zipped: bool, tmp_path: Path) -> None:
    class Huge:
        def __reduce__(self) -> tuple[Any, ...]:
            return bytearray, (10**14,)

    torch.save({"A": [Huge()]}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "a.pt", "would make a bytearray")


@pytest.mark.parametrize("zipped", [True, False])
def test_other_pickle_protocols_are_refused_with_the_remedy(zipped: bool, tmp_path: Path) -> None:
    torch.save({"A": torch.eye(2)}, tmp_path / "a.pt", pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "a.pt", "protocol.*without pickle_protocol" if zipped else "pickle")


def test_paths_that_are_none(tmp_path: Path) -> None:
    for path in (Path("a\x00b.npz"), tmp_path / ("x" * 300), tmp_path / "a.npz" / "b"):
        (tmp_path / "a.npz").write_bytes(b"x")
        refused(path, "cannot be opened|no such file")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_widening_makes_no_tensor_larger_than_its_file(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({"A": random(200, 200).to(dtype)}, tmp_path / "a.pt")
    assert one(tmp_path / "a.pt").tensors["A"].shape == (200, 200)
