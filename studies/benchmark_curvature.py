"""Speed side by side with other libraries: same work, same dtype, same threads, and the answers compared.

    python studies/benchmark_curvature.py --preset default --out results/benchmark

Sections (`--sections` chooses):

* exact: dense GGN and Hessian of one layer, against curvlinops, nngeometry, torch.func and one matrix product.
* kronecker: K-FAC and EK-FAC of all layers with exact labels, against curvlinops and nngeometry.
* topk: the projector of the leading eigenpairs at γ = 0.9, against a dense matrix and a full `eigh`.
* sweep: fine-tuning at many γ in one run, against one γ after another.
* step: one constrained step of one large layer, against the four full matrix products.
* growth: our time and memory against n (examples), d (width) and k (eigenpairs).

Every number is the least of several turns, ours and the peers' taken alternately after a warm-up; what takes long
runs once. Writes DIR/benchmark.json (one row a comparison), DIR/growth.csv and DIR/benchmark.md.
"""

import copy
import gc
import importlib.metadata
import json
import math
import platform
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.profiler import ProfilerActivity, profile

from curvlab.capture import split_at
from curvlab.curvature import EKFAC, KFAC, GaussNewton, Hessian
from curvlab.curvature.products import OuterRows, RowGram, pack_symmetric
from curvlab.data import load_pair, subset
from curvlab.descent import attach
from curvlab.eigenbasis import parametrize
from curvlab.layers import LayerShape, Matrices, find_layers
from curvlab.losses import CrossEntropy
from curvlab.memory import human
from curvlab.models import MLP, LeNet5, pretrain
from curvlab.progress import progress
from curvlab.projector import NullSpace
from curvlab.records import Row, provenance
from curvlab.spectrum import Block, KroneckerBasis, Spectrum
from curvlab.sweep import sweep

Section = Literal["exact", "kronecker", "topk", "sweep", "step", "growth"]
SECTIONS: tuple[Section, ...] = ("exact", "kronecker", "topk", "sweep", "step", "growth")
LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
LONG = 8.0  # seconds; what takes longer is not repeated


@dataclass(frozen=True)
class Sizes:
    """How much work a preset does.

    Attributes:
        turns: of each measurement, after the warm-up.
        train: images and epochs that LeNet-5 is trained on beforehand.
        layer, images: of the exact curvatures; a peer runs on `columns` columns or on `peer_images` images.
        kronecker_images: of K-FAC and EK-FAC.
        topk_layer: of the projector.
        gammas, epochs, sweep_images: of the sweep.
        shape, tokens: (d_out, d_in) of the layer of the constrained step, and its inputs.
        growth: (n, d, k) in the middle; each is also halved and doubled.
    """

    turns: int
    train: tuple[int, int]
    layer: str
    images: int
    columns: int
    peer_images: int
    kronecker_images: int
    topk_layer: str
    gammas: tuple[float, ...]
    epochs: int
    sweep_images: int
    shape: tuple[int, int]
    tokens: int
    growth: tuple[int, int, int]


TINY = Sizes(
    turns=1, train=(500, 1), layer="fc3", images=200, columns=64, peer_images=100, kronecker_images=100,
    topk_layer="fc3", gammas=(0.5, 0.9, 0.99), epochs=1, sweep_images=200, shape=(48, 96), tokens=32,
    growth=(100, 12, 8),
)  # fmt: skip
SMOKE = Sizes(
    turns=2, train=(2000, 2), layer="fc2", images=500, columns=64, peer_images=50, kronecker_images=500,
    topk_layer="fc3", gammas=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999), epochs=1, sweep_images=1000,
    shape=(192, 1120), tokens=64, growth=(500, 32, 16),
)  # fmt: skip
DEFAULT = Sizes(
    turns=3, train=(6000, 4), layer="fc2", images=9000, columns=512, peer_images=500, kronecker_images=10_000,
    topk_layer="fc2", gammas=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999), epochs=2, sweep_images=5000,
    shape=(1536, 8960), tokens=512, growth=(4000, 48, 32),
)  # fmt: skip
PRESETS = {"tiny": TINY, "smoke": SMOKE, "default": DEFAULT}


@dataclass(frozen=True)
class Config:
    """Command line of the benchmark.

    Attributes:
        preset: tiny (seconds, for tests), smoke (two minutes) or default (the numbers of the README).
        out: folder of the results.
        seed: of the model, the data and the random vectors.
        threads: that torch may use, for us and for the peers alike.
        sections: which comparisons.
    """

    preset: Literal["tiny", "smoke", "default"] = "default"
    out: Path = Path("results/benchmark")
    seed: int = 0
    threads: int = 2
    sections: tuple[Section, ...] = SECTIONS


@dataclass(frozen=True)
class Setup:
    """A trained LeNet-5 and its images."""

    sizes: Sizes
    seed: int
    model: LeNet5
    x: Tensor
    y: Tensor


