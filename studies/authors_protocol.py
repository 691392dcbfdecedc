"""What each convention of the authors' LeNet code does to Fig. 3: one deviation at a time, then all at once.

    python studies/authors_protocol.py --preset smoke --out results/authors

Edits fc2 of LeNet-5 (MNIST → Fashion-MNIST) by SGD projected onto γ-approximate null spaces: of GGN, K-FAC and
EK-FAC as the paper defines them, and as the authors' code takes them:

- labels of the data instead of the model's (empirical K-FAC and EK-FAC),
- EK-FAC's eigenvalues from squares of whole batches' gradients instead of examples',
- the GGN through softmax probabilities instead of logits (the empirical Fisher: `through_probabilities`),
- a network that ends in a ReLU, its logits clamped at zero, in training too (`pretrained_lenet(relu_logits=True)`).

Writes DIR/results.csv (a row a variant, γ and seed), DIR/summary.csv and DIR/authors_protocol.pdf/.png. A run that was
interrupted continues where it stopped when it is started again with the same arguments; so do further --seeds.
"""

import logging
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import joblib
import pandas as pd
import torch
import tyro
from authors_curvatures import Reduction, batch_squares, through_probabilities
from torch import Tensor
from tqdm import tqdm

from curvlab.curvature import EKFAC, KFAC, GaussNewton
from curvlab.data import ImagePair, load_pair
from curvlab.evaluation.tradeoff import best_at
from curvlab.evaluation.transfer import Transfer
from curvlab.layers import find_layers, unflatten
from curvlab.losses import CrossEntropy
from curvlab.memory import human, peak
from curvlab.models import pretrained_lenet
from curvlab.projector import NullSpace, overlap
from curvlab.records import Row, cached_rows, fingerprint, provenance, write_table
from curvlab.refusal import refuse, refuse_unusable
from curvlab.spectrum import DenseBasis, KroneckerBasis, Spectrum
from curvlab.sweep import one_minus_powers, sweep
from figures.authors_protocol import draw
from figures.tradeoff import TASK_NAMES, axis_start

LOSS = CrossEntropy()
LAYER = "fc2"
COMPARED = (0.9, 0.99)  # γ at which null spaces are compared with the right GGN's
TARGETS = (0.99, 0.98)  # pre-training accuracy kept
KRYLOV = {"exact": 0.99, "data": 0.99995}  # up to these γ the GGNs' leading eigenpairs are the cheaper way than all


@dataclass(frozen=True)
class Variant:
    """A curvature in one convention: what it takes the place of, and where it departs from it."""

    method: Literal["ggn", "kfac", "ekfac"]
    labels: Literal["exact", "model", "data"] = "exact"
    squares: Literal["examples", "batches"] = "examples"
    relu_logits: bool = False

    @property
    def deviations(self) -> str:
        """In words; empty where there are none."""
        found = []
        if self.labels == "data":
            found.append("through probabilities" if self.method == "ggn" else "labels of the data")
        if self.squares == "batches":
            found.append("squares of batches" + (", drawn labels" if self.labels == "model" else ""))
        return "; ".join(found + ["logits through a ReLU"] * self.relu_logits)


VARIANTS = {
    "ggn": Variant("ggn"),
    "kfac": Variant("kfac"),
    "ekfac": Variant("ekfac"),
    "ggn-probabilities": Variant("ggn", labels="data"),
    "kfac-labels": Variant("kfac", labels="data"),
    "ekfac-labels": Variant("ekfac", labels="data"),
    "ekfac-batch": Variant("ekfac", labels="model", squares="batches"),
    "ekfac-batch-labels": Variant("ekfac", labels="data", squares="batches"),
    "ggn-relu": Variant("ggn", relu_logits=True),
    "kfac-relu": Variant("kfac", relu_logits=True),
    "ekfac-relu": Variant("ekfac", relu_logits=True),
    "ggn-all": Variant("ggn", labels="data", relu_logits=True),
    "kfac-all": Variant("kfac", labels="data", relu_logits=True),
    "ekfac-all": Variant("ekfac", labels="data", squares="batches", relu_logits=True),
}


@dataclass(frozen=True)
class Preset:
    """What the presets set; seeds, epochs, lr and dtype can be given on the command line."""

    gammas: tuple[float, ...]
    dense_gammas: tuple[float, ...]  # of the GGN: each value beyond 0.99 takes all eigenpairs, at every refit
    probability_gammas: tuple[float, ...]  # of the GGN through probabilities, whose energy lies in fewer directions
    seeds: tuple[int, ...]
    pretrain_epochs: int
    pretrain_images: int
    curvature_images: int
    finetune_images: int
    epochs: int
    lr: float
    dtype: Literal["float32", "float64"] = "float32"


