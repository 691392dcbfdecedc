"""Every claim checked: what holds, what does not, and where it stops holding.

    python studies/verify_theory.py --preset smoke --out results/theory

Checks the paper's propositions and what it leaves open (`curvlab.theory`) on random models, on networks at the
start, half-way and at the end of training, and on convolutions and sequences. Writes DIR/checks.json (every case
with what was measured and the bound it was held to), DIR/claims.md (the ledger, and a page on each claim) and the
figures. Exit status 1 if a claim that should hold fails, or a negative control is not rejected. An interrupted run
continues where it stopped when it is started again with the same arguments.
"""

import copy
import gc
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from curvlab import theory
from curvlab.curvature import KFAC
from curvlab.data import ImagePair, load_pair, subset
from curvlab.data.vision import ImageSet
from curvlab.data.world import make_world
from curvlab.losses import CrossEntropy
from curvlab.models import MLP, pretrain
from curvlab.models.characters import character_model, pieces
from curvlab.records import Row, cached_rows, fingerprint, provenance
from curvlab.refusal import refuse
from curvlab.storage import replacing
from curvlab.theory import Case, Check, Setting, random_setting
from curvlab.theory.mismatch import take
from curvlab.theory.setting import Kind
from figures import claims_page

Stage = Literal["random", "half-trained", "converged"]
STAGES: tuple[Stage, ...] = ("random", "half-trained", "converged")


@dataclass(frozen=True)
class Preset:
    """How much of everything.

    Attributes:
        examples: of the capability set, in checks that hold a dense matrix.
        train: images that the small networks are trained on.
        epochs: of that training.
        width, depth: hidden width and number of layers of the small networks.
        seeds: of random models.
        thorough: whether checks that take long run over more settings.
    """

    examples: int
    train: int
    epochs: int
    width: int
    depth: int
    seeds: tuple[int, ...]
    thorough: bool