# --- measuring -------------------------------------------------------------------------------------------------------


def race(turns: int, work: dict[str, Callable[[], Any]], slow: float = LONG) -> dict[str, tuple[float, Any]]:
    """(least seconds, last result) of each, taking turns after a warm-up; what is slow (seconds) runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    results: dict[str, Any] = {}
    for turn in range(turns + 1):
        for name, function in work.items():
            if turn and seconds[name][0] > slow:
                continue
            results.pop(name, None)
            start = time.perf_counter()
            results[name] = function()
            seconds[name].append(time.perf_counter() - start)
    return {name: (min(times[1:] or times), results[name]) for name, times in seconds.items()}


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that `function` holds allocated at one time, beyond what was there before (CPU tensors)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours − theirs| / max |theirs|."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def comparison(
    work: str, ours_s: float, peer: str, peer_s: float, diff: float, goal: float | None = None, note: str = "",
    ours_bytes: int | None = None, peer_bytes: int | None = None,
) -> Row:  # fmt: skip
    """One row: ratio = peer_s / ours_s, and whether it reaches the goal."""
    ratio = peer_s / ours_s
    if not math.isfinite(diff):  # (a peer's softmax Hessian is not a number where predictions are sure)
        note += "; the peer's result is not finite, so that there is nothing to compare"
    return {
        "work": work, "ours_s": ours_s, "peer": peer, "peer_s": peer_s, "ratio": ratio,
        "max_rel_diff": diff if math.isfinite(diff) else None,
        "goal": goal, "met": None if goal is None else ratio >= goal, "note": note,
        "ours_bytes": ours_bytes, "peer_bytes": peer_bytes,
    }  # fmt: skip


def have(package: str) -> bool:
    """Whether an optional peer is installed; says so if not."""
    found = find_spec(package) is not None
    if not found:
        print(f"{package} is not installed: its rows are left out (pip install 'curvlab[peers]')")
    return found


def about_this_run(config: Config) -> Row:
    """Where and with what the numbers were measured."""
    peers = ("curvlinops-for-pytorch", "nngeometry")
    installed = {d.name.lower() for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in peers if name in installed}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    names = ("model name", "cpu family", "model")
    cpu = ", ".join(f"{name} {fields[name]}" for name in names if name in fields) or platform.processor()
    return provenance() | versions | {"cpu": cpu, "dtype": "float32", "preset": config.preset, "seed": config.seed}


def prepare(config: Config) -> Setup:
    """LeNet-5 trained on the embedded digits, and as many of them as the largest section asks for."""
    sizes = PRESETS[config.preset]
    digits = load_pair("embedded").pretrain_train
    torch.manual_seed(config.seed)
    model = LeNet5()
    train = subset(digits, sizes.train[0], config.seed)
    pretrain(model, train.x, train.y, epochs=sizes.train[1], seed=config.seed)
    images = subset(digits, max(sizes.images, sizes.kronecker_images), config.seed + 1)
    return Setup(sizes, config.seed, model.eval(), images.x, images.y)


# --- exact -----------------------------------------------------------------------------------------------------------


def exact(setup: Setup) -> Iterator[Row]:
    """Dense GGN and Hessian of one layer's weight."""
    sizes, n = setup.sizes, setup.sizes.images
    x, y = setup.x[:n], setup.y[:n]
    body, head = split_at(setup.model, sizes.layer)
    with torch.no_grad():
        z = body(x)
    p = head.get_parameter(f"{sizes.layer}.weight").numel()
    for name, curvature in (("GGN", GaussNewton), ("Hessian", Hessian)):
        work = f"dense {name} of {sizes.layer}.weight ({p:,}²), {n:,} images"

        def ours(n: int = n, curvature: Any = curvature) -> Tensor:
            return curvature.fit(setup.model, CrossEntropy(), [(x[:n], y[:n])], [sizes.layer]).dense()

        ours_s, C = race(sizes.turns, {"ours": ours})["ours"]
        if name == "GGN":
            product_s, diff = matrix_product(setup, x, y, C)
            note = "a ratio of 0.33 is three times the product's time; ours includes the pass over the images"
            yield comparison(work, ours_s, "the one matrix product it needs", product_s, diff, 1 / 3, note)
        columns = torch.randperm(p, generator=torch.Generator().manual_seed(setup.seed))[: sizes.columns]
        if have("curvlinops"):
            for model, inputs, how in (
                (setup.model, x, "whole model"),
                (head, z, "head alone, its inputs given; ours has the whole model"),
            ):
                factor = p / len(columns)
                peer = partial(curvlinops_columns, model, sizes.layer, name, inputs, y, columns)
                seconds, part = race(1, {"peer": peer})["peer"]
                note = f"{how}; {len(columns)} of {p:,} columns, time × {factor:.1f}"
                yield comparison(
                    work, ours_s, "curvlinops", factor * seconds, difference(C[:, columns], part), 20, note
                )
        m = sizes.peer_images
        factor = n / m
        few = ours(m)
        others: dict[str, Callable[[], Tensor]] = {}
        if name == "GGN":
            others["torch.func (jacrev)"] = partial(torch_func_ggn, head, sizes.layer, z[:m])
            if have("nngeometry"):
                others["nngeometry PMatDense"] = partial(nngeometry_dense, head, sizes.layer, z[:m], y[:m])
        else:
            others["torch.func (jvp of jacrev)"] = partial(torch_func_hessian, head, sizes.layer, z[:m], y[:m])
        for peer_name, function in others.items():
            seconds, dense = race(1, {"peer": function})["peer"]
            note = f"head alone, its inputs given; {m} of {n:,} images, time × {factor:.1f}"
            yield comparison(work, ours_s, peer_name, factor * seconds, difference(few, dense), 20, note)