PAPER = one_minus_powers(0.1, 7, 20)  # the authors' 20 values
SHORT = (0.6, 0.9, 0.99)
PRESETS = {
    "tiny": Preset(SHORT, SHORT[:2], SHORT[:2], (0,), 1, 1500, 300, 1000, 1, 2e-2),
    "smoke": Preset(
        (0.5, 0.8, 0.9, 0.97, 0.99), (0.5, 0.8, 0.9), (0.5, 0.8, 0.9, 0.97), (0,), 2, 12000, 1500, 3000, 2, 2e-2
    ),
    # on half the images, a tenth of the authors' epochs at twenty times their step: the same lr · steps
    "default": Preset(PAPER, PAPER[:6], PAPER[:9], (0, 1), 5, 60000, 9000, 30000, 10, 2e-2),
    "paper": Preset(PAPER, PAPER, PAPER, (0,), 5, 60000, 9000, 60000, 100, 1e-3, "float64"),
}


@dataclass(frozen=True)
class Config:
    """Command line of the study; None means: as the preset says.

    Attributes:
        preset: tiny (for tests), smoke (the whole path on little data), default (the authors' 20 values of γ; 10 epochs
            of half the images at lr 2e-2, which is their lr · steps; the GGN takes the 6 values up to 0.988, through
            probabilities the 9 up to 0.999), paper (theirs in full: plain SGD, lr 1e-3, batch 256, 100 epochs of all
            images, 9,000 images for the curvature, one seed, all 20 values, float64: hours).
        out: folder of the results.
        data: folder with MNIST/raw and FashionMNIST/raw (else CURVLAB_DATA, else a download).
        dataset: the real pair, the embedded one, or whichever can be had.
        variants: names of variants; all where none are given. What each is compared with is added.
        seeds: each seeds weights, minibatches, drawn labels and the choice of the capability set.
        batch_size: of fine-tuning.
        curvature_batch: of the squares of batches.
        reduction: of a batch's loss there.
        drift: refit once the weights moved by more than this, checked once an epoch; 0 switches the rule off.
        jobs: processes; 0 takes one a core. Rows do not depend on it.
    """

    preset: Literal["tiny", "smoke", "default", "paper"] = "default"
    out: Path = Path("results/authors_protocol")
    data: Path | None = None
    dataset: Literal["auto", "mnist", "embedded"] = "auto"
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    epochs: int | None = None
    lr: float | None = None
    dtype: Literal["float32", "float64"] | None = None
    device: str = "cpu"
    batch_size: int = 256
    curvature_batch: int = 256
    reduction: Reduction = "mean"
    drift: float = 0.25
    jobs: int = 0


def resolve(config: Config) -> tuple[Config, Preset]:
    """Fill in the preset and check everything that can be checked before work begins."""
    preset = PRESETS[config.preset]
    for name in ("seeds", "epochs", "lr", "dtype"):
        if getattr(config, name) is not None:
            preset = replace(preset, **{name: getattr(config, name)})
    unknown = sorted(set(config.variants) - set(VARIANTS))
    if unknown:
        refuse(f"--variants: unknown {unknown}; choose from {', '.join(VARIANTS)}")
    asked = config.variants or tuple(VARIANTS)
    asked += tuple(VARIANTS[name].method for name in asked)
    if not preset.seeds or len(set(preset.seeds)) < len(preset.seeds):
        refuse(f"--seeds must be distinct and at least one, got {list(preset.seeds)}")
    if preset.lr <= 0 or min(preset.epochs, config.batch_size, config.curvature_batch) < 1:
        refuse("--lr, --epochs, --batch-size and --curvature-batch must be positive")
    if config.drift < 0 or config.jobs < 0:
        refuse("--drift and --jobs must not be negative")
    refuse_unusable(config.device, config.out)
    return replace(config, variants=tuple(name for name in VARIANTS if name in asked)), preset


def identity(config: Config, preset: Preset, origin: Row) -> Row:
    """Everything that the row of a variant, γ and seed depends on; units of another identity are not mixed in."""
    own = {name: getattr(config, name) for name in ("device", "batch_size", "curvature_batch", "reduction", "drift")}
    return {name: value for name, value in asdict(preset).items() if name != "seeds"} | own | origin


