"""Two processes under torchrun (gloo) give the factors of one; models spread by accelerate give those of one device."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from distributed_worker import DATA, LAYERS, fits, subject
from language import tiny_llama
from reference import assert_close

from curvlab import distributed
from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.curvature.gather import Work
from curvlab.layers import device_of, find_layers
from curvlab.losses import CrossEntropy

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind."""
    out = tmp_path_factory.mktemp("two")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(HERE / "distributed_worker.py"), str(out),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def load(fit: Any, path: Path) -> Any:
    return type(fit).load(path)


def test_two_processes_give_the_statistics_of_one(folder: Path) -> None:
    for name, alone in fits(False).items():
        for rank in (0, 1):  # both have the sums over all
            shared = load(alone, folder / f"{name}.{rank}")
            assert shared.origin == alone.origin
            if isinstance(alone, KFAC):
                for layer, own in alone.factors.items():
                    assert_close(shared.factors[layer].A, own.A, 1e-13)
                    assert_close(shared.factors[layer].S, own.S, 1e-13)
                    assert shared.factors[layer].scale == own.scale
            elif isinstance(alone, Covariance):
                for layer, moments in alone.moments.items():
                    assert_close(shared.moments[layer].A, moments.A, 1e-13)
                    assert shared.moments[layer].g_norm == pytest.approx(moments.g_norm, rel=1e-12)
                    assert shared.moments[layer].scale == moments.scale
            else:
                assert shared.scales == alone.scales
                for block, other in zip(shared.spectrum().blocks, alone.spectrum().blocks, strict=True):
                    assert_close(block.values, other.values, 1e-9)  # of bases that round-off turns
                    assert block.total == pytest.approx(other.total, rel=1e-12)


def test_each_process_has_its_turn_and_its_checkpoint(folder: Path) -> None:
    assert sorted(int((folder / f"examples.{rank}").read_text()) for rank in (0, 1)) == [2, 3]  # of one batch of five
    files = {file.name for file in folder.glob("*.KFAC*")}  # whatever dots the names contain
    assert files == {f"{name}.KFAC.{rank}of2" for name in DATA for rank in (0, 1)}


@pytest.mark.parametrize("what", ["data", "weights", "weights of another layer"])
def test_processes_that_differ_are_refused(what: str, folder: Path) -> None:
    for rank in (0, 1):
        message = (folder / f"{what}.{rank}").read_text()
        assert what.split()[0] in message
        assert "processes [1] differ from process 0" in message


def test_without_torchrun() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        KFAC.fit(subject(), CrossEntropy(), DATA["one large batch"], LAYERS, labels="data", distributed=True)
    with pytest.raises(RuntimeError, match="torchrun"):
        distributed.start()


# Models that accelerate has spread: weights on the disk or in CPU memory are brought to the device when they are used


PROJECTIONS = "model.layers.*.mlp.down_proj"


def llama() -> Any:
    return tiny_llama(vocabulary=11, dtype=torch.float64)


def spread(how: str, folder: Path) -> Any:
    if how == "memory":
        return cpu_offload(llama(), execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    return dispatch_model(llama(), places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["memory", "disk"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC, Covariance])
def test_offloaded_models(how: str, kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (3, 2, 5))
    data, options = [({"input_ids": x}, x.roll(-1, 1)) for x in ids], {"labels": "model", "seed": 2}
    model = spread(how, tmp_path)
    (lowest, _) = find_layers(model, PROJECTIONS)
    assert lowest.parameters()[0].is_meta
    assert lowest.device == device_of(model) == torch.device("cpu")
    fit = kind.fit(model, CrossEntropy(), data, PROJECTIONS, checkpoint=tmp_path / "fit.safetensors", **options)
    whole = kind.fit(llama(), CrossEntropy(), data, PROJECTIONS, **options)
    assert fit.origin == whole.origin  # the checksums are those of the weights, wherever they are
    fit.save(tmp_path / "saved.safetensors")
    kind.load(tmp_path / "saved.safetensors", model=model)
    for block, own in zip(fit.spectrum().blocks, whole.spectrum().blocks, strict=True):
        assert torch.equal(block.values, own.values)
    assert all(p.requires_grad for p in model.parameters())


def test_sums_are_on_each_layers_own_device() -> None:
    """A stand-in for two GPUs: the device on which a layer is said to run is that of its sums."""

    class Hook:
        execution_device = "meta"

    model = subject()
    model.fc2._hf_hook = Hook()
    work = Work.of(model, CrossEntropy(), [], LAYERS, "data", 1, 0, False, 0, None, None, False)
    sums = work.zeros("test", lambda layer: {"A": (layer.d_in, layer.d_in)})
    assert sums["fc1/A"].device.type == "cpu"
    assert sums["fc2/A"].device.type == "meta"