def matrix_product(setup: Setup, x: Tensor, y: Tensor, C: Tensor) -> tuple[float, float]:
    """Seconds of the product of the symmetric halves of g gᵀ and a aᵀ, and how far C is from it."""
    ggn = GaussNewton.fit(setup.model, CrossEntropy(), [(x, y)], [setup.sizes.layer])
    assert isinstance(ggn.product, RowGram)
    (rows,) = ggn.product.rows
    assert isinstance(rows, OuterRows)
    d_out, d_in = rows.layer.d_out, rows.layer.d_in
    (i, j), (k, l) = torch.triu_indices(d_in, d_in), torch.triu_indices(d_out, d_out)
    inner = pack_symmetric(rows.a, i, j)
    outer = torch.cat([(g.mT @ g)[:, k, l] for g in rows.g.split(512)])
    seconds, halves = race(setup.sizes.turns, {"product": lambda: outer.mT @ inner})["product"]
    blocks = C.view(d_out, d_in, d_out, d_in)[k[:, None], i, l[:, None], j]
    return seconds, difference(blocks, halves / len(x))


def curvlinops_columns(
    model: nn.Module, layer: str, name: str, inputs: Tensor, y: Tensor, columns: Tensor, batch: int = 1000
) -> Tensor:
    """Columns of a curvature matrix by products with identity columns."""
    import curvlinops

    operator = {"GGN": curvlinops.GGNLinearOperator, "Hessian": curvlinops.HessianLinearOperator}[name]
    weight = model.get_parameter(f"{layer}.weight")
    batches = list(zip(inputs.split(batch), y.split(batch), strict=True))
    C = operator(model, nn.CrossEntropyLoss(), [weight], batches, check_deterministic=False, num_data=len(y))
    parts = []
    for some in columns.split(64):
        unit = torch.zeros(weight.numel(), len(some))
        unit[some, torch.arange(len(some))] = 1.0
        parts.append(C @ unit)
    return torch.cat(parts, dim=1).detach()


def torch_func_ggn(head: nn.Module, layer: str, z: Tensor, batch: int = 250) -> Tensor:
    """Σ Jᵀ H J / n from per-example Jacobians."""
    name = f"{layer}.weight"
    W = head.get_parameter(name).detach()

    def logits(W: Tensor, z: Tensor) -> Tensor:
        return functional_call(head, {name: W}, (z[None],))[0]

    G = torch.zeros(W.numel(), W.numel())
    for part in z.split(batch):
        with torch.no_grad():
            q = head(part).softmax(-1)[:, :, None]
        J = vmap(jacrev(logits), (None, 0))(W, part).flatten(2).detach()
        HJ = q * (J - (q * J).sum(1, keepdim=True))
        G.addmm_(J.flatten(0, 1).mT, HJ.flatten(0, 1))
    return G / len(z)


def torch_func_hessian(head: nn.Module, layer: str, z: Tensor, y: Tensor) -> Tensor:
    """torch.func.hessian (forward over reverse), in chunks of columns so that it fits."""
    name = f"{layer}.weight"
    W = head.get_parameter(name).detach()

    def loss(W: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(head, {name: W}, (z,)), y)

    def column(unit: Tensor) -> Tensor:
        return jvp(jacrev(loss), (W,), (unit.view_as(W),))[1].flatten()

    return vmap(column, chunk_size=256)(torch.eye(W.numel())).detach()


def nngeometry_dense(head: nn.Module, layer: str, z: Tensor, y: Tensor) -> Tensor:
    """The FIM of the logits' distribution, which is the GGN of cross-entropy."""
    from nngeometry.layercollection import LayerCollection, LinearLayer
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDense

    module = head.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    collection = LayerCollection()
    collection.add_layer(layer, LinearLayer(module.in_features, module.out_features, bias=False))
    return FIM(head, (z.clone(), y), PMatDense, layer_collection=collection).to_torch().detach()


# --- K-FAC and EK-FAC ------------------------------------------------------------------------------------------------