@lru_cache(maxsize=1)
def images(dataset: str, root: Path | None) -> ImagePair:
    """The data, once a process: workers load them rather than being sent them."""
    return load_pair(dataset, root)  # type: ignore[arg-type]


@lru_cache(maxsize=2)
def prepare(config: Config, preset: Preset, seed: int, relu_logits: bool) -> Transfer:
    """Everything that runs of one seed and network share."""
    pair = images(config.dataset, config.data)
    model = pretrained_lenet(
        pair, seed=seed, images=preset.pretrain_images, epochs=preset.pretrain_epochs, relu_logits=relu_logits
    )
    model.to(device=config.device, dtype=getattr(torch, preset.dtype))
    return Transfer.of(
        pair, model, LAYER, capability=preset.curvature_images, finetune=preset.finetune_images, seed=seed
    )


def spectrum(config: Config, variant: Variant, task: Transfer, seed: int, gamma: float) -> Spectrum:
    """The variant's curvature of the layer at the head's present weights, known far enough for null spaces up to γ."""
    head, data = task.head, task.capability
    if variant.method == "ggn":
        right = variant.labels == "exact"
        ggn = GaussNewton.fit(head, LOSS, [data], LAYER) if right else through_probabilities(head, data, LAYER)
        return ggn.spectrum(gamma=gamma if gamma <= KRYLOV[variant.labels] else None)
    if variant.method == "ekfac" and variant.squares == "examples":
        return EKFAC.fit(head, LOSS, [data], LAYER, labels=variant.labels, seed=seed).spectrum()
    # drawn labels stand for the exact ones, which cannot be summed over a batch: the basis stays the right one
    labels = "exact" if variant.labels == "model" else variant.labels
    kfac = KFAC.fit(head, LOSS, [data], LAYER, labels=labels, seed=seed).spectrum()
    if variant.method == "kfac":
        return kfac
    basis = kfac.blocks[0].basis
    assert isinstance(basis, KroneckerBasis)
    assert variant.labels != "exact"
    return batch_squares(
        head, data, LAYER, basis,
        labels=variant.labels, batch=config.curvature_batch, reduction=config.reduction, seed=seed,
    )  # fmt: skip


def energy_of_ggn(null: NullSpace, task: Transfer) -> float:
    """Share of the right GGN's trace in the directions that a null space removes, tr(R G) / tr G."""
    (block,) = null.blocks
    if isinstance(block.basis, DenseBasis):
        ggn = GaussNewton.fit(task.head, LOSS, [task.capability], LAYER)
        vectors = block.basis.vectors[:, block.removed].mT
        return float(ggn.quadratic_form(unflatten(null.layers, vectors)).sum()) / ggn.trace()
    # vᵀGv of every vector of a Kronecker basis: what EK-FAC takes for its eigenvalues
    own = EKFAC.fit(task.head, LOSS, [task.capability], LAYER, labels="exact", basis=[block.basis]).spectrum().blocks[0]
    return float(own.values[block.removed].sum()) / own.total


def reference(folder: Path, config: Config, preset: Preset, seed: int, relu_logits: bool) -> dict[float, NullSpace]:
    """Null spaces of the right GGN of a network, by γ of `COMPARED`; kept in files."""
    files = {gamma: folder / f"{seed}-{'relu-' * relu_logits}ggn-{gamma}.safetensors" for gamma in COMPARED}
    if not all(file.is_file() for file in files.values()):
        task = prepare(config, preset, seed, relu_logits)
        whole = spectrum(config, VARIANTS["ggn"], task, seed, max(COMPARED))
        for gamma, file in files.items():
            whole.null_space(gamma).compact().save(file)
    return {gamma: NullSpace.load(file) for gamma, file in files.items()}


def compared(null: NullSpace, right: NullSpace, task: Transfer) -> Row:
    """A null space against that of the right GGN of the same network at the same γ."""
    share = overlap(null, right)
    common = share * null.kept - (null.dimensions - null.removed - right.removed)  # tr(R₁R₂)
    return {
        "removed": null.removed, "overlap": share, "ggn_directions_removed": common / right.removed,
        "ggn_energy_removed": energy_of_ggn(null, task),
    }  # fmt: skip


