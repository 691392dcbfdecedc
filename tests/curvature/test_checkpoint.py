"""Interrupted fits continue to the same bits; files say where statistics come from, and stale ones are noticed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from language import tiny_gpt2, tiny_llama
from safetensors import safe_open
from torch import Tensor, nn

from curvlab.checksum import digest
from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.curvature import checkpoint as checkpoint_module
from curvlab.curvature.origin import weights_checksum
from curvlab.losses import CrossEntropy

WORDS, LOSS = 11, CrossEntropy()
LAYERS = "model.layers.*.mlp.down_proj"


def language_data(batches: int = 6) -> list[Any]:
    torch.manual_seed(1)
    data = []
    for _ in range(batches):
        ids, mask = torch.randint(WORDS, (2, 5)), torch.ones(2, 5, dtype=torch.long)
        mask[0, 4] = 0
        targets = torch.randint(WORDS, (2, 5)).where(mask.bool(), -100)
        data.append(({"input_ids": ids, "attention_mask": mask}, targets))
    return data


def image_data() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(3, 2, 6, 5 + i % 2), torch.randint(3, (3,))) for i in range(6)]


def llama() -> nn.Module:
    return tiny_llama(vocabulary=WORDS)


def pictures() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).eval()


class Killed(Exception):
    pass


class Interrupted:
    """Data that end in an exception after some batches, in one of the passes over them."""

    def __init__(self, data: list[Any], batches: int, in_pass: int = 0) -> None:
        self.data, self.batches, self.in_pass, self.begun = data, batches, in_pass, 0

    def __iter__(self) -> Iterator[Any]:
        number, self.begun = self.begun, self.begun + 1
        for i, batch in enumerate(self.data):
            if number == self.in_pass and i == self.batches:
                raise Killed
            yield batch


def tensors_of(fit: Any) -> dict[str, Tensor]:
    if isinstance(fit, EKFAC):
        return {f"{i}": block.values for i, block in enumerate(fit.spectrum().blocks)}
    if isinstance(fit, Covariance):
        norms = {f"{n}/g": torch.tensor(m.g_norm, dtype=torch.float64) for n, m in fit.moments.items()}
        return norms | {n: m.a_sum for n, m in fit.moments.items()}
    return {f"{n}/{k}": t for n, f in fit.factors.items() for k, t in (("A", f.a_sum), ("S", f.s_sum))}


@pytest.fixture(autouse=True)
def _save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint_module, "PATIENCE", 0)


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], str]] = {
    "language model": (llama, language_data, LAYERS),
    "convolution": (pictures, image_data, "*"),  # whose sums over pixels of two sizes come about on the way
}


@pytest.mark.parametrize("kind", [KFAC, EKFAC, Covariance])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_killed_fit_continues_to_the_same_sums(kind: Any, subject: str, tmp_path: Path) -> None:
    make, data_of, layers = SUBJECTS[subject]
    model, data, file = make(), data_of(), tmp_path / "fit.safetensors"

    def fit(data: Any, **options: Any) -> Any:
        return kind.fit(model, LOSS, data, layers, labels="model", seed=3, **options)

    whole = fit(data)
    kills = [(4, 0)] if kind is not EKFAC else [(2, 0), (3, 1)]  # (after how many batches, in which pass)
    for batches, in_pass in kills:
        with pytest.raises(Killed):
            fit(Interrupted(data, batches, in_pass), checkpoint=file)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    resumed = fit(data, checkpoint=file)
    assert len(forwards) == (2 if kind is not EKFAC else 3)  # only what was missing
    for name, t in tensors_of(resumed).items():
        assert torch.equal(t, tensors_of(whole)[name]), name
    again = fit(data, checkpoint=file)
    handle.remove()
    assert len(forwards) == (2 if kind is not EKFAC else 3)  # a finished fit is read back
    assert all(torch.equal(t, tensors_of(whole)[name]) for name, t in tensors_of(again).items())
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    model, data, file = llama(), language_data(), tmp_path / "fit.safetensors"

    def fit(data: Any = data, layers: str = LAYERS, kind: Any = KFAC, **options: Any) -> Any:
        return kind.fit(model, LOSS, data, layers, checkpoint=file, **({"labels": "model", "seed": 3} | options))

    with pytest.raises(Killed):
        fit(Interrupted(data, 3))
    for message, other in {
        "seed: 3 there, 4 here": {"seed": 4},
        "labels: 'model' there": {"labels": "data"},
        "draws": {"draws": 2},
        "sharing": {"sharing": "reduce"},
        "first_example": {"first_example": 2},
        "layers": {"layers": "model.layers.0.mlp.down_proj"},
        "kind": {"kind": Covariance},
    }.items():
        with pytest.raises(ValueError, match=f"checkpoint of another fit.*{message}"):
            fit(**other)
    with pytest.raises(ValueError, match="other data"):
        fit(data[1:] + data[:1])
    with pytest.raises(ValueError, match="other data"):
        fit(micro_batch=1)
    with pytest.raises(ValueError, match="more data than there are"):
        fit(data[:2])
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1e-3  # weights below the layers matter too
    with pytest.raises(ValueError, match="weights"):
        fit()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="no intact safetensors file"):
        fit()


def test_saves_are_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "SECONDS", 1000.0)
    file = tmp_path / "fit.safetensors"
    with pytest.raises(Killed):
        KFAC.fit(llama(), LOSS, Interrupted(language_data(), 5), LAYERS, labels="data", checkpoint=file)
    assert not file.exists()


# Headers


def fits(model: nn.Module) -> list[Any]:
    data = language_data(2)
    return [
        KFAC.fit(model, LOSS, data, LAYERS, labels="model", draws=2, seed=7),
        EKFAC.fit(model, LOSS, data, LAYERS, labels="model", draws=2, seed=7),
        Covariance.fit(model, LOSS, data, LAYERS, labels="model", draws=2, seed=7),
    ]


def test_files_say_where_they_come_from(tmp_path: Path) -> None:
    model = llama()
    for fit in fits(model):
        file = tmp_path / f"{type(fit).__name__}.safetensors"
        fit.save(file)
        with safe_open(file, framework="pt") as raw:
            header = raw.metadata()
        for word in ("LlamaForCausalLM", "model.layers.1.mlp.down_proj", "torch.float32", '"draws": 2', '"seed": 7'):
            assert word in "".join(header.values()), word
        assert '"terms": 18' in "".join(header.values())
        assert '"positions": 18' in "".join(header.values())
        loaded = type(fit).load(file, model=model)
        assert loaded.origin == fit.origin
        assert loaded.labels == "model"
        assert all(torch.equal(t, tensors_of(fit)[name]) for name, t in tensors_of(loaded).items())
        for block, own in zip(loaded.spectrum().blocks, fit.spectrum().blocks, strict=True):
            assert block.total == own.total
            assert torch.equal(block.values, own.values)


def test_statistics_of_weights_that_moved_are_noticed(tmp_path: Path) -> None:
    model = llama()
    saved = fits(model)
    for i, fit in enumerate(saved):
        fit.save(tmp_path / f"{i}.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    for moved in (down, "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):  # below and above matter too
        weight = model.get_parameter(moved)
        before = weight.detach().clone()
        for edit in (lambda w: w[3, 4].mul_(1 + 1e-6), lambda w: w.copy_(w.flip(0))):
            with torch.no_grad():
                edit(weight)
            for i, fit in enumerate(saved):
                with pytest.raises(ValueError, match=rf"the weights \['{moved}'\] are not those"):
                    type(fit).load(tmp_path / f"{i}.safetensors", model=model)
            with torch.no_grad():
                weight.copy_(before)
    with torch.no_grad():
        model.get_parameter(down)[3, 4] *= 1 + 1e-6
    for i, fit in enumerate(saved):
        type(fit).load(tmp_path / f"{i}.safetensors")
        with pytest.raises(ValueError, match="no layer fits"):
            type(fit).load(tmp_path / f"{i}.safetensors", model=tiny_gpt2(vocabulary=WORDS))
        wider = tiny_llama(vocabulary=WORDS)
        wider.model.layers[0].mlp.down_proj = nn.Linear(40, 32, bias=False)
        with pytest.raises(ValueError, match="statistics are of"):
            type(fit).load(tmp_path / f"{i}.safetensors", model=wider)


def test_merged_statistics_keep_an_origin_they_share(tmp_path: Path) -> None:
    model, data = llama(), language_data(2)
    parts = [KFAC.fit(model, LOSS, [batch], LAYERS, labels="data") for batch in data]
    assert KFAC.merge(*parts).origin == parts[0].origin
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    moved = KFAC.fit(model, LOSS, data, LAYERS, labels="data")
    merged = KFAC.merge(parts[0], moved)
    assert merged.origin is None
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert KFAC.merge(moved, KFAC.fit(model, LOSS, data, LAYERS, labels="data")).origin is None
    merged.save(tmp_path / "merged.safetensors")
    assert KFAC.load(tmp_path / "merged.safetensors").origin is None
    with pytest.raises(ValueError, match="do not say where they come from"):
        KFAC.load(tmp_path / "merged.safetensors", model=model)


def test_checksums_tell_bytes_apart_wherever_they_lie() -> None:
    torch.manual_seed(0)
    wide = torch.randn(700, 400)  # more than a piece
    found = {
        digest([("a", t)]) for t in (wide, wide.flip(0), wide.flip(1), wide.roll(1, 0), wide[[1, 0, *range(2, 700)]])
    }
    assert len(found) == 5
    for dtype in (torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.complex64):
        t = (wide[0, :7] * 50).relu().to(dtype)
        same = (t, t.clone(), torch.cat([t[:1], t])[1:], torch.stack([t, t], 1)[:, 0])  # not aligned, with strides
        assert len({digest([("a", u)]) for u in same}) == 1
        assert len({digest([("a", t.roll(i))]) for i in range(2)}) == 2
    other = {digest([("b", wide)]), digest([("a", wide.mT)]), digest([("a", wide.view(torch.int32))])}
    assert len(found | other) == 8
    assert digest([("a", torch.arange(5))]) == "ade2cd3070c18546"  # of files that were written before


def test_weights_that_are_nowhere_do_not_crash() -> None:
    assert weights_checksum(llama().to("meta")) == weights_checksum(llama().to("meta"))
    assert weights_checksum(llama().to("meta")) != weights_checksum(llama())