PRESETS = {
    "tiny": Preset(60, 600, 25, 6, 3, (0,), False),
    "smoke": Preset(200, 2000, 60, 10, 3, (0, 1), False),
    "default": Preset(1000, 10000, 60, 16, 3, (0, 1, 2), True),
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
    def stages(self) -> tuple[Stage, ...]:
        """Stages of training at which costly checks are made."""
        return STAGES[2:] if self.config.preset == "tiny" else STAGES

    @property
    def pair(self) -> ImagePair:
        return images(self.config.dataset, self.config.data)

    def network(self, stage: Stage = "converged", activation: str = "tanh", depth: int = 0, width: int = 0) -> MLP:
        """An MLP on 7 × 7 images (layers fc1 … fc<depth>), float64, at a stage of its training."""
        return copy.deepcopy(_network(self, stage, activation, depth or self.preset.depth, width or self.preset.width))

    def capability(self, n: int = 0, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """n images of the pre-training task, 7 × 7, float64, in batches."""
        return list(_batches(self, "pretrain_train", n or self.preset.examples, seed + 1000))

    def edits(self, n: int = 0, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """n images of the fine-tuning task, to descend on."""
        return list(_batches(self, "finetune_train", n or self.preset.examples, seed + 2000))

    def trained(
        self, stage: Stage = "converged", activation: str = "tanh", n: int = 0, seed: int = 0, depth: int = 0,
        width: int = 0,
    ) -> Setting:  # fmt: skip
        """The small network, or one of another size, on its capability set, all layers."""
        model = self.network(stage, activation, depth, width)
        layers = tuple(f"fc{i + 1}" for i in range(depth or self.preset.depth))
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
        half = min(max(1, 10_000 // len(x)), lab.preset.epochs // 5)  # some 10,000 images seen
        epochs = half if stage == "half-trained" else lab.preset.epochs
        pretrain(model, x, y, epochs=epochs, lr=1e-2, seed=0, progress_desc=f"training, {activation}")
    return model.eval()


def small(x: Tensor) -> Tensor:
    """Images (N, 1, 28, 28) as 7 × 7 averages, (N, 49), float64."""
    return F.avg_pool2d(x.double(), 4).flatten(1)


def classes(data: list[tuple[Tensor, Tensor]], start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """The examples labelled start … stop − 1."""
    return [(x[kept], y[kept]) for x, y in data for kept in [(y >= start) & (y < stop)]]


@lru_cache(maxsize=32)
def _batches(lab: Lab, task: str, n: int, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    train: ImageSet = getattr(lab.pair, task)
    drawn = subset(train, min(n, len(train)), seed)
    return tuple(zip(small(drawn.x).split(500), drawn.y.split(500), strict=True))


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


def claim_2(lab: Lab) -> Iterator[Check]:
    """Prop. 2 on random models of every kind, on the small network at every stage of training, and with ReLU."""
    tiny = lab.config.preset == "tiny"
    for seed in lab.preset.seeds:
        for kind, activation, loss in (
            ("mlp", "gelu", "squared error"), ("conv", "tanh", "logistic"), ("sequence", "identity", "cross-entropy"),
        ):  # fmt: skip
            setting = random_setting(kind, activation, loss, examples=6, width=4, seed=seed)  # type: ignore[arg-type]
            if isinstance(setting.model, nn.Sequential):
                setting.model[2] = nn.AvgPool2d(2)  # max-pooling has kinks
            yield theory.bregman_is_kl.on(setting.name, *setting.arguments, seed=seed)
            if tiny and kind != "mlp":
                continue
            yield theory.remainder_order.on(setting.name, *setting.arguments, seed=seed)
            yield theory.loss_difference_is_linear.on(setting.name, *setting.arguments, seed=seed)
        own = random_setting("sequence", "gelu", "cross-entropy", examples=6, width=4, seed=seed)
        ignored = [(x, y.index_fill(1, torch.tensor([0]), -100)) for x, y in own.data]
        name = f"{own.name}, first label ignored"
        yield theory.bregman_is_kl.on(name, own.model, own.loss, ignored, own.layers, seed=seed)
        for kind in ("mlp", "conv")[: 1 if tiny else 2]:
            setting = random_setting(kind, "relu", "cross-entropy", examples=6, width=4, seed=seed)  # type: ignore[arg-type]
            yield theory.remainder_in_a_linear_region.on(setting.name, *setting.arguments, seed=seed)
    for stage in lab.stages:
        for activation in ("tanh", "gelu") if lab.preset.thorough else ("tanh",):
            setting = lab.trained(stage, activation)
            yield theory.remainder_order.on(setting.name, *setting.arguments)
            yield theory.loss_difference_is_linear.on(setting.name, *setting.arguments)
            yield theory.bregman_is_kl.on(setting.name, *setting.arguments)
        if stage == "converged" or not tiny:
            setting = lab.trained(stage, "relu", n=20)
            yield theory.remainder_in_a_linear_region.on(setting.name, *setting.arguments)


def claim_3(lab: Lab) -> Iterator[Check]:
    """Prop. 3 on factors of all shapes and ranks with repeated eigenvalues, and on factors of a trained network."""
    spectra = {
        (5, 4): ([3.0, 2.0, 2.0, 1.0, 0.0], [4.0, 1.0, 1.0, 0.0]), (1, 5): ([2.0], [3.0, 1.0, 1.0, 0.5, 0.0]),
        (6, 1): ([3.0, 3.0, 1.0, 0.5, 0.0, 0.0], [2.0]), (4, 4): ([1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.5, 0.5]),
        (3, 7): ([1.0, 0.0, 0.0], [6.0, 3.0, 3.0, 2.0, 1.0, 1.0, 0.0]),
    }  # fmt: skip
    for seed in lab.preset.seeds:
        for (d_in, d_out), (inner, outer) in spectra.items():
            A, S = theory.random_factor(inner, 2 * seed), theory.random_factor(outer, 2 * seed + 1)
            name = f"random factors, W {d_out} × {d_in}, repeated eigenvalues, seed {seed}"
            yield theory.kronecker_projection.on(name, A, S)
            yield theory.cut_inside_an_eigenspace.on(name, A, S)
        inner, outer = ((1 / torch.arange(1.0, n + 1)).tolist() for n in (200, 300))
        A, S = theory.random_factor(inner, 2 * seed), theory.random_factor(outer, 2 * seed + 1)
        name = f"W 300 × 200, eigenvalues 1 / i, seed {seed}"
        yield theory.kronecker_projection_of_large_layers.on(name, A, S)
    trained = lab.trained(n=min(lab.preset.examples, 200))
    kfac = KFAC.fit(trained.model, trained.loss, trained.data, "fc2", labels="exact").factors["fc2"]
    yield theory.kronecker_projection.on(f"{trained.name}, fc2", kfac.A, kfac.S)


def claim_4(lab: Lab) -> Iterator[Check]:
    """Fisher and GGN on random models of every kind; the empirical Fisher while training, and on fitted targets."""
    tiny = lab.config.preset == "tiny"
    for seed in lab.preset.seeds:
        for kind, activation, loss in (
            ("mlp", "tanh", "cross-entropy"), ("conv", "relu", "squared error"), ("sequence", "gelu", "logistic"),
        ):  # fmt: skip
            setting = random_setting(kind, activation, loss, examples=8, width=4, seed=seed)  # type: ignore[arg-type]
            yield theory.fisher_is_gauss_newton.on(setting.name, *setting.arguments)
            if kind == "mlp" or lab.preset.thorough:
                yield theory.sampled_fisher_converges.on(setting.name, *setting.arguments, seeds=8 if tiny else 16)
        for kind, loss in (
            ("mlp", "cross-entropy"), ("mlp", "squared error"), ("mlp", "logistic"), ("sequence", "cross-entropy"),
        ):  # fmt: skip
            setting = random_setting(kind, "tanh", loss, examples=128, width=3, seed=seed)  # type: ignore[arg-type]
            arguments = (*setting.arguments[:3], setting.layers[-1:])
            yield theory.sampled_fisher_is_unbiased.on(setting.name, *arguments, draws=8 if tiny else 16)
        setting = random_setting("mlp", "tanh", "cross-entropy", examples=8, width=4, seed=seed)
        last = setting.layers[-1]
        yield theory.on_fitted_targets.on(setting.name, setting.model, setting.data, last)
    for stage in lab.stages:
        many = lab.trained(stage, n={"tiny": 1000, "smoke": 2000, "default": 16000}[lab.config.preset])
        layers = many.layers
        yield theory.empirical_fisher_differs.on(many.name, *many.arguments[:3], layers[1:])
        few = lab.trained(stage, n=min(lab.preset.examples, 100))
        yield theory.fisher_is_gauss_newton.on(few.name, *few.arguments[:3], layers[1:])
        yield theory.on_fitted_targets.on(few.name, few.model, few.data, layers[-1])
    if not tiny:
        few = lab.trained("random", n=20)
        yield theory.while_fitting_targets.on(f"{few.name}, trained further", few.model, few.data, few.layers)


def claim_5(lab: Lab) -> Iterator[Check]:
    """Storage and cost: objects allocated at small shapes, then the published figures."""
    yield theory.storage_of_a_projection.on("allocated at small shapes")
    yield theory.operations_of_a_projection.on("counted at small shapes")
    yield theory.published_storage_figures.on("paper and reviews, 4096 × 14336")


def claim_6(lab: Lab) -> Iterator[Check]:
    """Arithmetic on the paper's tables."""
    for claim in (
        theory.degradation_below_one_percent, theory.robust_to_gamma, theory.robust_to_sample_size,
        theory.hundred_times_faster, theory.tops_editing, theory.review_quotes,
    ):  # fmt: skip
        yield claim.on("the paper's tables")
    yield theory.differences_against_sampling_error.on("the paper's Table 1")


def claim_7(lab: Lab) -> Iterator[Check]:
    """Anisotropy of fc2 over training, for growing width."""
    more = () if lab.config.preset == "tiny" else (32, 48, 64) if lab.preset.thorough else (20, 48)
    for width in (lab.preset.width, *more):
        for stage in STAGES:
            setting = lab.trained(stage, width=width)
            arguments = (setting.model, setting.loss, setting.data, "fc2")
            yield theory.few_directions_hold_the_energy.on(f"fc2 of {setting.name}", *arguments)
    for seed in lab.preset.seeds:
        for setting in (
            random_setting("mlp", "tanh", "cross-entropy", examples=6, width=4, seed=seed),
            random_setting("conv", "gelu", "logistic", examples=3, width=2, seed=seed),
            random_setting("sequence", "tanh", "squared error", examples=3, width=4, seed=seed),
        ):
            arguments = (setting.model, setting.loss, setting.data, setting.layers[0])
            yield theory.spectra_are_right.on(setting.name, *arguments)
            yield theory.ekfac_is_never_sharper.on(setting.name, *arguments)
    setting = lab.trained()
    arguments = (setting.model, setting.loss, setting.data, "fc2")
    yield theory.spectra_are_right.on(f"fc2 of {setting.name}", *arguments)
    yield theory.ekfac_is_never_sharper.on(f"fc2 of {setting.name}", *arguments)


def claim_8(lab: Lab) -> Iterator[Check]:
    """The sandwich on random models and while training; counterexamples for each approximation of it."""
    for seed in lab.preset.seeds:
        for kind, activation, loss in (
            ("mlp", "relu", "cross-entropy"), ("conv", "tanh", "logistic"), ("sequence", "gelu", "cross-entropy"),
        ):  # fmt: skip
            setting = random_setting(kind, activation, loss, examples=3, width=6, seed=seed)  # type: ignore[arg-type]
            yield theory.sandwich.on(setting.name, *setting.arguments, seed=seed)
    for stage in lab.stages:
        few = lab.trained(stage, n=20)
        yield theory.sandwich.on(few.name, *few.arguments[:3], few.layers[1:])
    for variant in theory.VARIANTS:
        kind = "sequence" if variant == "reduce form" else "mlp"
        makers = [
            partial(random_setting, kind, "tanh", "cross-entropy", examples=2, width=6, depth=3, seed=seed)  # type: ignore[arg-type]
            for seed in range(20)
        ]
        yield theory.sandwich_breaks.on(f"random {kind}, 2 examples, searched over seeds", variant, makers)


def claim_9(lab: Lab) -> Iterator[Check]:
    """Nesting of γ-null spaces on small random models and on fc2 of the trained network."""
    for seed in lab.preset.seeds:
        for setting in (
            random_setting("mlp", "tanh", "cross-entropy", examples=8, width=4, seed=seed),
            random_setting("mlp", "gelu", "squared error", examples=8, width=5, seed=seed),
            random_setting("sequence", "tanh", "cross-entropy", examples=6, width=4, seed=seed),
        ):
            arguments = (setting.model, setting.loss, setting.data, setting.layers[0])
            yield theory.approximate_null_spaces_nest.on(setting.name, *arguments, should=False)
            yield theory.one_curvature_nests.on(setting.name, *arguments)
            yield theory.overlap_is_the_share.on(setting.name, *arguments)
    for stage in lab.stages:
        setting = lab.trained(stage)
        name, arguments = f"fc2 of {setting.name}", (setting.model, setting.loss, setting.data, "fc2")
        yield theory.approximate_null_spaces_nest.on(name, *arguments, should=False)
        yield theory.one_curvature_nests.on(name, *arguments)
        yield theory.overlap_is_the_share.on(name, *arguments)


def claim_10(lab: Lab) -> Iterator[Check]:
    """The guarantee in its own curvature and in the GGN, on random models and before, during and after training."""
    tiny = lab.config.preset == "tiny"
    kinds: tuple[Kind, ...] = ("mlp",) if tiny else ("mlp", "conv", "sequence")
    for seed in lab.preset.seeds:
        for kind in kinds:
            loss = "logistic" if kind == "conv" else "cross-entropy"
            setting = random_setting(kind, "tanh", loss, examples=8, width=4, seed=seed)
            yield theory.own_curvature_bound.on(setting.name, *setting.arguments)
            yield theory.bound_in_the_ggn.on(setting.name, *setting.arguments)
    for stage in lab.stages:
        trained = lab.trained(stage, n=min(lab.preset.examples, 300))
        layers = trained.layers if lab.preset.thorough else trained.layers[1:]
        if stage == "converged":
            yield theory.own_curvature_bound.on(trained.name, trained.model, trained.loss, trained.data, layers)
        yield theory.bound_in_the_ggn.on(trained.name, trained.model, trained.loss, trained.data, layers)
    found = [random_setting(kind, examples=8, width=4, seed=s) for kind in kinds for s in range(1 if tiny else 3)]
    yield theory.bound_exceeded_in_the_ggn.on(f"clusters; random models: {len(found)}", settings=found)


def claim_11(lab: Lab) -> Iterator[Check]:
    """When K-FAC is exact, and EK-FAC as the best diagonal, on random models and while training."""
    tiny = lab.config.preset == "tiny"
    for seed in lab.preset.seeds:
        for loss in ("cross-entropy", "squared error", "logistic") if not tiny else ("cross-entropy",):
            one = random_setting("mlp", "gelu", loss, depth=3, seed=seed)
            yield theory.kfac_exact_one_example.on(one.name, *one.arguments)
        linear = random_setting("mlp", "identity", "squared error", depth=3, seed=seed)
        yield theory.kfac_exact_shared_curvature.on(linear.name, linear.model, linear.data)
        yield theory.kfac_exact_independent.on(f"five inputs × four curvatures, seed {seed}", seed=seed)
        yield theory.kfac_with_shared_weights.on(f"deep linear, three positions, seed {seed}", seed=seed)
        for kind in ("mlp", "conv", "sequence"):
            setting = random_setting(kind, "tanh", seed=seed)
            yield theory.ekfac_best_diagonal.on(setting.name, *setting.arguments)
            yield theory.ekfac_best_diagonal.on(f"{setting.name}, data labels", *setting.arguments, labels="data")
            yield theory.ekfac_best_diagonal.on(f"{setting.name}, with bias", *setting.arguments, bias=True)
    for stage in lab.stages:
        trained = lab.trained(stage, n=min(lab.preset.examples, 500))
        yield theory.ekfac_best_diagonal.on(trained.name, *trained.arguments)


def claim_12(lab: Lab) -> Iterator[Check]:
    """Piecewise-linear heads of every kind; smooth ones while training."""
    for seed in lab.preset.seeds:
        for kind, activation, loss in (
            ("mlp", "relu", "cross-entropy"), ("conv", "relu", "logistic"), ("sequence", "relu", "squared error"),
            ("conv", "identity", "cross-entropy"),
        ):  # fmt: skip
            setting = random_setting(kind, activation, loss, examples=6, width=4, seed=seed)  # type: ignore[arg-type]
            yield theory.piecewise_linear_head.on(setting.name, *setting.arguments)
    trained = lab.trained(activation="relu", n=60)
    yield theory.piecewise_linear_head.on(trained.name, *trained.arguments[:3], trained.layers[1:])
    for activation in ("tanh", "gelu") if lab.preset.thorough else ("tanh",):
        stages: dict[str, Setting] = {stage: lab.trained(stage, activation) for stage in STAGES}
        name = stages["random"].name.replace(", random", "")
        yield theory.smooth_head.on(f"{name}, over training", stages)


def claim_13(lab: Lab) -> Iterator[Check]:
    """Random models of every kind, then descent on the other images over γ."""
    for seed in lab.preset.seeds:
        for kind, activation, loss in (
            ("mlp", "tanh", "cross-entropy"), ("conv", "relu", "squared error"), ("sequence", "gelu", "logistic"),
        ):  # fmt: skip
            own, other = (
                random_setting(kind, activation, loss, examples=6, width=4, seed=2 * seed + i)  # type: ignore[arg-type]
                for i in (0, 1)
            )
            arguments = (own.model, own.loss, own.data, other.data, own.layers)
            yield theory.descent_in_the_null_space.on(own.name, *arguments)
            if kind != "sequence":
                yield theory.descent_in_the_null_space.on(f"{own.name}, with bias", *arguments, bias=True)
    n = min(300, lab.preset.examples)
    trained, layers = lab.trained(n=n), ("fc2",)
    name = f"{trained.name}, fc2"
    gammas = ((), (0.5, 0.99), (0.5, 0.9, 0.99), (0.3, 0.5, 0.7, 0.9, 0.99, 0.999))[len(lab.preset.seeds)]
    for curvature in ("kfac", "ggn") if len(lab.preset.seeds) > 1 else ("kfac",):
        for gamma in gammas:
            for seed in lab.preset.seeds if lab.preset.thorough else (0,):
                yield theory.descent_in_the_null_space.on(
                    name, trained.model, trained.loss, trained.data, lab.edits(n, seed), layers,
                    gamma=gamma, curvature=curvature, steps=10 if len(lab.preset.seeds) > 1 else 4,
                )  # fmt: skip
    for gamma in (0.9, 0.99):
        yield theory.leaking_costs_curvature.on(
            trained.name, trained.model, trained.loss, trained.data, lab.edits(n), trained.layers, gamma=gamma
        )


def claim_14(lab: Lab) -> Iterator[Check]:
    """Coupling of layers for growing depth and width; null spaces of layers put together."""
    W, tiny = lab.preset.width, lab.config.preset == "tiny"
    depths, widths = ((2, 3), (4,)) if tiny else ((2, 3, 6), (4, 20)) if W < 16 else ((2, 3, 4, 6), (4, 32))
    stages: tuple[Stage, ...] = STAGES if lab.preset.thorough else ("random", "converged")
    for stage in stages:
        for depth, width in [(depth, W) for depth in depths] + [(3, width) for width in widths]:
            setting = lab.trained(stage, depth=depth, width=width)
            yield theory.coupling_is_bounded.on(setting.name, *setting.arguments)
            yield theory.layers_do_not_interact.on(setting.name, *setting.arguments)
            if width == W and stage != "half-trained" and depth in ((2,) if tiny else (3, 6)):
                for gamma in (0.9, 0.99) if lab.preset.thorough and depth == 3 else (0.9,):
                    name = f"{setting.name}, γ = {gamma}"
                    yield theory.layerwise_projection_keeps_more.on(name, *setting.arguments, gamma=gamma)
    for seed in lab.preset.seeds:
        for setting in (
            random_setting("mlp", "tanh", "cross-entropy", examples=6, width=4, depth=3, seed=seed),
            random_setting("conv", "relu", "logistic", examples=3, width=2, seed=seed),
            random_setting("sequence", "gelu", "squared error", examples=3, width=4, depth=2, seed=seed),
        ):
            yield theory.exact_null_spaces_combine.on(setting.name, *setting.arguments)
            yield theory.curvatures_add_up_to_a_factor.on(setting.name, *setting.arguments)
            yield theory.layerwise_projection_keeps_more.on(setting.name, *setting.arguments)
    if not tiny:
        setting = lab.trained()
        yield theory.exact_null_spaces_combine.on(setting.name, *setting.arguments)
        yield theory.curvatures_add_up_to_a_factor.on(setting.name, *setting.arguments)


def claim_15(lab: Lab) -> Iterator[Check]:
    """Random smooth models at small steps; real edits of one layer and of all, at a minimum and away from it."""
    for seed in lab.preset.seeds:
        for kind, activation, loss in (
            ("mlp", "tanh", "cross-entropy"), ("mlp", "gelu", "squared error"), ("sequence", "tanh", "logistic"),
        ):  # fmt: skip
            setting = random_setting(kind, activation, loss, examples=6, width=4, seed=seed)  # type: ignore[arg-type]
            yield theory.small_steps_are_predicted.on(setting.name, *setting.arguments, seed=seed)
    for stage in lab.stages[::2]:
        trained = lab.trained(stage)
        for layers in (("fc2",), trained.layers):
            for seed in lab.preset.seeds if lab.preset.thorough else (0,):
                yield theory.prediction_along_edits.on(
                    f"{trained.name}, {', '.join(layers)}", trained.model, trained.loss, trained.data,
                    lab.edits(seed=seed), layers, converged=stage == "converged", seed=seed,
                )  # fmt: skip


def claim_16(lab: Lab) -> Iterator[Check]:
    """Round-off on the CPU: sums of products, eigenvalues, stored bases; exact arithmetic for the library's sums."""
    shape = {"tiny": (512, 2048), "smoke": (1024, 3584), "default": (4096, 14336)}[lab.config.preset]
    yield theory.float32_energy.on(f"{shape[0]} × {shape[1]} products, CPU", shape=shape)
    long = 512 if lab.preset.thorough else 64
    spike, steps = [4096] + [1] * (long - 1), list(range(long, 0, -1))
    yield theory.library_energy_is_exact.on("a spike and ones", outer=spike[: long // 2], inner=spike)
    yield theory.library_energy_is_exact.on("all sizes", outer=steps[: long // 4], inner=steps)
    for seed in lab.preset.seeds:
        yield theory.eigenvalues_below_zero.on(f"rank 16 of 64, CPU, seed {seed}", seed=seed)
        yield theory.bfloat16_bases.on(f"12 × 20, γ = 0.9, seed {seed}", seed=seed)


def claim_17(lab: Lab) -> Iterator[Check]:
    """Capability sets that are small or others, for fc2 at the start and the end of training; ignored positions."""
    total = lab.preset.train
    sizes = [n for n in (10, 30, 100, 300, 1000, 3000) if n < total / 2] + [total // 2]
    tiny = lab.config.preset == "tiny"
    stages: tuple[Stage, ...] = ("converged",) if tiny else ("random", "converged")
    for stage in stages:
        setting = lab.trained(stage, n=total)
        whole = setting.data
        arguments = (setting.model, setting.loss, whole)
        low, high, other = classes(whole, 0, 5), classes(whole, 5, 10), lab.edits(total)
        samples = [(f"the first {n}", take(whole, n)) for n in (sizes[::3] if tiny else sizes)]
        samples += [("classes 0 to 4", low), ("classes 5 to 9", high), ("the other task", other)]
        for label, sample in samples:
            name = f"fc2 of {setting.name}; curvature from {label}"
            yield theory.no_estimate_beats_the_whole_set.on(name, *arguments, sample, "fc2")
            yield theory.sample_is_as_good.on(name, *arguments, sample, "fc2")
        name = f"fc2 of {setting.name}; curvature from classes 0 to 4, for 5 to 9"
        yield theory.no_estimate_beats_the_whole_set.on(name, setting.model, setting.loss, high, low, "fc2")
    if not tiny:
        yield from other_text()
    for seed in lab.preset.seeds:
        for setting in (
            random_setting("mlp", "tanh", "cross-entropy", examples=8, width=4, seed=seed),
            random_setting("conv", "gelu", "logistic", examples=4, width=2, seed=seed),
            random_setting("sequence", "tanh", "squared error", examples=4, width=4, seed=seed),
        ):
            parts = (setting.model, setting.loss, setting.data, setting.layers[0])
            yield theory.samples_underestimate_boundedly.on(setting.name, *parts, n=2)
        setting = random_setting("sequence", "tanh", "cross-entropy", examples=2, width=9, depth=3, seed=seed)
        for layer in setting.layers:
            last = layer == setting.layers[-1]
            name = f"{layer} of {setting.name}, first label ignored"
            yield theory.labelled_inputs_suffice.on(name, setting.model, setting.data, layer, should=last)
            if not last:
                yield theory.ignored_positions_count.on(name, setting.model, setting.data, layer)
        setting = random_setting("sequence", "gelu", "cross-entropy", examples=6, width=4, depth=3, seed=seed)
        for layer in setting.layers[::2]:
            name = f"{layer} of {setting.name}, of different lengths"
            yield theory.padding_counts_nothing.on(name, setting.model, setting.data, layer)


def other_text(n: int = 200) -> Iterator[Check]:
    """Of a character model trained on statements and stories: statements as capability set, fewer of them, stories."""
    world = make_world("smoke")
    statements = [f"{item.prompt} {item.answer}." for item in world.statements]
    (x, y), stories = pieces(statements, n, length=16), pieces(world.texts, n, length=16)
    model = character_model(torch.cat([x, stories[0]]), torch.cat([y, stories[1]]), width=10, steps=300)
    for label, sample in (("half of them", (x[: n // 2], y[: n // 2])), ("other text (stories)", stories)):
        name = f"fc2 of RunningMean {model.sizes}, trained on letters of statements and stories; curvature from {label}"
        arguments = (name, model, CrossEntropy(), [(x, y)], [sample], "fc2")
        yield theory.no_estimate_beats_the_whole_set.on(*arguments)
        yield theory.sample_is_as_good.on(*arguments)


def claim_18(lab: Lab) -> Iterator[Check]:
    """The projection, the quadratic problem, a budget in nats, the kinds of constraint, and the paper's Fig. 2."""
    for seed in lab.preset.seeds:
        setting = random_setting("mlp", "tanh", "cross-entropy", examples=6, width=4, seed=seed)
        for curvature in ("kfac", "ggn", "ekfac", "covariance", "hessian"):
            yield theory.confining_is_nearest.on(setting.name, *setting.arguments, curvature=curvature, seed=seed)
        for size, rank in ((6, None), (12, 7)) if lab.preset.thorough else ((6, 4),):
            problem = theory.random_problem(size, seed, rank)
            name = f"random quadratic problem, {size} parameters, rank {rank or size}, seed {seed}"
            yield theory.projected_descent_on_a_quadratic.on(name, *problem)
            yield theory.budget_beats_cut_in_its_own_model.on(name, *problem[:3])
    trained, effort = lab.trained(), len(lab.preset.seeds)
    yield theory.two_parameter_slice.on(
        trained.name,
        trained.model,
        trained.loss,
        trained.data,
        lab.edits(),
        trained.layers,
        grid=(0, 9, 21, 31)[effort],
    )
    for curvature in ("kfac", "ggn") if lab.preset.thorough else ("kfac",):
        yield theory.budget_in_measured_nats.on(
            trained.name, trained.model, trained.loss, trained.data, lab.edits(), trained.layers,
            curvature=curvature, steps=(0, 20, 40, 40)[effort],
        )  # fmt: skip
        regimes: list[tuple[str, int, tuple[str, ...], float | None]] = [("few edits", 8, trained.layers, 0.3)]
        if effort > 1:
            regimes.append(("many edits", 0, ("fc2",), None))
        for regime, n, layers, damping in regimes:
            yield theory.learning_at_equal_kl.on(
                f"{trained.name}, {', '.join(layers)}, {regime}", trained.model, trained.loss, trained.data,
                [lab.edits(n, seed) for seed in (lab.preset.seeds if lab.preset.thorough else (0,))], layers,
                curvature=curvature, regime=f"{regime}, {', '.join(layers)}", damping=damping,
                knobs=(0, 5, 6, 8)[effort], steps=(0, 25, 40, 40)[effort],
            )  # fmt: skip


CLAIMS: dict[int, Callable[[Lab], Iterator[Check]]] = {
    1: claim_1, 2: claim_2, 3: claim_3, 4: claim_4, 5: claim_5, 6: claim_6, 7: claim_7, 8: claim_8, 9: claim_9,
    10: claim_10, 11: claim_11, 12: claim_12, 13: claim_13, 14: claim_14, 15: claim_15, 16: claim_16, 17: claim_17,
    18: claim_18,
}  # fmt: skip


# --- the run ---------------------------------------------------------------------------------------------------------


def run_claim(config: Config, number: int) -> list[Row]:
    torch.set_num_threads(1)  # the same numbers whatever the number of processes
    return [check.row() for check in CLAIMS[number](Lab(config, PRESETS[config.preset]))]


def finish(config: Config, folder: Path, number: int) -> tuple[int, list[Row], list[Path]]:
    """A claim's rows, read from `folder` if it was finished before, and its pictures."""
    try:
        rows = cached_rows(folder / f"{number}.json", lambda: run_claim(config, number))
    except Exception:  # the others' ledger is wanted all the same
        rows = [raised(number, traceback.format_exc())]
    return number, rows, claims_page.pictures(rows, config.out, ".png" if config.preset == "tiny" else ".pdf")


def finished(config: Config, folder: Path, numbers: list[int]) -> Iterator[tuple[int, list[Row], list[Path]]]:
    """`finish` of each claim, in any order, in several processes where that is asked for.

    Forked processes have the modules and the data already, which take longer to load than half of the tiny preset;
    a process that may use CUDA must not be forked.
    """
    forked = sys.platform == "linux" and not torch.cuda.is_available()
    jobs = min(config.jobs or (os.cpu_count() or 1 if forked or config.preset != "tiny" else 1), len(numbers))
    one = partial(finish, config, folder)
    if jobs == 1:
        yield from map(one, numbers)
        return
    context = multiprocessing.get_context("fork" if forked else "spawn")
    # what is imported stays: a million objects less to look through at every collection
    with ProcessPoolExecutor(jobs, context, initializer=gc.freeze) as pool:
        calls = [pool.submit(one, number) for number in reversed(numbers)]  # the last ones take longest
        yield from (call.result() for call in as_completed(calls))


def raised(number: int, trace: str) -> Row:
    """The row of a claim whose check broke off."""
    last = trace.strip().splitlines()[-1]
    case = Case(last, math.nan, 0.0)
    statement = f"The checks of claim {number} can be run."
    return Check(
        number, f"claim_{number}_raised", statement, last, "ours", "", (case,), {"traceback": trace}, 0.0
    ).row()


def summary(rows: list[Row]) -> pd.DataFrame:
    """One line a claim's function: verdict over its settings, its most telling number, seconds."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        _, case = claims_page.telling(own)
        lines.append(
            {
                "claim": own[0]["claim"], "checked": name.replace("_", " "), "verdict": claims_page.verdict(own),
                "settings": len(own), "measured": f"{case['measured']:.3g}",
                "bound": f"{case['relation']} {case['bound']:.3g}", "seconds": f"{sum(r['seconds'] for r in own):.1f}",
                "as expected": "yes" if all(r["passed"] for r in own) else "NO",
            }
        )  # fmt: skip
    return pd.DataFrame(lines)


def main(config: Config) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)  # before anything starts threads, which would not survive a fork
    unknown = sorted(set(config.claims) - set(CLAIMS))
    if unknown:
        refuse(f"--claims: unknown {unknown}; choose from {sorted(CLAIMS)}")
    try:
        pair = images(config.dataset, config.data)
    except (FileNotFoundError, ValueError) as error:
        refuse(error)
    if pair.note:
        print(f"\n*** {pair.note} ***\n", flush=True)
    numbers = sorted(set(config.claims) or CLAIMS)
    origin = provenance(__file__) | pair.provenance() | {"threads": 1, "preset": config.preset}
    folder = config.out / "units" / fingerprint(origin | asdict(PRESETS[config.preset]))
    done: dict[int, list[Row]] = {}
    drawn: dict[int, list[Path]] = {}
    for number, found, files in tqdm(
        finished(config, folder, numbers), desc="claims", total=len(numbers), disable=None
    ):
        done[number], drawn[number] = [row | {"origin": origin} for row in found], files
    rows = [row for number in numbers for row in done[number]]
    with replacing(config.out / "checks.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    page = claims_page.write(rows, config.out, drawn=drawn)
    print(summary(rows).to_string(index=False))
    failed = [row for row in rows if not row["passed"]]
    for row in failed:
        print(f"\nFAILED: claim {row['claim']}, {row['name']}, on {row['setting']}")
        print(row["series"].get("traceback", ""), end="")
        for case in row["cases"]:
            if case["should"] not in (None, case["holds"]):
                expected = "should hold" if case["should"] else "should be rejected"
                print(f"    {case['name']}: {case['measured']:.3g} {case['relation']} {case['bound']:.3g} {expected}")
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(rows)} checks, {len(failed)} not as expected, {minutes:.1f} min")
    print(f"results: {config.out / 'checks.json'}\nledger, page and figures: {page}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    import verify_theory  # by name, so that worker processes import it too and keep what they have loaded

    verify_theory.main(tyro.cli(verify_theory.Config, description=__doc__))