def run_unit(folder: Path, config: Config, preset: Preset, name: str, seed: int, origin: Row) -> list[Row]:
    """Fit, fine-tune under every γ at once, measure; `origin` are the columns of provenance."""
    torch.set_num_threads(1)  # the same rows whatever the number of processes
    variant = VARIANTS[name]
    right = reference(folder, config, preset, seed, variant.relu_logits)
    task = prepare(config, preset, seed, variant.relu_logits)
    started = time.perf_counter()
    (layer,) = find_layers(task.head, LAYER)
    W0 = layer.matrix().clone()
    gammas = preset.gammas
    if variant.method == "ggn":
        gammas = preset.dense_gammas if variant.labels == "exact" else preset.probability_gammas
    whole = spectrum(config, variant, task, seed, max(*gammas, *COMPARED))
    nulls = [whole.null_space(gamma) for gamma in gammas]
    against: Row = {}
    for gamma in COMPARED:
        found = compared(whole.null_space(gamma), right[gamma], task)
        against |= {f"{column}_at_{gamma}": value for column, value in found.items()}

    def refit(run: int, W: Tensor) -> NullSpace:
        layer.write(W)
        try:
            return spectrum(config, variant, task, seed, gammas[run]).null_space(gammas[run])
        finally:
            layer.write(W0)

    result = sweep(
        task.head, LAYER, LOSS, *task.finetune, nulls,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=preset.lr),
        epochs=preset.epochs, batch_size=config.batch_size, seed=seed,
        refit=refit if config.drift > 0 else None, threshold=config.drift, desc=f"{name}, seed {seed}",
    )  # fmt: skip
    task.remember()
    rows = []
    for i, (gamma, null) in enumerate(zip(gammas, nulls, strict=True)):
        delta = {LAYER: result.weights[i] - W0}
        layer.write(result.weights[i])
        measured = task.measures()
        layer.write(W0)
        rows.append({
            "study": "authors_protocol", "variant": name, **asdict(variant), "deviations": variant.deviations,
            "constraint": "null-space", "gamma": gamma, "seed": seed, **measured,
            # the right scale is the measured KL's; leading eigenpairs alone predict nothing
            "predicted_kl": float(whole.quadratic_form(delta)) / 2 if whole.blocks[0].basis.complete else math.nan,
            "finetune_loss": float(result.losses[-1, i]), "removed": null.removed, "kept": null.kept,
            "energy_removed": null.energy_removed, "drift": result.drift[i], "refits": result.refits[i],
            "drift_threshold": config.drift, "diverged": int(result.diverged[i]), **against,
            "layer": LAYER, "optimizer": "sgd", "lr": preset.lr, "epochs": preset.epochs,
            "batch_size": config.batch_size, "curvature_batch": config.curvature_batch, "reduction": config.reduction,
            "dtype": preset.dtype, "device": config.device, "preset": config.preset,
            "curvature_images": len(task.capability[1]), "finetune_images": len(task.finetune[1]),
        })  # fmt: skip
    shared = origin | {"seconds": (time.perf_counter() - started) / len(rows), "peak_bytes": peak()}
    return [row | shared for row in rows]


