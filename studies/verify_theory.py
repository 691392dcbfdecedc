"""Every claim checked: what holds, what does not, and where it stops holding.

    python studies/verify_theory.py --preset smoke --out results/theory

Checks the paper's propositions and what it leaves open (`curvlab.theory`) on random models, on networks at the
start, half-way and at the end of training, and on convolutions and sequences. Writes DIR/checks.json (every case
with what was measured and the bound it was held to), DIR/claims.md (the ledger, and a page on each claim) and the
figures. Exit status 1 if a claim that should hold fails, or a negative control is not rejected. An interrupted run
continues where it stopped when it is started again with the same arguments.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import joblib
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from curvlab import theory
from curvlab.data import ImagePair, load_pair, subset
from curvlab.data.vision import ImageSet
from curvlab.losses import CrossEntropy
from curvlab.models import MLP, pretrain
from curvlab.records import Row, cached_rows, fingerprint, provenance
from curvlab.storage import replacing
from curvlab.theory import Check, Setting, random_setting

Stage = Literal["random", "half-trained", "converged"]
STAGES: tuple[Stage, ...] = ("random", "half-trained", "converged")


@dataclass(frozen=True)
class Preset:
    """How much of everything.

    Attributes:
        examples: of the capability set, in checks that hold a dense matrix.
        train: images that the small networks are trained on.
        width, depth: hidden width and number of layers of the small networks.
        seeds: of random models.
        thorough: whether checks that take long run over more settings.
    """

    examples: int
    train: int
    width: int
    depth: int
    seeds: tuple[int, ...]
    thorough: bool


PRESETS = {
    "tiny": Preset(60, 600, 6, 3, (0,), False),
    "smoke": Preset(200, 2000, 10, 3, (0, 1), False),
    "default": Preset(1000, 10000, 16, 3, (0, 1, 2), True),
}


@dataclass(frozen=True)
class Config:
    """Command line of the study.

    Attributes:
        preset: tiny (for tests), smoke, default.
        out: folder of the results.
        claims: numbers of the claims to check; none given means all.
        data: folder with MNIST/raw and FashionMNIST/raw (else CURVLAB_DATA, else a download).
        dataset: the real pair, the embedded one, or whichever can be had.
        jobs: processes; 0 takes one a core. Verdicts do not depend on it.
    """

    preset: Literal["tiny", "smoke", "default"] = "default"
    out: Path = Path("results/verify_theory")
    claims: tuple[int, ...] = ()
    data: Path | None = None
    dataset: Literal["auto", "mnist", "embedded"] = "auto"
    jobs: int = 0


@lru_cache(maxsize=1)
def images(dataset: str, root: Path | None) -> ImagePair:
    """The data, once a process."""
    return load_pair(dataset, root)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Lab:
    """What the checks run on: small networks on real images, trained as far as asked."""

    config: Config
    preset: Preset

    @property
    def pair(self) -> ImagePair:
        return images(self.config.dataset, self.config.data)

    def network(self, stage: Stage = "converged", activation: str = "tanh", depth: int = 0, width: int = 0) -> MLP:
        """An MLP on 7 × 7 images (layers fc1 … fc<depth>), float64, at a stage of its training."""
        return copy.deepcopy(_network(self, stage, activation, depth or self.preset.depth, width or self.preset.width))

    def capability(self, n: int = 0, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """n images of the pre-training task, 7 × 7, float64, in batches."""
        train = self.pair.pretrain_train
        return _batches(subset(train, min(n or self.preset.examples, len(train)), seed + 1000))

    def edits(self, n: int = 0, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """n images of the fine-tuning task, to descend on."""
        train = self.pair.finetune_train
        return _batches(subset(train, min(n or self.preset.examples, len(train)), seed + 2000))

    def trained(self, stage: Stage = "converged", activation: str = "tanh", n: int = 0, seed: int = 0) -> Setting:
        """The small network on its capability set, all layers."""
        model = self.network(stage, activation)
        layers = tuple(f"fc{i + 1}" for i in range(self.preset.depth))
        name = f"MLP {model.sizes}, {activation}, {stage}, {self.pair.name} 7 × 7, n = {n or self.preset.examples}"
        return Setting(name, model, CrossEntropy(), self.capability(n, seed), layers)


@lru_cache(maxsize=32)
def _network(lab: Lab, stage: Stage, activation: str, depth: int, width: int) -> MLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MLP([49] + [width] * (depth - 1) + [10], activation).double()  # type: ignore[arg-type]
    if stage != "random":
        train = lab.pair.pretrain_train
        images = subset(train, min(lab.preset.train, len(train)), 0)
        x, y = small(images.x), images.y
        rounds = max(1, 600_000 // len(x))  # examples seen: sixty epochs of 10,000
        epochs = max(1, rounds // 60) if stage == "half-trained" else rounds
        pretrain(model, x, y, epochs=min(epochs, 60), lr=1e-2, seed=0, progress_desc=f"training, {activation}")
    return model.eval()


def small(x: Tensor) -> Tensor:
    """Images (N, 1, 28, 28) as 7 × 7 averages, (N, 49), float64."""
    return F.avg_pool2d(x.double(), 4).flatten(1)


def _batches(images: ImageSet) -> list[tuple[Tensor, Tensor]]:
    return list(zip(small(images.x).split(500), images.y.split(500), strict=True))


# --- the claims, one after another ----------------------------------------------------------------------------------


def claim_1(lab: Lab) -> Iterator[Check]:
    """Prop. 1, where the inputs leave something unseen: fewer examples than inputs."""
    for seed in lab.preset.seeds:
        for setting in (
            random_setting("mlp", "tanh", "cross-entropy", examples=4, width=8, seed=seed),
            random_setting("mlp", "relu", "squared error", examples=5, width=8, seed=seed),
            random_setting("conv", "gelu", "logistic", examples=2, width=3, seed=seed),
            random_setting("sequence", "tanh", "cross-entropy", examples=2, width=9, seed=seed),
        ):
            yield theory.null_space_inclusion.on(setting.name, *setting.arguments, seed=seed)
            yield theory.unseen_updates_change_nothing.on(setting.name, *setting.arguments, seed=seed)
    trained = lab.trained(n=20)
    yield theory.null_space_inclusion.on(trained.name, *trained.arguments)
    last = trained.layers[-1]
    yield theory.inclusion_strict_or_equal.on(trained.name, trained.model, trained.data, last, classes=10)


CLAIMS: dict[int, Callable[[Lab], Iterator[Check]]] = {1: claim_1}


# --- the run ---------------------------------------------------------------------------------------------------------


def run_claim(config: Config, number: int) -> list[Row]:
    torch.set_num_threads(1)  # the same numbers whatever the number of processes
    return [check.row() for check in CLAIMS[number](Lab(config, PRESETS[config.preset]))]


def main(config: Config) -> None:
    started = time.perf_counter()
    unknown = sorted(set(config.claims) - set(CLAIMS))
    if unknown:
        raise SystemExit(f"--claims: unknown {unknown}; choose from {sorted(CLAIMS)}")
    try:
        pair = images(config.dataset, config.data)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if pair.note:
        print(f"\n*** {pair.note} ***\n", flush=True)
    numbers = list(config.claims) or sorted(CLAIMS)
    origin = provenance() | pair.provenance() | {"threads": 1}
    folder = config.out / "units" / fingerprint(origin | asdict(PRESETS[config.preset]) | {"preset": config.preset})
    jobs = 1 if config.preset == "tiny" and not config.jobs else min(config.jobs or os.cpu_count() or 1, len(numbers))

    def finish(number: int) -> list[Row]:
        return cached_rows(folder / f"{number}.json", lambda: run_claim(config, number))

    with joblib.parallel_config(backend="loky" if jobs > 1 else "sequential", n_jobs=jobs):
        calls = joblib.Parallel(return_as="generator")(joblib.delayed(finish)(number) for number in numbers)
        rows = [row for found in tqdm(calls, desc="claims", total=len(numbers), disable=None) for row in found]
    with replacing(config.out / "checks.json") as temporary:
        temporary.write_text(json.dumps([row | {"origin": origin} for row in rows], indent=1, ensure_ascii=False))
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print(f"FAILED claim {row['claim']}, {row['name']}, on {row['setting']}")
        for case in row["cases"]:
            if case["holds"] != case["should"]:
                print(f"    {case['name']}: {case['measured']:.3g}, bound {case['relation']} {case['bound']:.3g}")
    print(f"{len(rows)} checks, {len(failed)} failed, {(time.perf_counter() - started) / 60:.1f} min")
    print(f"results: {config.out / 'checks.json'}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    import verify_theory  # by name, so that worker processes import it too and keep what they have loaded

    verify_theory.main(tyro.cli(verify_theory.Config, description=__doc__))