def kronecker(setup: Setup) -> Iterator[Row]:
    """K-FAC and EK-FAC of all layers, biases joined, exact labels; compared by products with a random vector."""
    n = setup.sizes.kronecker_images
    x, y = setup.x[:n], setup.y[:n]
    generator = torch.Generator().manual_seed(setup.seed)
    v = torch.randn(sum(p.numel() for p in setup.model.parameters()), generator=generator)

    def ours_kfac() -> KFAC:
        return KFAC.fit(setup.model, CrossEntropy(), [(x, y)], LAYERS, labels="exact", bias=True)

    def ours_ekfac() -> EKFAC:
        return EKFAC.fit(setup.model, CrossEntropy(), [(x, y)], LAYERS, labels="exact", bias=True)

    for name, ours in (("K-FAC", ours_kfac), ("EK-FAC", ours_ekfac)):
        work: dict[str, Callable[[], Any]] = {"ours": ours}
        notes = {}
        for peer, fit in (("curvlinops", curvlinops_kronecker), ("nngeometry", nngeometry_kronecker)):
            if have(peer):
                batch = best_batch(partial(attempt, partial(fit, setup.model, name)), x, y)
                work[peer] = partial(attempt, partial(fit, setup.model, name), x, y, batch)
                notes[peer] = f"its fastest batch of 64 to 512: {batch}"
        timed = race(setup.sizes.turns, work)
        ours_s, fitted = timed.pop("ours")
        mine = product(setup.model, fitted.spectrum(), v)
        for peer, (seconds, apply) in timed.items():
            if apply is None:
                print(f"{peer} has no {name} of this model: its float32 eigh fails", flush=True)
                continue
            theirs = apply(v)
            note = notes[peer]
            if (peer, name) == ("nngeometry", "K-FAC"):
                note += "; its A is √9 · positions times ours and its S the inverse of that, A ⊗ S is the same"
            diff = max(
                difference(a, b)
                for a, b in zip(by_layer(setup.model, mine), by_layer(setup.model, theirs), strict=True)
            )
            goal = {"curvlinops": 2.0, "nngeometry": 1.0}[peer]
            yield comparison(
                f"{name} of all LeNet-5 layers, exact labels, {n:,} images", ours_s, peer, seconds, diff, goal, note
            )


def attempt(fit: Callable[..., Any], *arguments: Any) -> Any:
    """What `fit` gives, None where a peer's float32 eigh fails (dead units, sure predictions)."""
    try:
        return fit(*arguments)
    except torch.linalg.LinAlgError:
        return None


def best_batch(fit: Callable[[Tensor, Tensor, int], Any], x: Tensor, y: Tensor) -> int:
    """The batch size at which a peer is fastest, tried on a few images."""
    x, y = x[:512], y[:512]
    timed = race(1, {str(batch): partial(fit, x, y, batch) for batch in (64, 128, 256, 512) if batch <= len(x)})
    return int(min(timed, key=lambda batch: timed[batch][0])) if timed else len(x)


def product(model: nn.Module, spectrum: Spectrum, v: Tensor) -> Tensor:
    """C v in the order of the model's parameters, from a Kronecker spectrum."""
    delta: Matrices = {}
    parts = dict(zip((name for name, _ in model.named_parameters()), split_parameters(model, v), strict=True))
    layers = find_layers(model, LAYERS, bias=True)
    for layer in layers:
        delta[layer.name] = layer.matrix([parts[name] for name in layer.parameter_names])
    out: dict[str, Tensor] = {}
    for layer, block in zip(layers, spectrum.blocks, strict=True):
        Z = block.basis.rotate({layer.name: delta[layer.name].double()}) * block.values
        Cv = block.basis.rotate_back(Z)[layer.name].float()
        out |= dict(zip(layer.parameter_names, layer.tensors(Cv), strict=True))
    return torch.cat([out[name].flatten() for name, _ in model.named_parameters()])


def split_parameters(model: nn.Module, v: Tensor) -> list[Tensor]:
    """A flat vector as tensors shaped like the model's parameters."""
    shapes = [p.shape for p in model.parameters()]
    return [part.view(shape) for part, shape in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]


def by_layer(model: nn.Module, v: Tensor) -> list[Tensor]:
    """A flat vector cut into layers (weight and bias), whose scales differ."""
    parts = [part.flatten() for part in split_parameters(model, v)]
    return [torch.cat(parts[i : i + 2]) for i in range(0, len(parts), 2)]