def learnt_at(rows: pd.DataFrame, target: float) -> float:
    """Fine-tuning accuracy (%) where a curve over γ keeps `target`; NaN where it never does."""
    rows = rows[rows["diverged"] == 0].sort_values("gamma")
    return 100 * best_at(rows["pretrain_accuracy"].to_numpy(), rows["finetune_accuracy"].to_numpy(), target)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One line a variant, means over seeds: learnt at `TARGETS` (%), the difference to the right curvature (points).

    The difference is taken seed by seed; it is NaN where one of the two never keeps as much.
    """
    lines = []
    for name, variant in VARIANTS.items():
        own = table[table["variant"] == name]
        if own.empty:
            continue
        right = table[table["variant"] == variant.method]
        line: Row = {"variant": name, "deviations": variant.deviations or "none"}
        line["base"] = 100 * own["base_accuracy"].mean()
        for target in TARGETS:
            pairs = [(learnt_at(rows, target), learnt_at(right[right["seed"] == seed], target))
                     for seed, rows in own.groupby("seed")]  # fmt: skip
            each = pd.DataFrame(pairs, columns=["own", "right"])
            line[f"learnt_at_{target}"] = each["own"].mean(skipna=False)
            line[f"difference_at_{target}"] = (each["own"] - each["right"]).mean(skipna=False)
        for gamma in COMPARED:
            for column in ("removed", "overlap", "ggn_directions_removed", "ggn_energy_removed"):
                line[f"{column}_at_{gamma}"] = own.groupby("seed")[f"{column}_at_{gamma}"].first().mean()
        lines.append(line)
    return pd.DataFrame(lines)


def printed(lines: pd.DataFrame) -> str:
    """The summary for a terminal."""
    shown = pd.DataFrame({"variant": lines["variant"], "deviations": lines["deviations"]})
    for target in TARGETS:
        for column, heading in (("learnt", "at"), ("difference", "Δ at")):
            form = "{:.1f}" if column == "learnt" else "{:+.1f}"
            values = lines[f"{column}_at_{target}"]
            shown[f"{heading} {100 * target:.0f} %"] = ["–" if pd.isna(v) else form.format(v) for v in values]
    for gamma in COMPARED:
        shown[f"removed {gamma}"] = lines[f"removed_at_{gamma}"].map("{:.0f}".format)
        for column, heading in (("overlap", "overlap"), ("ggn_energy_removed", "energy")):
            shown[f"{heading} {gamma}"] = (100 * lines[f"{column}_at_{gamma}"]).map("{:.1f}".format)
    return shown.to_string(index=False)


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
    wrong = Path(__file__).with_name("authors_curvatures.py")
    origin = pair.provenance() | provenance(__file__, wrong) | {"threads": 1}
    folder = config.out / "units" / fingerprint(identity(config, preset, origin))
    todo = [(name, seed) for seed in preset.seeds for name in config.variants]
    todo.sort(key=lambda unit: VARIANTS[unit[0]].method != "ggn")  # the long ones first
    networks = [(seed, clamped) for seed in preset.seeds for clamped in (False, True)
                if any(VARIANTS[name].relu_logits == clamped for name in config.variants)]  # fmt: skip
    jobs = min(config.jobs or os.cpu_count() or 1, len(todo))
    if config.preset == "tiny" and not config.jobs:
        jobs = 1  # starting workers would take longer than the work

    def begin(seed: int, clamped: bool) -> None:
        torch.set_num_threads(1)
        reference(folder, config, preset, seed, clamped)

    def finish(name: str, seed: int) -> list[Row]:
        file = folder / f"{seed}-{name}.json"
        return cached_rows(file, lambda: run_unit(folder, config, preset, name, seed, origin))

    with joblib.parallel_config(backend="loky" if jobs > 1 else "sequential", n_jobs=jobs):
        parallel = joblib.Parallel(return_as="generator_unordered")
        calls = parallel(joblib.delayed(begin)(*network) for network in networks)
        for _ in tqdm(calls, desc="pre-training, GGN", total=len(networks), disable=None):
            pass
        calls = parallel(joblib.delayed(finish)(*unit) for unit in todo)
        bar = tqdm(calls, desc="curvature, fine-tuning", total=len(todo), disable=None)
        rows = [row for finished in bar for row in finished]
    order = {name: i for i, name in enumerate(VARIANTS)}
    table = pd.DataFrame(rows)
    table = table.sort_values(["variant", "gamma", "seed"], key=lambda c: c.map(order) if c.name == "variant" else c)
    table = table.reset_index(drop=True)
    lines = summary(table)
    write_table(table, config.out / "results.csv")
    write_table(lines, config.out / "summary.csv")
    files = draw(table, config.out / "authors_protocol.pdf", from_accuracy=axis_start(table))

    kept, learnt = TASK_NAMES[pair.name]
    print(
        f"\n{learnt} test accuracy (%) where {kept} keeps a given accuracy, and the difference to the right curvature;"
    )
    print(
        "directions removed at γ, overlap of the null space with the right GGN's of the same network, and the share of"
    )
    print("that GGN's energy removed (%). –: never kept as much. Means over seeds.")
    print(printed(lines))
    base = table.groupby("relu_logits")["base_accuracy"].mean()
    print("\nbefore fine-tuning, " + ", ".join(
        f"{100 * value:.2f} % on {kept} ({'logits through a ReLU' if clamped else 'LeNet-5'})"
        for clamped, value in base.items()))  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    print(f"{len(table)} runs, {minutes:.1f} min, peak {human(table['peak_bytes'].max())} a process")
    print(f"results: {config.out / 'results.csv'} and {config.out / 'summary.csv'}\nfigure:  {files[1]} and {files[0]}")


if __name__ == "__main__":
    import authors_protocol  # by name, so that worker processes import it too and keep what they have loaded

    authors_protocol.main(tyro.cli(authors_protocol.Config, description=__doc__))
