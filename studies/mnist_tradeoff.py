"""What low-curvature fine-tuning keeps and what it costs: LeNet-5, MNIST → Fashion-MNIST (the paper's Fig. 3).

    python studies/mnist_tradeoff.py --preset smoke --out results/smoke

Pretrains LeNet-5, fits five curvatures of one layer on the capability set (a part of the pre-training data),
fine-tunes that layer under each constraint, and writes DIR/results.csv and DIR/tradeoff.pdf/.png. A run that was
interrupted continues where it stopped when it is started again with the same arguments.
"""

import logging
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import joblib
import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from curvlab.curvature import EKFAC, KFAC, Covariance, GaussNewton, Hessian
from curvlab.data import ImagePair, load_pair
from curvlab.descent import leakage
from curvlab.evaluation.tradeoff import best_at
from curvlab.evaluation.transfer import Transfer
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy
from curvlab.memory import human, peak
from curvlab.models import LeNet5, pretrained_lenet
from curvlab.projector import Constraint, NullSpace
from curvlab.records import Row, cached_rows, fingerprint, provenance, write_table
from curvlab.refusal import refuse, refuse_unusable
from curvlab.sweep import one_minus_powers, sweep
from figures.tradeoff import TASK_NAMES, axis_start, draw

METHODS = ("hessian", "ggn", "kfac", "ekfac", "covariance", "none")
KRONECKER = ("kfac", "ekfac", "covariance")
ELLIPSOIDS = ("ggn", "kfac", "ekfac")  # the curvatures that are tried with the ellipsoid
LOSS = CrossEntropy()


@dataclass(frozen=True)
class Preset:
    """What the presets set; any of it can be given on the command line."""

    gammas: tuple[float, ...]
    dense_gammas: tuple[float, ...]  # for Hessian and GGN: through the top-k solver up to 0.99
    epsilons: tuple[float, ...]
    seeds: tuple[int, ...]
    pretrain_epochs: int
    pretrain_images: int
    curvature_images: int
    finetune_images: int
    epochs: int
    lr: float
    dtype: Literal["float32", "float64"] = "float32"