def curvlinops_kronecker(model: nn.Module, name: str, x: Tensor, y: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """curvlinops' type-2 Fisher, weight and bias joined; its product with a vector."""
    from curvlinops import EKFACLinearOperator, FisherType, KFACLinearOperator

    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    operator = (KFACLinearOperator if name == "K-FAC" else EKFACLinearOperator)(
        model, nn.CrossEntropyLoss(), list(model.parameters()), batches, fisher_type=FisherType.TYPE2,
        separate_weight_and_bias=False, check_deterministic=False, num_data=len(x), num_per_example_loss_terms=1,
    )  # fmt: skip
    operator.compute_kronecker_factors()
    if name == "EK-FAC":
        operator.compute_eigenvalue_correction()
    return lambda v: (operator @ v).detach()


def nngeometry_kronecker(model: nn.Module, name: str, x: Tensor, y: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """nngeometry's FIM in the logits; its product with a vector."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatEKFAC, PMatKFAC, PVector

    loader = _whole_batches(x, y, batch)
    if name == "K-FAC":
        matrix = FIM(model, loader, PMatKFAC)
    else:
        matrix = FIM(model, loader, PMatEKFAC)
        matrix.update_diag(loader)
    collection = matrix.generator.layer_collection
    return lambda v: matrix.mv(PVector(collection, vector_repr=v)).to_torch().detach()


def _whole_batches(x: Tensor, y: Tensor, batch: int) -> torch.utils.data.DataLoader[Any]:
    """A loader that slices tensors instead of collating examples one by one."""

    class Slices(torch.utils.data.DataLoader[Any]):
        def __iter__(self) -> Any:
            return iter([(a.clone(), b) for a, b in zip(x.split(batch), y.split(batch), strict=True)])

    return Slices(torch.utils.data.TensorDataset(x, y), batch_size=batch)


# --- leading eigenpairs ----------------------------------------------------------------------------------------------


def topk(setup: Setup, gamma: float = 0.9) -> Iterator[Row]:
    """The projector at γ from leading eigenpairs, against the dense matrix and its full decomposition."""
    sizes, n = setup.sizes, setup.sizes.images
    data = [(setup.x[:n], setup.y[:n])]

    def ours() -> NullSpace:
        ggn = GaussNewton.fit(setup.model, CrossEntropy(), data, [sizes.topk_layer])
        return ggn.spectrum(gamma=gamma).null_space(gamma)

    retried: list[str] = []

    def full() -> tuple[Tensor, int]:
        ggn = GaussNewton.fit(setup.model, CrossEntropy(), data, [sizes.topk_layer])
        C = ggn.dense("rows")
        try:
            values, vectors = torch.linalg.eigh(C)
        except torch.linalg.LinAlgError:  # dead units: many zero eigenvalues; float32 does not converge
            values, vectors = (t.float() for t in torch.linalg.eigh(C.double()))
            retried.append("its eigh failed to converge in float32 and was repeated in float64; ")
        values, vectors = values.flip(0).clamp_min(0).double(), vectors.flip(1)
        k = int(torch.searchsorted(values.cumsum(0), gamma * values.sum())) + 1
        return vectors[:, :k].clone(), k

    timed = race(sizes.turns, {"ours": ours, "full": full})
    (ours_s, null), (full_s, (removed, k)) = timed["ours"], timed["full"]
    (layer,) = null.layers
    Q = torch.randn(8, layer.d_out, layer.d_in, generator=torch.Generator().manual_seed(setup.seed))
    mine = null.project({layer.name: Q})[layer.name].flatten(1)
    theirs = Q.flatten(1) - (Q.flatten(1) @ removed) @ removed.mT
    note = (
        "".join(retried[:1])
        + f"both with the pass over the images; k = {null.removed} and {k}; compared by projecting 8 random vectors"
    )
    yield comparison(
        f"projector of {layer.name}.weight at γ = {gamma}, {n:,} images", ours_s,
        "our dense matrix and torch.linalg.eigh", full_s, difference(mine, theirs), 20, note,
    )  # fmt: skip


# --- all γ at once ---------------------------------------------------------------------------------------------------


def all_gammas(setup: Setup) -> Iterator[Row]:
    """Fine-tuning fc2 on letters under K-FAC's null spaces, all γ in one run against one after another."""
    sizes, layer = setup.sizes, "fc2"
    data = [(setup.x[: sizes.images], setup.y[: sizes.images])]
    spectrum = KFAC.fit(setup.model, CrossEntropy(), data, [layer], labels="exact").spectrum()
    constraints = [spectrum.null_space(gamma) for gamma in sizes.gammas]
    letters = subset(load_pair("embedded").finetune_train, sizes.sweep_images, setup.seed)
    body, head = split_at(setup.model, layer)
    with torch.no_grad():
        z = body(letters.x)
    sgd = partial(torch.optim.SGD, lr=0.05)
    settings: dict[str, Any] = {"epochs": sizes.epochs, "batch_size": 128, "seed": setup.seed}

    def together() -> Tensor:
        return sweep(head, layer, CrossEntropy(), z, letters.y, constraints, optimizer=sgd, **settings).weights

    def apart() -> Tensor:
        runs = [sweep(head, layer, CrossEntropy(), z, letters.y, [c], optimizer=sgd, **settings) for c in constraints]
        return torch.cat([run.weights for run in runs])

    def plain() -> Tensor:
        return torch.stack([train_plainly(head, layer, z, letters.y, c, sgd, **settings) for c in constraints])

    timed = race(sizes.turns, {"together": together, "apart": apart, "plain": plain})
    ours_s, W = timed["together"]
    work = f"{len(constraints)} γ of {layer}, K-FAC, {sizes.epochs} epochs of {len(z):,} letters"
    for peer, key in (
        ("our sweep, one γ after another", "apart"),
        ("a plain torch loop with our hook, one after another", "plain"),
    ):
        seconds, theirs = timed[key]
        yield comparison(work, ours_s, peer, seconds, difference(W, theirs), 4, "drift rule off; same minibatches")


def train_plainly(
    head: nn.Module, layer: str, z: Tensor, y: Tensor, constraint: NullSpace,
    make: Callable[..., torch.optim.Optimizer], *, epochs: int, batch_size: int, seed: int,
) -> Tensor:  # fmt: skip
    """The usual loop: a model, an optimiser with the projection attached, minibatches."""
    model = copy.deepcopy(head).requires_grad_(False)
    weight = model.get_parameter(f"{layer}.weight").requires_grad_(True)
    optimizer = make([weight])
    attach(model, optimizer, constraint)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(z), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(z[index]), y[index]).backward()
            optimizer.step()
    return weight.detach().clone()


# --- one constrained step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """One linear layer, its inputs and the gradients at its outputs."""

    W: Tensor
    x: Tensor
    g: Tensor
    lr: float = 1.0

    def model(self) -> nn.Sequential:
        """A fresh model of that one layer."""
        layer = nn.Linear(self.W.shape[1], self.W.shape[0], bias=False)
        with torch.no_grad():
            layer.weight.copy_(self.W)
        return nn.Sequential(OrderedDict(layer=layer))


@dataclass(frozen=True)
class Stepper:
    """A way to take the constrained step.

    Attributes:
        step: take it once, from the same start each time.
        displacement: what the last step came to.
        held: bytes of eigenvectors, masks and coordinates that must be kept between steps.
    """

    step: Callable[[], None]
    displacement: Callable[[], Tensor]
    held: int


def step(setup: Setup) -> Iterator[Row]:
    """One SGD step of one layer under a null space: forward, backward, constraint, update."""
    sizes = setup.sizes
    (d_out, d_in), T = sizes.shape, sizes.tokens
    generator = torch.Generator().manual_seed(setup.seed)
    shape = LayerShape("layer", d_out, d_in, False)
    u_out, u_in = (torch.linalg.qr(torch.randn(d, d, generator=generator))[0].contiguous() for d in (d_out, d_in))
    basis = KroneckerBasis(shape, u_out, u_in)
    W = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    x, g = torch.randn(T, d_in, generator=generator), torch.randn(T, d_out, generator=generator) / (T * d_in) ** 0.5
    bench = Bench(W, x, g)
    worst: dict[str, list[Row]] = {"better": [], "cached": []}
    for label, (outer, inner) in spectra(setup).items():
        values = outer[:, None] * inner[None, :]
        spectrum = Spectrum((Block(basis, values, float(values.sum())),))
        for gamma in (0.5, 0.7, 0.9, 0.99):
            null = spectrum.null_space(gamma)
            work = f"constrained step ({d_out}, {d_in}), {T} tokens, {label}, γ = {gamma}"
            (block,) = null.blocks
            rows, columns = int(block.removed.any(1).sum()), int(block.removed.any(0).sum())
            for lowest in (False, True):
                ways = {"full": full_products(bench, null, lowest)}
                if lowest:
                    ways["eigenbasis, lowest"] = eigenbasis_step(bench, null, lowest=True, cached=False)
                    ways["eigenbasis, lowest, cached"] = eigenbasis_step(bench, null, lowest=True, cached=True)
                else:
                    ways["staircase"] = staircase_step(bench, null)
                    ways["eigenbasis"] = eigenbasis_step(bench, null, lowest=False, cached=False)
                timed = race(sizes.turns, {name: way.step for name, way in ways.items()}, slow=1.0)
                peaks = {name: way.held + peak_bytes(way.step) for name, way in ways.items()}
                full_s, _ = timed.pop("full")
                reference = ways["full"].displacement()
                note = f"staircase {rows} × {columns}; {'lowest layer' if lowest else 'gradient at the inputs too'}"
                here = {}
                for name, (seconds, _) in timed.items():
                    diff = difference(ways[name].displacement(), reference)
                    here[name] = comparison(
                        f"{work}: {name}", seconds, "four full products", full_s, diff, None, note, peaks[name],
                        peaks["full"],
                    )  # fmt: skip
                yield from here.values()
                if lowest:
                    worst["cached"].append(here["eigenbasis, lowest, cached"])
                else:
                    worst["better"].append(max(here.values(), key=lambda row: row["ratio"]))
    for key, goal, label in (
        ("better", 2.5, "better of staircase and eigenbasis, worst case over spectra and γ"),
        ("cached", 10.0, "eigenbasis with cached rotated inputs, worst case over spectra and γ"),
    ):
        row = min(worst[key], key=lambda row: row["ratio"])
        diff = max(row["max_rel_diff"] for row in worst[key])
        yield row | {
            "work": label,
            "goal": goal,
            "met": row["ratio"] >= goal,
            "max_rel_diff": diff,
            "note": f"in: {row['work']}",
        }


def spectra(setup: Setup) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvalues (λ_out, λ_in), float64: power laws, and those of a trained layer stretched to the shape."""
    d_out, d_in = setup.sizes.shape
    found = {
        f"power law {a}": tuple(torch.arange(1, d + 1, dtype=torch.float64) ** -a for d in (d_out, d_in))
        for a in (0.6, 1.0, 1.5)
    }
    data = [(setup.x[: setup.sizes.images], setup.y[: setup.sizes.images])]
    factors = KFAC.fit(setup.model, CrossEntropy(), data, ["fc1"], labels="exact").factors["fc1"]
    found["LeNet's fc1, stretched"] = tuple(
        stretched(torch.linalg.eigvalsh(factor.double()).flip(0), d)
        for factor, d in ((factors.S, d_out), (factors.A, d_in))
    )
    return found  # type: ignore[return-value]


def stretched(values: Tensor, d: int) -> Tensor:
    """A spectrum of another length: log λ (at least 1e-12 of the top) interpolated over the relative index."""
    logs = values.clamp_min(1e-12 * float(values[0])).log()
    return F.interpolate(logs[None, None], size=d, mode="linear", align_corners=True)[0, 0].exp()


def full_products(bench: Bench, null: NullSpace, lowest: bool) -> Stepper:
    """P Q = U_out ((U_outᵀ Q U_in) ⊙ M) U_inᵀ on the gradient, all eigenvectors, nothing skipped."""
    (block,) = null.blocks
    basis = block.basis
    assert isinstance(basis, KroneckerBasis)
    assert basis.u_out is not None
    u_out, u_in, keep = basis.u_out, basis.u_in, (~block.removed).float()
    model = bench.model()
    (weight,) = model.parameters()
    optimizer = torch.optim.SGD([weight], lr=bench.lr)

    def take() -> None:
        _restart(weight, bench.W)
        _forward_backward(model, bench, lowest)
        assert weight.grad is not None
        weight.grad = u_out @ ((u_out.mT @ weight.grad @ u_in) * keep) @ u_in.mT
        optimizer.step()
        optimizer.zero_grad()

    return Stepper(take, lambda: weight.detach() - bench.W, _bytes(u_out, u_in, keep))


def staircase_step(bench: Bench, null: NullSpace) -> Stepper:
    """The gradient hook with only the eigenvectors of the removed staircase."""
    model = bench.model()
    (weight,) = model.parameters()
    optimizer = torch.optim.SGD([weight], lr=bench.lr)
    compact = null.compact()
    descent = attach(model, optimizer, compact)
    (block,) = descent.constraint.blocks

    def take() -> None:
        _restart(weight, bench.W)
        _forward_backward(model, bench, lowest=False)
        optimizer.step()
        optimizer.zero_grad()

    return Stepper(take, lambda: weight.detach() - bench.W, _bytes(*block.basis.tensors().values(), block.removed))


def eigenbasis_step(bench: Bench, null: NullSpace, lowest: bool, cached: bool) -> Stepper:
    """Descent on Z, W = W0 + U_out (M ⊙ Z) U_inᵀ; `cached` hands over x U_in, computed once beforehand."""
    model = bench.model()
    eigen = parametrize(model, null)
    (Z,) = eigen.parameters()
    optimizer = torch.optim.SGD([Z], lr=bench.lr)
    eigen.attach(optimizer)
    rotated = eigen.rotate_input("layer", bench.x) if cached else None

    def take() -> None:
        _restart(Z, torch.zeros(()))
        if rotated is not None:
            eigen.use_rotated("layer", rotated)
        _forward_backward(model, bench, lowest)
        optimizer.step()
        optimizer.zero_grad()

    (block,) = null.blocks
    held = _bytes(Z, block.removed, *block.basis.tensors().values(), *([] if rotated is None else [rotated]))
    return Stepper(take, lambda: eigen.displacement()["layer"], held)


def _restart(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _forward_backward(model: nn.Module, bench: Bench, lowest: bool) -> None:
    x = bench.x if lowest else bench.x.detach().requires_grad_()  # layers below want their gradient
    model(x).backward(bench.g)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# --- growth ----------------------------------------------------------------------------------------------------------


def growth(setup: Setup) -> pd.DataFrame:
    """Seconds and peak memory of K-FAC, the GGN's leading pairs and the dense GGN of one d × d layer."""
    n0, d0, k0 = setup.sizes.growth
    points = [(n0, d0, k0)]
    for factor in (0.5, 2.0):
        points += [(int(n0 * factor), d0, k0), (n0, int(d0 * factor), k0), (n0, d0, int(k0 * factor))]
    rows = []
    for n, d, k in progress(sorted(points), "growth"):
        generator = torch.Generator().manual_seed(setup.seed)
        torch.manual_seed(setup.seed)
        model = MLP([d, d, d, 10]).eval()
        data = [(torch.randn(n, d, generator=generator), torch.randint(10, (n,), generator=generator))]
        ggn = partial(GaussNewton.fit, model, CrossEntropy(), data, ["fc2"])
        works: dict[str, Callable[[], Any]] = {
            "K-FAC": partial(KFAC.fit, model, CrossEntropy(), data, ["fc2"], labels="exact"),
            "GGN rows and top k": partial(leading, ggn, k),
            "dense GGN": partial(dense, ggn),
        }
        timed = race(setup.sizes.turns, works)
        for name, work in works.items():
            if name != "GGN rows and top k" and k != k0:
                continue  # k does not enter
            entry = {"work": name, "n": n, "d": d, "p": d * d, "k": k if "top" in name else None}
            rows.append(entry | {"seconds": timed[name][0], "peak_bytes": peak_bytes(work)})
    table = pd.DataFrame(rows)
    return table.sort_values(["work", "n", "d", "k"], ignore_index=True)


def leading(fit: Callable[[], GaussNewton], k: int) -> Spectrum:
    return fit().spectrum(k=k)


def dense(fit: Callable[[], GaussNewton]) -> Tensor:
    return fit().dense()


# --- the run ---------------------------------------------------------------------------------------------------------


RUNNERS: dict[Section, Callable[[Setup], Iterator[Row]]] = {
    "exact": exact, "kronecker": kronecker, "topk": topk, "sweep": all_gammas, "step": step,
}  # fmt: skip


def show(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as people read them."""
    table = pd.DataFrame(rows)[["work", "ours_s", "peer", "peer_s", "ratio", "goal", "met", "max_rel_diff", "note"]]
    for name in ("ours_s", "peer_s", "ratio", "goal", "max_rel_diff"):
        table[name] = [("" if value is None or math.isnan(value) else f"{value:.3g}") for value in table[name]]
    table["met"] = ["" if value is None else ("yes" if value else "no") for value in table["met"]]
    if all(row["ours_bytes"] for row in rows):
        for name in ("ours_bytes", "peer_bytes"):
            table.insert(len(table.columns) - 1, name, [human(row[name]) if row[name] else "" for row in rows])
    return table


def show_steps(rows: Sequence[Row]) -> pd.DataFrame:
    """The constrained steps, one line a spectrum and γ: seconds, ratio to the full products, peak memory."""
    table = pd.DataFrame([row for row in rows if ": " in row["work"]])
    table[["step", "way"]] = table["work"].str.rsplit(": ", n=1, expand=True)
    table["cell"] = [
        f"{s:.3g} s, {ratio:.2f} ×, {human(b)}"
        for s, ratio, b in zip(table["ours_s"], table["ratio"], table["ours_bytes"], strict=True)
    ]
    wide = table.pivot_table(index="step", columns="way", values="cell", aggfunc="first", sort=False)
    full = table.groupby("step", sort=False)[["peer_s", "peer_bytes"]].first()
    wide.insert(0, "full products", [f"{s:.3g} s, {human(b)}" for s, b in full.itertuples(index=False)])
    return wide.reset_index()


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(str(value) for value in row) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    setup = prepare(config)
    about = about_this_run(config)
    rows: list[Row] = []
    text = [", ".join(f"{key} {value}" for key, value in about.items())]
    with pd.option_context("display.width", 200, "display.max_colwidth", 100):
        for section in progress([s for s in SECTIONS if s in config.sections], "benchmark"):
            gc.collect()
            print(f"\n{section}: {(RUNNERS.get(section) or growth).__doc__}", flush=True)
            if section == "growth":
                table = growth(setup)
                table.to_csv(config.out / "growth.csv", index=False)
                table["peak"] = [human(b) for b in table.pop("peak_bytes")]
                table["seconds"] = table["seconds"].round(4)
                table["k"] = ["" if math.isnan(k) else str(int(k)) for k in table["k"]]
            else:
                found = list(RUNNERS[section](setup))
                rows += [row | about for row in found]
                (config.out / "benchmark.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
                table = show(found)
                if section == "step":
                    steps = show_steps(found)
                    print(steps.to_string(index=False), flush=True)
                    text += [f"\n## {section}: every spectrum and γ\n", markdown(steps)]
                    table = show([row for row in found if row["goal"]])
            print(table.to_string(index=False), flush=True)
            text += [f"\n## {section}\n", markdown(table)]
            (config.out / "benchmark.md").write_text("\n".join(text) + "\n")
    print(f"\n{config.out / 'benchmark.json'}, {config.out / 'benchmark.md'}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
