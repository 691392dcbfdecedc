"""The conformance set: artefacts as a production run leaves them, correct or with faults that a check must name.

`make` builds a run from a seed, lets each fault change one stage of it, and writes the files of a storage format. A
fault that would change nothing on this spectrum (a cut eigenspace where no two values are equal) is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from curvlab.crosscheck import fault_files, fault_masks  # noqa: F401  (their classes register themselves)
from curvlab.crosscheck.artefacts import KINDS, LAYOUTS, STORAGES, File, Files, Kind, Run, Storage, synthetic
from curvlab.crosscheck.fault_classes import FAULTS, STAGES, Fault, NoDifference
from curvlab.crosscheck.production import AUTHORS, KRONFLUENCE, OURS, Corpus

__all__ = ["FAULTS", "KINDS", "STORAGES", "Artefact", "Fault", "Kind", "NoDifference", "Storage", "make"]

GAMMAS = (0.5, 0.7, 0.9, 0.97)


@dataclass(frozen=True)
class Artefact:
    """What `make` wrote, and what a check is given besides.

    Attributes:
        faults: names, in the order of the stages; none for a correct one.
        corpus: model, loss, data and layer, where the factors are of a real model.
    """

    folder: Path
    files: tuple[Path, ...]
    faults: tuple[str, ...]
    layer: str
    gamma: float
    corpus: Corpus | None


def make(
    folder: str | Path,
    *,
    shape: tuple[int, int] = (6, 9),
    seed: int = 0,
    spectrum: Kind = "power",
    fault: str | Sequence[str] | None = None,
    storage: Storage = "authors",
    gamma: float | None = None,
) -> Artefact:
    """Write one artefact.

    Args:
        shape: (d_out, d_in) of the weight, each at least 2.
        spectrum: of the factors, or "model": factors of a small real model, which some faults need.
        fault: one of `FAULTS`, several of them, or None for a correct artefact.
        gamma: energy share of the cache; drawn with the seed where None.

    Raises:
        ValueError: an unknown fault, spectrum or storage, or a fault that this storage or spectrum cannot show.
        NoDifference: a fault that would change nothing.
    """
    names = [fault] if isinstance(fault, str) else list(fault or ())
    _check(shape, spectrum, names, storage)
    ordered = sorted(dict.fromkeys(names), key=lambda name: STAGES.index(FAULTS[name].stage))
    run, files = _build(shape, seed, spectrum, ordered, storage, gamma)
    for name, file in files.items():
        file.write(Path(folder) / name)
    paths = tuple(Path(folder) / name for name in files)
    return Artefact(Path(folder), paths, tuple(ordered), run.layer, run.gamma, run.corpus)


def _check(shape: tuple[int, int], spectrum: str, names: Sequence[str], storage: str) -> None:
    if min(shape) < 2:
        raise ValueError(f"shape must be (d_out, d_in) of at least 2 each, got {shape}")
    if spectrum not in KINDS or storage not in STORAGES:
        raise ValueError(f"spectra are {KINDS}, storages {STORAGES}; got {spectrum!r} and {storage!r}")
    for name in names:
        if name not in FAULTS:
            raise ValueError(f"no fault {name!r}; there are {', '.join(FAULTS)}")
        if storage not in FAULTS[name].storages:
            raise ValueError(f"{name} shows in the storages {FAULTS[name].storages}, not in {storage!r}")
        if FAULTS[name].model and spectrum != "model":
            raise ValueError(f"{name} is a fault of factors of a real model: spectrum='model'")


def _build(
    shape: tuple[int, int], seed: int, spectrum: Kind, names: Sequence[str], storage: Storage, gamma: float | None
) -> tuple[Run, Files]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(2**31, (4,), generator=generator).tolist()
    if gamma is None:
        gamma = GAMMAS[draws[0] % len(GAMMAS)]
    single = bool(draws[1] % 2) and spectrum not in ("tail", "ties")
    staged = [[name for name in names if FAULTS[name].stage == stage] for stage in STAGES]
    if spectrum == "model":
        run = _real(shape, draws[2], staged[0], storage, gamma, generator, ours=bool(draws[3] % 2))
    else:
        A, S, count = synthetic(shape, spectrum, generator)
        run = Run("model.layers.5.mlp.down_proj", shape, gamma, A, S, count, generator)
    run.single, run.tied = single, spectrum == "ties"
    run.descending = storage != "kronfluence" and draws[1] % 3 == 0
    _apply(run, staged[1])
    run.decompose()
    run.cut()
    _apply(run, staged[2])
    run.correct()
    if storage == "edit":
        run.edit()
        _apply(run, staged[3])
        if "mask-all-removed" not in names and torch.equal(run.base.float(), run.edited.float()):
            raise NoDifference(f"γ = {gamma} removes every direction of this spectrum: there is no edit to look at")
    files = LAYOUTS[storage](run)
    for name in staged[4]:
        changed = FAULTS[name].change(run, files)
        if _same(files, changed):
            raise NoDifference(f"{name} leaves this artefact as it was")
        files = changed
    return run, files


def _real(
    shape: tuple[int, int], seed: int, names: Sequence[str], storage: Storage, gamma: float,
    generator: torch.Generator, ours: bool,
) -> Run:  # fmt: skip
    """A run on a small model, in our conventions or in those of the storage's authors."""
    faults = [FAULTS[name] for name in names]
    ours = (ours or any(f.ours for f in faults)) and not any(f.authors for f in faults)
    correct = (
        KRONFLUENCE if storage == "kronfluence" else OURS if ours or storage not in ("authors", "edit") else AUTHORS
    )
    prompts = "prompt-positions-dropped" in names or (correct == OURS and seed % 2 == 0)
    corpus = Corpus.make(shape, seed, prompts)
    choices = correct
    for f in faults:
        choices = f.change(choices)
    found = corpus.statistics(choices)
    if {*names} - {"per-batch-squares"}:  # which leaves the factors alone
        reference = corpus.statistics(correct)
        pairs = ((found.A, reference.A), (found.S, reference.S))
        if all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=0) for a, b in pairs):
            raise NoDifference(f"{' and '.join(names)} leave these factors as they were")
    run = Run(corpus.layer, shape, gamma, found.A, found.S, found.count, generator, corpus, choices)
    if choices.bias:
        run.shape = (shape[0], shape[1] + 1)
    return run


def _apply(run: Run, names: Sequence[str]) -> None:
    for name in names:
        before = _state(run)
        FAULTS[name].change(run)
        after = _state(run)
        if before.keys() == after.keys() and all(torch.equal(t, after[key]) for key, t in before.items()):
            raise NoDifference(f"{name} leaves this artefact as it was")


def _state(run: Run) -> dict[str, Tensor]:
    tensors = {name: t.clone() for name, t in vars(run).items() if isinstance(t, Tensor)}
    return tensors | {"count": torch.tensor(run.count)}


def _same(one: Files, other: Files) -> bool:
    """Equal contents, shapes and dtypes included."""
    return one.keys() == other.keys() and all(_leaves(one[name]) == _leaves(other[name]) for name in one)


def _leaves(file: File) -> list[object]:
    items = file.content.items() if isinstance(file.content, dict) else [("", file.content)]
    return [(k, str(v.dtype), v.shape, v.tolist()) if isinstance(v, Tensor) else (k, v) for k, v in items]