DENSE = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
EPSILONS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PAPER = one_minus_powers(0.1, 7, 20)
PRESETS = {
    "tiny": Preset((0.6, 0.9, 0.99), (0.6, 0.9), (1e-3, 1e-1), (0,), 1, 1500, 300, 1000, 1, 2e-2),
    "smoke": Preset(
        (0.5, 0.8, 0.9, 0.97, 0.99), (0.5, 0.8, 0.9, 0.95), EPSILONS[1::2], (0, 1), 2, 12000, 1500, 6000, 4, 2e-2
    ),
    "default": Preset(one_minus_powers(0.1, 3.4, 12), DENSE, EPSILONS, (0, 1, 2), 5, 60000, 9000, 60000, 15, 1e-2),
    "paper": Preset(PAPER, PAPER, EPSILONS, (0,), 5, 60000, 9000, 60000, 100, 1e-3, "float64"),
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Command line of the study; None means: as the preset says.

    Attributes:
        preset: tiny (for tests), smoke (the whole path on little data), default, paper (the authors' protocol).
        out: folder of the results.
        data: folder with MNIST/raw and FashionMNIST/raw (else CURVLAB_DATA, else a download).
        dataset: the real pair, the embedded one, or whichever can be had.
        methods: of hessian, ggn, kfac, ekfac, covariance, none.
        gammas: energy shares of the null spaces, for all methods alike.
        epsilons: budgets of the ellipsoids, in nats.
        constraint: null spaces, ellipsoids, or both.
        seeds: each seeds weights, minibatches and the choice of the capability set.
        layer: the layer that is edited (its weight; the bias stays).
        activation: relu (where the layer's Hessian equals its GGN) or tanh.
        optimizer: sgd as in the paper, momentum (0.9) or adam.
        project: what is projected; an ellipsoid takes the update where "gradient" is asked for.
        drift: refit once the weights moved by more than this, checked once an epoch; 0 switches the rule off.
        labels: of K-FAC and EK-FAC.
        jobs: processes; 0 takes one a core. Rows do not depend on it.
        backend: of joblib: loky here, dask or ray on a cluster.
    """

    preset: Literal["tiny", "smoke", "default", "paper"] = "default"
    out: Path = Path("results/mnist_tradeoff")
    data: Path | None = None
    dataset: Literal["auto", "mnist", "embedded"] = "auto"
    methods: tuple[str, ...] = METHODS
    gammas: tuple[float, ...] | None = None
    epsilons: tuple[float, ...] | None = None
    constraint: Literal["both", "null-space", "ellipsoid"] = "both"
    seeds: tuple[int, ...] | None = None
    layer: str = "fc2"
    activation: Literal["relu", "tanh"] = "relu"
    dtype: Literal["float32", "float64"] | None = None
    device: str = "cpu"
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    project: Literal["gradient", "update", "eigenbasis"] = "gradient"
    lr: float | None = None
    epochs: int | None = None
    batch_size: int = 256
    drift: float = 0.25
    labels: Literal["exact", "model", "data"] = "exact"
    jobs: int = 0
    backend: str = "loky"


def resolve(config: Config) -> tuple[Config, Preset]:
    """Fill in the preset and check everything that can be checked before work begins."""
    preset = PRESETS[config.preset]
    if config.gammas is not None:
        preset = replace(preset, gammas=config.gammas, dense_gammas=config.gammas)
    for name in ("epsilons", "seeds", "dtype", "lr", "epochs"):
        if getattr(config, name) is not None:
            preset = replace(preset, **{name: getattr(config, name)})
    unknown = sorted(set(config.methods) - set(METHODS))
    if unknown or not config.methods:
        refuse(f"--methods: unknown {unknown}; choose from {', '.join(METHODS)}")
    bad = [g for g in (*preset.gammas, *preset.dense_gammas) if not 0 < g < 1]
    if bad:
        refuse(f"--gammas must lie strictly between 0 and 1, got {bad}")
    if any(not (math.isfinite(e) and e > 0) for e in preset.epsilons):
        refuse(f"--epsilons must be positive and finite, got {list(preset.epsilons)}")
    if not preset.seeds or len(set(preset.seeds)) < len(preset.seeds):
        refuse(f"--seeds must be distinct and at least one, got {list(preset.seeds)}")
    if config.drift < 0 or preset.lr <= 0 or preset.epochs < 1 or config.batch_size < 1 or config.jobs < 0:
        refuse("--lr, --epochs and --batch-size must be positive, --drift and --jobs not negative")
    try:
        find_layers(LeNet5(), config.layer)
    except ValueError as error:
        refuse(f"--layer {config.layer}: {error}")
    refuse_unusable(config.device, config.out)
    if config.optimizer == "adam" and preset.lr == PRESETS[config.preset].lr and config.lr is None:
        preset = replace(preset, lr=preset.lr / 10)  # Adam's steps do not shrink with the gradient
    return config, preset


@dataclass(frozen=True)
class Unit:
    """One unit of work: all values of γ or ε of one method, one seed. Finished units survive an interruption."""

    seed: int
    method: str
    constraint: str


def units(config: Config, preset: Preset) -> list[Unit]:
    found = []
    for seed in preset.seeds:
        if "none" in config.methods:
            found.append(Unit(seed, "none", "none"))
        for method in METHODS[:-1]:
            asked = method in config.methods or (method == "ggn" and "hessian" in config.methods and is_linear(config))
            if not asked or (method == "hessian" and is_linear(config)):
                continue  # with ReLU the Hessian's rows are the GGN's, once the equality is verified
            if config.constraint != "ellipsoid":
                found.append(Unit(seed, method, "null-space"))
            if config.constraint != "null-space" and method in ELLIPSOIDS:
                found.append(Unit(seed, method, "ellipsoid"))
    # the long ones first, so that no worker is left with one at the end
    return sorted(found, key=lambda unit: ["ggn", "hessian", "ekfac", "kfac", "covariance", "none"].index(unit.method))


def is_linear(config: Config) -> bool:
    """Whether the map from the layer to the logits is piecewise linear, so that H = G almost everywhere."""
    return config.activation == "relu"


def identity(config: Config, preset: Preset, origin: Row) -> Row:
    """Everything that a row depends on; units of another identity are not mixed in."""
    kept = ("layer", "activation", "device", "optimizer", "project", "batch_size", "drift", "labels")
    own = {name: getattr(config, name) for name in kept}
    return asdict(preset) | own | origin


def pretrained(config: Config, preset: Preset, pair: ImagePair, seed: int) -> nn.Sequential:
    """LeNet-5 after pre-training, on the device and in the dtype of the study."""
    model = pretrained_lenet(
        pair, seed=seed, images=preset.pretrain_images, epochs=preset.pretrain_epochs, activation=config.activation
    )
    return model.to(device=config.device, dtype=getattr(torch, preset.dtype))


@lru_cache(maxsize=1)
def images(dataset: str, root: Path | None) -> ImagePair:
    """The data, once a process: workers load them rather than being sent them."""
    return load_pair(dataset, root)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def prepare(config: Config, preset: Preset, seed: int) -> Transfer:
    """Everything that runs of one seed share."""
    pair = images(config.dataset, config.data)
    return Transfer.of(
        pair, pretrained(config, preset, pair, seed), config.layer,
        capability=preset.curvature_images, finetune=preset.finetune_images, seed=seed,
    )  # fmt: skip


def fit(config: Config, method: str, task: Transfer, head: nn.Module, seed: int) -> Any:
    """The curvature of the edited layer at the head's weights, on the capability set."""
    data = [task.capability]
    if method == "ggn":
        return GaussNewton.fit(head, LOSS, data, config.layer)
    if method == "hessian":
        return Hessian.fit(head, LOSS, data, config.layer)
    labels: Any = {"labels": config.labels, "seed": seed}
    if method == "covariance":
        return Covariance.fit(head, LOSS, data, config.layer, **labels)
    return (KFAC if method == "kfac" else EKFAC).fit(head, LOSS, data, config.layer, **labels)


def constrain(curvature: Any, constraint: str, values: tuple[float, ...]) -> list[Any]:
    """One constraint a value of γ or ε, all on one spectrum."""
    if isinstance(curvature, (GaussNewton, Hessian)):
        # only as far down as needed; in the ellipsoid what lies below counts with its mean
        most = max(values) if constraint == "null-space" else 0.95
        # an indefinite Hessian's energy lies in thousands of directions: there all of them are the cheaper way
        few = most <= 0.99 and not isinstance(curvature, Hessian)
        spectrum = curvature.spectrum(gamma=most if few else None)
    else:
        spectrum = curvature.spectrum()
    if constraint == "null-space":
        return [spectrum.null_space(value) for value in values]
    return [spectrum.ellipsoid(value, outside="mean") for value in values]


def run_unit(config: Config, preset: Preset, unit: Unit, origin: Row) -> list[Row]:
    """Fit, fine-tune under every γ (or ε) at once, measure; `origin` are the columns of provenance."""
    torch.set_num_threads(1)  # the same rows whatever the number of processes
    task = prepare(config, preset, unit.seed)
    started = time.perf_counter()
    head = task.head
    (layer,) = find_layers(head, config.layer)
    W0 = layer.matrix().clone()
    curvature: Any = None
    constraints: list[Constraint | None] = [None]
    values: tuple[float, ...] = (math.nan,)
    if unit.constraint != "none":
        curvature = fit(config, unit.method, task, head, unit.seed)
        values = preset.epsilons
        if unit.constraint == "null-space":
            values = preset.gammas if unit.method in KRONECKER else preset.dense_gammas
        constraints = constrain(curvature, unit.constraint, values)

    def refit(run: int, W: Tensor) -> Constraint:
        layer.write(W)
        try:
            return constrain(fit(config, unit.method, task, head, unit.seed), unit.constraint, (values[run],))[0]
        finally:
            layer.write(W0)

    project = "update" if (unit.constraint, config.project) == ("ellipsoid", "gradient") else config.project
    result = sweep(
        head, config.layer, LOSS, *task.finetune, constraints,
        optimizer=lambda parameters: make_optimizer(config, preset, parameters),
        project=project if unit.constraint != "none" else "gradient",
        epochs=preset.epochs, batch_size=config.batch_size, seed=unit.seed,
        refit=refit if config.drift > 0 else None, threshold=config.drift,
        desc=f"{unit.method} {unit.constraint}, seed {unit.seed}",
    )  # fmt: skip
    task.remember()
    rows = []
    for i, (value, constraint) in enumerate(zip(values, constraints, strict=True)):
        delta = {config.layer: result.weights[i] - W0}
        layer.write(result.weights[i])
        null = constraint if isinstance(constraint, NullSpace) else None
        row = {
            "study": "mnist_tradeoff", "method": unit.method, "constraint": unit.constraint,
            "gamma": value if unit.constraint == "null-space" else math.nan,
            "epsilon": value if unit.constraint == "ellipsoid" else math.nan,
            "seed": unit.seed,
            **task.measures(),
            "predicted_kl": math.nan if curvature is None else predicted_kl(curvature, delta),
            "finetune_loss": float(result.losses[-1, i]),
            "removed": null.removed if null else math.nan, "kept": null.kept if null else math.nan,
            "energy_removed": null.energy_removed if null else math.nan,
            # against the constraint at θ0: with refits, later constraints allow other directions
            "leak": math.nan if constraint is None else float(leakage(constraint.to(W0.dtype, W0.device), delta)),
            "drift": result.drift[i], "refits": result.refits[i],
            "drift_threshold": config.drift, "drift_checked": "once an epoch" if config.drift else "never",
            "diverged": int(result.diverged[i]),
            "project": project if unit.constraint != "none" else "none",
            "optimizer": config.optimizer, "lr": preset.lr, "epochs": preset.epochs, "batch_size": config.batch_size,
            "activation": config.activation, "layer": config.layer, "labels": config.labels,
            "dtype": preset.dtype, "device": config.device, "preset": config.preset,
            "curvature_images": len(task.capability[1]), "finetune_images": len(task.finetune[1]),
        }  # fmt: skip
        layer.write(W0)
        rows.append(row)
    note = verify_hessian(config, task, unit) if unit == Unit(unit.seed, "ggn", "null-space") else ""
    seconds = (time.perf_counter() - started) / len(rows)
    shared = origin | {"hessian_check": note, "seconds": seconds, "peak_bytes": peak()}
    return [row | shared for row in rows]


def verify_hessian(config: Config, task: Transfer, unit: Unit) -> str:
    """With ReLU: the largest relative difference between products with the Hessian and with the GGN."""
    if not is_linear(config):
        return ""
    data = [tuple(t[:1000] for t in task.capability)]
    ggn = GaussNewton.fit(task.head, LOSS, data, config.layer)
    hessian = Hessian.fit(task.head, LOSS, data, config.layer)
    generator = torch.Generator().manual_seed(unit.seed)
    v = torch.randn(8, ggn.size, generator=generator).to(ggn.device, ggn.dtype)
    G, H = ggn.matmat(v), hessian.matmat(v)
    difference = float(torch.linalg.vector_norm(H - G) / torch.linalg.vector_norm(G))
    if difference > 1e3 * torch.finfo(ggn.dtype).eps:
        raise AssertionError(f"the Hessian of a ReLU head differs from its GGN by {difference:.1e}")
    return f"{difference:.1e}"


def make_optimizer(config: Config, preset: Preset, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=preset.lr)
    return torch.optim.SGD(parameters, lr=preset.lr, momentum=0.9 if config.optimizer == "momentum" else 0.0)


def predicted_kl(curvature: Any, delta: dict[str, Tensor]) -> float:
    """½ δᵀCδ with the curvature at θ0."""
    form = curvature if isinstance(curvature, (GaussNewton, Hessian)) else curvature.spectrum()
    return float(form.quadratic_form(delta)) / 2


def hessian_rows(rows: list[Row]) -> list[Row]:
    """With ReLU the Hessian's rows are the GGN's (verified in `verify_hessian`)."""
    return [row | {"method": "hessian"} for row in rows if (row["method"], row["constraint"]) == ("ggn", "null-space")]


def at_accuracy(rows: pd.DataFrame, target: float) -> float:
    """Fine-tuning accuracy at a pre-training accuracy, interpolated between neighbouring values of γ or ε."""
    rows = rows.sort_values(["gamma", "epsilon"], ascending=[True, False])
    return best_at(rows["pretrain_accuracy"].to_numpy(), rows["finetune_accuracy"].to_numpy(), target)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Fine-tuning accuracy (%) of each method and constraint at 99 % and 98 % pre-training accuracy."""
    lines = []
    for (constraint, method), rows in table[table["constraint"] != "none"].groupby(["constraint", "method"]):
        line: Row = {"constraint": constraint, "method": method}
        for target in (0.99, 0.98):
            each = [100 * at_accuracy(own, target) for _, own in rows.groupby("seed")]
            reached = pd.Series(each).dropna()
            spread = f" ± {reached.std():.1f}" if len(reached) > 1 else ""
            line[f"at {100 * target:.0f} %"] = f"{reached.mean():.1f}{spread}" if len(reached) else "not reached"
        line["refits"] = f"{rows['refits'].mean():.1f}"
        lines.append(line)
    return pd.DataFrame(lines)


def kl_table(table: pd.DataFrame) -> pd.DataFrame:
    """Predicted against measured KL (nats, on the capability set) for each ε: means over seeds."""
    rows = table[table["constraint"] == "ellipsoid"]
    columns = ["predicted_kl", "measured_kl", "measured_kl_test"]
    return rows.groupby(["method", "epsilon"])[columns].mean().reset_index()


def main(config: Config) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    started = time.perf_counter()
    config, preset = resolve(config)
    try:
        pair = images(config.dataset, config.data)
    except (FileNotFoundError, ValueError) as error:
        refuse(error)
    if pair.note:
        print(f"\n*** {pair.note} ***\n", flush=True)
    origin = pair.provenance() | provenance(__file__) | {"threads": 1}
    me = identity(config, preset, origin)
    todo = units(config, preset)
    folder = config.out / "units" / fingerprint(me)
    jobs = min(config.jobs or os.cpu_count() or 1, len(todo))
    if config.preset == "tiny" and not config.jobs:
        jobs = 1  # starting workers would take longer than the work

    def finish(unit: Unit) -> list[Row]:
        file = folder / f"{unit.seed}-{unit.method}-{unit.constraint}.json"
        return cached_rows(file, lambda: run_unit(config, preset, unit, origin))

    def warm_up(seed: int) -> None:
        torch.set_num_threads(1)
        pretrained(config, preset, images(config.dataset, config.data), seed)

    with joblib.parallel_config(backend=config.backend if jobs > 1 else "sequential", n_jobs=jobs):
        parallel = joblib.Parallel(return_as="generator_unordered")
        calls = parallel(joblib.delayed(warm_up)(seed) for seed in preset.seeds)
        for _ in tqdm(calls, desc="pre-training", total=len(preset.seeds), disable=None):
            pass
        calls = parallel(joblib.delayed(finish)(unit) for unit in todo)
        bar = tqdm(calls, desc="curvature, constraints, fine-tuning", total=len(todo), disable=None)
        rows = [row for finished in bar for row in finished]
    if "hessian" in config.methods and is_linear(config):
        rows += hessian_rows(rows)
    if "ggn" not in config.methods:
        rows = [row for row in rows if row["method"] != "ggn"]
    table = pd.DataFrame(rows).sort_values(["method", "constraint", "gamma", "epsilon", "seed"], ignore_index=True)
    write_table(table, config.out / "results.csv")
    files = draw(table, config.out / "tradeoff.pdf", from_accuracy=float(axis_start(table)))

    pretrain_name, finetune_name = TASK_NAMES[pair.name]
    print(f"\n{finetune_name} test accuracy (%) at a given {pretrain_name} accuracy, mean ± sd over seeds")
    print(summary(table).to_string(index=False))
    if (table["constraint"] == "ellipsoid").any():
        print("\npredicted (½ δᵀCδ) and measured KL(p0 ‖ p), nats, capability set and test set")
        print(kl_table(table).to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    checks = [c for c in table["hessian_check"].unique() if c]
    if checks:
        print(f"\nReLU: the layer's Hessian equals its GGN (largest relative difference {max(checks, key=float)});")
        print("the Hessian's rows are the GGN's. --activation tanh is the case where they differ.")
    base = table.groupby("seed")["base_accuracy"].first()
    print(
        f"\nbefore fine-tuning: {100 * base.mean():.2f} % on {pretrain_name}, by seed "
        + ", ".join(f"{100 * b:.2f}" for b in base)
    )
    minutes = (time.perf_counter() - started) / 60
    print(f"{len(table)} runs, {minutes:.1f} min, peak {human(table['peak_bytes'].max())} a process")
    print(f"results: {config.out / 'results.csv'}\nfigure:  {files[1]} and {files[0]}")


if __name__ == "__main__":
    import mnist_tradeoff  # by name, so that worker processes import it too and keep what they have loaded

    mnist_tradeoff.main(tyro.cli(mnist_tradeoff.Config, description=__doc__))
