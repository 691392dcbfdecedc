"""Speed on language models: what curvature and the constraint cost beside the model's own work, and other libraries.

    python studies/benchmark_llm.py --preset default --out results/benchmark

Sections (`--sections` chooses):

* factors: K-FAC factors against a plain forward and truncated backward pass; drawn labels and EK-FAC beside them.
* peers: the same factors by curvlinops, kronfluence and bergson, where installed.
* layer: one training step of one edited layer at the shapes of Llama-3-8B and Qwen-2.5-1.5B, plain and constrained;
  the projection alone against the authors' four full products; and what that makes of the whole model's step.
* model: that step of a whole model of the same proportions at a sixteenth of the widths.
* stages: factors, eigenvectors and edits of a randomly initialised Llama-3-8B, seconds and peak memory (needs a GPU;
  with `--preset tiny` or `--device cpu` the same stages of a tiny model).

Ways take turns, and a ratio is the median over the turns. Operations are counted in multiply–adds; "bound" is the
ratio that they allow. Writes DIR/benchmark_llm.json (one row a comparison).
"""

import importlib
import importlib.metadata
import json
import os
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from curvlab.capture import Batch, to_device
from curvlab.curvature import EKFAC, KFAC
from curvlab.data.text import IGNORE, encode_documents, read_documents
from curvlab.data.world import make_world
from curvlab.descent import attach
from curvlab.eigenbasis import Eigenbasis, parametrize
from curvlab.layers import LayerShape, MatrixLayer, find_layers
from curvlab.losses import CrossEntropy
from curvlab.memory import human, peak
from curvlab.models.language import embedded_model, train_tokenizer
from curvlab.progress import progress
from curvlab.projector import NullSpace
from curvlab.records import Row, provenance
from curvlab.spectrum import Block, KroneckerBasis, Spectrum
from curvlab.storage import replacing

Section = Literal["factors", "peers", "layer", "model", "stages"]
SECTIONS: tuple[Section, ...] = ("factors", "peers", "layer", "model", "stages")
LR = 5e-4  # the paper's


@dataclass(frozen=True)
class Shape:
    """Proportions of a Llama-like model; `edited` are the blocks whose down_proj (width × mlp) is edited."""

    name: str
    width: int
    mlp: int
    blocks: int
    keys: int
    vocabulary: int
    edited: tuple[int, ...]
    heads: int

    @property
    def block(self) -> int:
        """Multiply–adds of a block a token, without attention's own products."""
        return 2 * self.width**2 + 2 * self.width * self.keys + 3 * self.width * self.mlp

    @property
    def head(self) -> int:
        """Of the logits."""
        return self.width * self.vocabulary

    @property
    def gram(self) -> int:
        """Of a aᵀ and g gᵀ of one layer, all entries."""
        return self.width**2 + self.mlp**2

    @property
    def layers(self) -> list[str]:
        """Names of the edited layers."""
        return [f"model.layers.{i}.mlp.down_proj" for i in self.edited]

    def forward_backward(self, length: int) -> float:
        """A token's plain forward pass and backward pass down to the lowest edited layer, texts of `length`."""
        above = self.blocks - self.edited[0] - 1
        attention = self.width * length  # causal: half of two products of width · length; backward takes twice that
        return self.blocks * (self.block + attention) + above * (self.block + 2 * attention) + 2 * self.head

    def step(self) -> float:
        """A token's share of a plain training step of the edited layers, the lowest one's input cached."""
        above = self.blocks - self.edited[0] - 1
        weights = len(self.edited) * self.width * self.mlp
        return self.width * self.mlp + 2 * above * self.block + 2 * self.head + weights

    def rotations(self) -> float:
        """What the eigenbasis adds to it: x U_in and back, U_out and back; the lowest layer's x U_in is cached."""
        return 2 * (len(self.edited) - 1) * (self.width**2 + self.mlp**2) + 2 * self.width**2

    def scaled(self, by: int) -> "Shape":
        """The same proportions, `by` times narrower."""
        head = 64 if self.heads % 8 == 0 else 32
        width, keys = self.width // by, max(self.keys // by, head)
        return replace(
            self, name=f"{self.name} / {by}", width=width, mlp=self.mlp // by, keys=keys,
            vocabulary=self.vocabulary // by, heads=max(width // head, 1),
        )  # fmt: skip

    def build(self, blocks: int | None = None, positions: int = 512, **options: Any) -> Any:
        """A randomly initialised Llama of this shape."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.width, intermediate_size=self.mlp, num_hidden_layers=blocks or self.blocks,
            num_attention_heads=self.heads, num_key_value_heads=max(self.keys * self.heads // self.width, 1),
            vocab_size=self.vocabulary, max_position_embeddings=positions, tie_word_embeddings=False, **options,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


LLAMA = Shape("Llama-3-8B", 4096, 14336, 32, 1024, 128256, (19, 20, 21, 22, 23), 32)
QWEN = Shape("Qwen-2.5-1.5B", 1536, 8960, 28, 256, 151936, (4, 5, 6), 12)
TWENTY = Shape("a Llama of 21 M parameters", 320, 1120, 12, 64, 8192, (7, 8), 5)  # Llama-3's ratios of widths


@dataclass(frozen=True)
class Sizes:
    """How much work a preset does.

    Attributes:
        turns: of each measurement, after a warm-up.
        model: whose factors are collected.
        documents, length: texts and their tokens, for the factors.
        by: divisor of the widths of the layers measured one by one; 1 is the true shape.
        gammas: of the null spaces.
        world: size of the embedded world whose model lends its spectra; None takes power laws.
        shrink: divisor of the widths of the whole models.
        stages: (shape, documents of the factors, edits) of the stages.
    """

    turns: int
    model: Shape
    documents: int
    length: int
    by: int
    gammas: tuple[float, ...]
    world: Literal["tiny", "smoke", "default"] | None
    shrink: int
    stages: tuple[Shape, tuple[int, ...], int]


SMALL = replace(LLAMA.scaled(64), name="Llama-3-8B / 64, six blocks", blocks=6, edited=(3, 4))
MINI = replace(SMALL, vocabulary=2048)
PRESETS = {
    "tiny": Sizes(1, MINI, 4, 48, 64, (0.9,), None, 64, (MINI, (4,), 6)),
    "smoke": Sizes(3, TWENTY, 4, 256, 8, (0.7, 0.9), "tiny", 32, (SMALL, (20,), 30)),
    "default": Sizes(3, TWENTY, 8, 512, 1, (0.7, 0.9), "smoke", 16, (LLAMA, (100, 1000), 3000)),
}
TOKENS = 1024  # of a step: 32 edits of 32 tokens


@dataclass(frozen=True)
class Config:
    """Command line of the benchmark.

    Attributes:
        preset: tiny (seconds, for tests), smoke (a minute) or default (the numbers of the README).
        out: folder of the results.
        seed: of models, data and random matrices.
        threads: that torch may use, for us and for the peers alike.
        sections: which comparisons.
        data: folder with text/ and edits/, CURVLAB_DATA by default; without one, texts of the embedded world.
        device: of the stages; by default a GPU where there is one.
    """

    preset: Literal["tiny", "smoke", "default"] = "default"
    out: Path = Path("results/benchmark")
    seed: int = 0
    threads: int = 2
    sections: tuple[Section, ...] = SECTIONS
    data: Path | None = None
    device: str | None = None

    @property
    def sizes(self) -> Sizes:
        return PRESETS[self.preset]

    @property
    def folder(self) -> Path | None:
        """Of the data."""
        given = self.data or os.environ.get("CURVLAB_DATA")
        return None if not given else Path(given)


# --- measuring -------------------------------------------------------------------------------------------------------


def race(turns: int, ways: dict[str, Callable[[], Any]], slow: float = 20.0) -> tuple[dict[str, list[float]], Any]:
    """(seconds of each way, turn by turn; last results), after a warm-up; what is slow (seconds) has no second turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(turns + 1):
        for name, way in ways.items():
            if seconds[name] and seconds[name][0] > slow:
                continue
            results.pop(name, None)
            start = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] or times for name, times in seconds.items()}, results


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median over the turns of over / under."""
    if len(over) == len(under):
        return statistics.median(a / b for a, b in zip(over, under, strict=True))
    return statistics.median(over) / statistics.median(under)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours − theirs| / max |theirs|."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def row(
    work: str, ours_s: float, against: str, against_s: float, value: float, goal: str = "", bound: float | None = None,
    diff: float | None = None, note: str = "",
) -> Row:  # fmt: skip
    """One comparison. A goal is "≤ 1.3" or "≥ 2": what `ratio` is held to."""
    met = None
    if goal:
        sign, number = goal.split()
        met = value <= float(number) if sign == "≤" else value >= float(number)
    return {
        "work": work, "ours_s": ours_s, "against": against, "against_s": against_s, "ratio": value, "goal": goal,
        "met": met, "bound": bound, "max_rel_diff": diff, "note": note,
    }  # fmt: skip


# --- factors ---------------------------------------------------------------------------------------------------------


def texts(config: Config) -> list[str]:
    """Documents: WikiText and TinyStories where there is a data folder, else those of the embedded world."""
    if config.folder is None:
        return list(make_world("tiny", seed=config.seed).training)
    found = sorted((config.folder / "text").glob("*.txt"))
    if not found:
        raise FileNotFoundError(f"{config.folder / 'text'} holds no *.txt; leave out --data for generated text")
    return [document for path in found for document in read_documents(path)]


def full_documents(config: Config, tokenizer: Any, n: int, length: int, batch_size: int) -> list[Batch]:
    """`n` documents of exactly `length` tokens each, without padding (short ones are joined)."""
    joined = " ".join(text for text in texts(config)[: 40 * n])
    ids = tokenizer(joined, return_tensors="pt")["input_ids"][0]
    while len(ids) < n * length:
        ids = torch.cat([ids, ids])
    ids = ids[: n * length].view(n, length)
    targets = torch.cat([ids[:, 1:], torch.full((n, 1), IGNORE)], 1)
    parts = zip(ids.split(batch_size), targets.split(batch_size), strict=True)
    return [Batch({"input_ids": x, "attention_mask": torch.ones_like(x)}, y) for x, y in parts]


def prepare(config: Config) -> tuple[Any, list[Batch]]:
    """The model whose factors are collected, and its documents."""
    shape = config.sizes.model
    tokenizer = train_tokenizer(tuple(texts(config)[:2000]), min(shape.vocabulary, 8192))
    torch.manual_seed(config.seed)
    return shape.build(), full_documents(config, tokenizer, config.sizes.documents, config.sizes.length, 4)


def forward_backward(model: nn.Module, batches: Sequence[Batch], lowest: str) -> None:
    """A forward pass, the mean cross-entropy, and its gradient at the output of layer `lowest`: what any method needs.

    No parameter asks for a gradient, so that the graph begins at that layer.
    """
    found: list[Tensor] = []

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    handle = model.get_submodule(lowest).register_forward_hook(begin)
    for batch in batches:
        logits = model(**batch.inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        torch.autograd.grad(loss, found.pop())
    handle.remove()
    for p, flag in flags:
        p.requires_grad_(flag)


def outer_products(model: nn.Module, batch: Batch, layer: str) -> tuple[Tensor, Tensor]:
    """Σ a aᵀ per position and Σ g gᵀ per loss term, float64, by the module's own hooks and autograd."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.update(a=args[0].detach(), s=output)

    handle = model.get_submodule(layer).register_forward_hook(keep)
    logits = model(**batch.inputs, use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    handle.remove()
    model.zero_grad()
    assert seen["s"].grad is not None
    a, g = (t.flatten(0, 1).double() for t in (seen["a"], seen["s"].grad))
    return a.mT @ a / len(a), g.mT @ g / int((batch.targets != IGNORE).sum())


def factors(config: Config) -> Iterator[Row]:
    """K-FAC factors of all chosen layers in one pass, against the forward and truncated backward pass alone."""
    sizes, shape = config.sizes, config.sizes.model
    model, batches = prepare(config)
    kfac = KFAC.fit(model, CrossEntropy(), batches[:1], shape.layers[-1:], labels="data").factors[shape.layers[-1]]
    A, S = outer_products(model, batches[0], shape.layers[-1])
    diff = max(difference(kfac.A, A), difference(kfac.S, S))
    every = replace(shape, edited=tuple(range(shape.blocks)))
    for chosen, label in ((shape, f"{len(shape.edited)} of {shape.blocks} layers"), (every, "all layers")):
        fit = partial(KFAC.fit, model, CrossEntropy(), batches, chosen.layers)
        kfac_all = fit(labels="model")
        ways: dict[str, Callable[[], Any]] = {
            "plain": partial(forward_backward, model, batches, chosen.layers[0]),
            "data": partial(fit, labels="data"),
            "model": partial(fit, labels="model"),
            "EK-FAC": partial(
                EKFAC.fit, model, CrossEntropy(), batches, chosen.layers, labels="model", kfac=kfac_all
            ),
        }  # fmt: skip
        if chosen is every:
            del ways["EK-FAC"]
        seconds, _ = race(sizes.turns, ways, slow=60.0)
        bounds = {"data": factor_bound(chosen, sizes.length), "EK-FAC": second_pass_bound(chosen, sizes.length)}
        for name in (name for name in ways if name != "plain"):
            told = {"data": "K-FAC, labels of the data", "model": "K-FAC, labels drawn from the model",
                    "EK-FAC": "EK-FAC's second pass, drawn labels (eigenvectors included)"}[name]  # fmt: skip
            yield row(
                f"{told}: down_proj of {label}, {shape.name}, {sizes.documents} × {sizes.length} tokens",
                statistics.median(seconds[name]), "forward + truncated backward",
                statistics.median(seconds["plain"]), ratio(seconds[name], seconds["plain"]),
                "≤ 1.3" if name == "data" else "", bounds.get(name, bounds["data"]), diff if name == "data" else None,
                "bound: of all entries of a aᵀ and g gᵀ; half of them do",
            )  # fmt: skip
    for real in (LLAMA, QWEN):
        one, two = factor_bound(real, 512), second_pass_bound(real, 512)
        print(f"operations at {real.name}, {len(real.edited)} layers, 512 tokens: factors {one:.3f} × (halves of the "
              f"symmetric sums {1 + (one - 1) / 2:.3f} ×) a forward and truncated backward pass, EK-FAC's second pass "
              f"{two:.2f} ×; a layer's sums take {real.gram / 1e6:.0f} M multiply–adds a token")  # fmt: skip


def factor_bound(shape: Shape, length: int) -> float:
    """(forward + truncated backward + sums) / (forward + truncated backward), in multiply–adds."""
    return 1 + len(shape.edited) * shape.gram / shape.forward_backward(length)


def second_pass_bound(shape: Shape, length: int) -> float:
    """The same for EK-FAC's second pass, (U_outᵀ Σ_t g aᵀ U_in)² of each text: a U_in, the sum, and U_outᵀ."""
    d, f = shape.width, shape.mlp
    squares = f**2 + d * f + d**2 * f / length
    return 1 + len(shape.edited) * squares / shape.forward_backward(length)


# --- peers -----------------------------------------------------------------------------------------------------------


def peers(config: Config) -> Iterator[Row]:
    """The same factors, labels of the data, by other libraries; sums or means as each defines them."""
    shape, sizes = config.sizes.model, config.sizes
    model, whole = prepare(config)
    fits: dict[str, tuple[Callable[..., Callable[[], Factor]], str]] = {
        "curvlinops": (by_curvlinops, "≥ 2"),
        "curvlinops without its checks": (partial(by_curvlinops, checks=False), "≥ 2"),
        "kronfluence": (by_kronfluence, "≥ 1"),
        "bergson": (by_bergson, "≥ 1"),
    }
    missing = [name for name in fits if find_spec(name.split()[0]) is None]
    for name in missing:
        print(f"{name} is not installed: its rows are left out", flush=True)
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".mlp." in name]
    for layers, label, batches in (
        (shape.layers, f"{len(shape.edited)} down_proj", whole),
        (every, f"all {len(every)} MLP layers", whole[:1]),
    ):
        ways: dict[str, Callable[[], Any]] = {
            name: fit(model, batches, layers) for name, (fit, _) in fits.items() if name not in missing
        }
        ways["ours"] = partial(KFAC.fit, model, CrossEntropy(), batches, layers, labels="data")
        ways["plain"] = partial(forward_backward, model, batches, layers[0])
        seconds, results = race(sizes.turns, ways, slow=60.0)
        ours = results.pop("ours").factors
        del results["plain"]
        for name, theirs in results.items():
            diff, means = 0.0, name.startswith("curvlinops")
            for layer, (A, S) in theirs.items():
                mine = (ours[layer].A, ours[layer].S) if means else (ours[layer].a_sum, ours[layer].s_sum)
                diff = max(diff, difference(mine[0], A), difference(mine[1], S))
            beyond = [statistics.median(seconds[n]) - statistics.median(seconds["plain"]) for n in (name, "ours")]
            scale = "means a position and a loss term" if means else "sums"
            yield row(
                f"K-FAC factors, labels of the data: {label}, {shape.name}", statistics.median(seconds["ours"]), name,
                statistics.median(seconds[name]), ratio(seconds[name], seconds["ours"]), fits[name][1],
                ratio(seconds[name], seconds["plain"]), diff,
                f"its factors are {scale}, equal to ours; bound: of factors for free, since both take the forward and "
                f"truncated backward pass; beyond these it takes {beyond[0]:.3g} s, ours {beyond[1]:.3g} s",
            )  # fmt: skip


Factor = dict[str, tuple[Tensor, Tensor]]


def by_curvlinops(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[str], checks: bool = True
) -> Callable[[], Factor]:
    """KFACLinearOperator on the chosen weights alone; logits as (N, C, T), as it wants them.

    `checks`, on by default there, takes the gradient of all data twice and multiplies twice to see that both agree.
    """
    from curvlinops import FisherType, KFACLinearOperator

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(input_ids=x, use_cache=False).logits.mT

    data = [(batch.inputs["input_ids"], batch.targets) for batch in batches]
    terms = int((batches[0].targets[0] != IGNORE).sum())

    def fit() -> Factor:
        with frozen_but(model, layers) as weights:
            operator = KFACLinearOperator(
                Logits(), nn.CrossEntropyLoss(), weights, data, fisher_type=FisherType.EMPIRICAL,
                check_deterministic=checks, num_data=sum(len(y) for _, y in data), num_per_example_loss_terms=terms,
            )  # fmt: skip
            if not checks:  # (which have computed them; twice would double them)
                operator.compute_kronecker_factors()
        A, S = operator._input_covariances, operator._gradient_covariances
        return {name: (A[f"model.{name}"], S[f"model.{name}"]) for name in layers}

    return fit


def by_kronfluence(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Callable[[], Factor]:
    """Its covariance pass on its own copy of the model, whose layers it wraps; nothing is written to disk."""
    import copy

    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class NextToken(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
            labels = batch["labels"].flatten()
            return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(layers)

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    task = NextToken()
    prepared = prepare_model(copy.deepcopy(model), task)
    loader: Any = [batch.inputs | {"labels": batch.targets} for batch in batches]
    arguments = FactorArguments(use_empirical_fisher=True)

    def fit() -> Factor:
        _, found = fit_covariance_matrices_with_loader(
            prepared, State(cpu=True), task, loader, arguments, disable_tqdm=True
        )
        A, S = found["activation_covariance"], found["gradient_covariance"]
        return {name: (A[name], S[name]) for name in layers}

    return fit


def by_bergson(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Callable[[], Factor]:
    """Its covariance collector in a plain loop (its pipeline writes to disk)."""
    collectors = importlib.import_module("bergson.hessians.kfac")

    def begin(module: nn.Module, args: tuple[Tensor]) -> None:
        args[0].requires_grad_()  # the graph begins here; no weight asks for a gradient

    def fit() -> Factor:
        handle = model.get_submodule(layers[0]).register_forward_pre_hook(begin)
        with frozen_but(model, ()):
            collector = collectors.CovarianceCollector(model, target_modules=set(layers), dtype=torch.float32, path="")
            for batch in batches:
                with collector.with_batch(batch.inputs["attention_mask"].bool()):
                    logits = model(**batch.inputs, use_cache=False).logits
                    labels = batch.targets.flatten()
                    F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum").backward()
        handle.remove()
        return {name: (collector.A_cov_dict[name], collector.S_cov_dict[name]) for name in layers}

    return fit


class frozen_but(ExitStack):
    """Only the weights of some layers ask for a gradient meanwhile; gives those weights."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def __enter__(self) -> Any:
        for p in self.model.parameters():
            self.callback(p.requires_grad_, p.requires_grad)
        self.model.requires_grad_(False)
        return [self.model.get_parameter(f"{name}.weight").requires_grad_() for name in self.layers]


# --- one layer's step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """One linear layer, its inputs (T, d_in), the gradient at its outputs, and the eigenvectors of a curvature."""

    W: Tensor
    x: Tensor
    g: Tensor
    basis: KroneckerBasis

    @classmethod
    def of(cls, shape: Shape, tokens: int, seed: int) -> "Bench":
        generator = torch.Generator().manual_seed(seed)
        d, f = shape.width, shape.mlp
        W = torch.randn(d, f, generator=generator) / f**0.5
        x, g = torch.randn(tokens, f, generator=generator), torch.randn(tokens, d, generator=generator) / tokens
        u_out, u_in = (rotation(n, generator) for n in (d, f))
        return cls(W, x, g, KroneckerBasis(LayerShape("layer", d, f, False), u_out, u_in))

    def model(self) -> nn.Sequential:
        """A fresh model of that one layer."""
        layer = nn.Linear(self.W.shape[1], self.W.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(self.W.clone())
        return nn.Sequential(OrderedDict(layer=layer))

    def null_space(self, values: tuple[Tensor, Tensor], gamma: float) -> NullSpace:
        """Of a curvature with these eigenvectors and eigenvalues (λ_out, λ_in)."""
        grid = values[0][:, None] * values[1][None, :]
        return Spectrum((Block(self.basis, grid, float(grid.sum())),)).null_space(gamma)


def rotation(n: int, generator: torch.Generator) -> Tensor:
    """A full orthogonal matrix (n, n) made in n² operations: a cosine transform with signs at random."""
    i = torch.arange(n, dtype=torch.float64)
    U = torch.empty(n, n)
    for rows in i.long().split(1024):
        angles = torch.outer(2 * rows + 1.0, i).mul_(torch.pi / (2 * n))
        U[rows] = (angles.cos_() * (2 / n) ** 0.5).float()
    U[:, 0] *= 0.5**0.5
    return U * (torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1)


def spectra(config: Config, shape: Shape) -> tuple[str, tuple[Tensor, Tensor]]:
    """Eigenvalues (λ_out, λ_in), float64: of a trained embedded model's down_proj, stretched to the shape."""
    world_size = config.sizes.world
    if world_size is None:
        law = (torch.arange(1, n + 1, dtype=torch.float64) ** -1.0 for n in (shape.width, shape.mlp))
        return "power law 1/i", (next(law), next(law))
    world = make_world(world_size, seed=config.seed)
    model, tokenizer = embedded_model(world, "llama")
    batches = encode_documents(tokenizer, world.capability(200, config.seed), batch_size=50)
    name = [n for n, _ in model.named_modules() if n.endswith("down_proj")][-1]
    found = KFAC.fit(model, CrossEntropy(), batches, name, labels="model").factors[name]
    values = (torch.linalg.eigvalsh(factor.double()).flip(0) for factor in (found.S, found.A))
    return f"spectra of a trained {found.layer.d_out} × {found.layer.d_in} down_proj, stretched", (
        stretched(next(values), shape.width), stretched(next(values), shape.mlp),
    )  # fmt: skip


def stretched(values: Tensor, n: int) -> Tensor:
    """A spectrum of another length: log λ (at least 1e-12 of the top) interpolated over the relative index."""
    logs = values.clamp_min(1e-12 * float(values[0])).log()
    return F.interpolate(logs[None, None], size=n, mode="linear", align_corners=True)[0, 0].exp()


def four_products(Q: Tensor, u_out: Tensor, u_in: Tensor, keep: Tensor) -> Tensor:
    """The authors' formula: U_out ((U_outᵀ Q U_in) ⊙ M) U_inᵀ with all eigenvectors."""
    return u_out @ ((u_out.mT @ Q @ u_in) * keep) @ u_in.mT


@dataclass(frozen=True)
class Way:
    """A way to take one layer's training step: forward, backward, constraint, update."""

    step: Callable[[], None]
    displacement: Callable[[], Tensor]


WAYS = ("plain", "plain, lowest", "four products", "projected gradient", "projected update", "eigenbasis",
        "eigenbasis, lowest")  # fmt: skip


def layer_ways(
    bench: Bench, null: NullSpace, make: Callable[..., torch.optim.Optimizer], names: Sequence[str] = WAYS
) -> dict[str, Way]:
    """Ways by name. "lowest": of the lowest edited layer, whose input is given and asks for no gradient."""
    u_out, u_in = orthogonal(bench)
    keep = (~removed(null)).float()
    compact = null.compact() if any(name.startswith("projected") for name in names) else null

    def way(name: str) -> Way:
        lowest, model = "lowest" in name, bench.model()
        (weight,) = model.parameters()
        displacement, rotated = lambda: weight.detach() - bench.W, None
        if name.startswith("eigenbasis"):
            eigen = parametrize(model, null)
            optimizer = make(eigen.parameters())
            eigen.attach(optimizer)
            displacement = lambda: eigen.displacement()["layer"]  # noqa: E731
            rotated = eigen.rotate_input("layer", bench.x) if lowest else None
            with torch.no_grad():
                model(bench.x[:1])  # W0 is rotated once, before the first step
        else:
            optimizer = make([weight])
            if name.startswith("projected"):
                attach(model, optimizer, compact, project="update" if "update" in name else "gradient")

        def step() -> None:
            if rotated is not None:
                eigen.use_rotated("layer", rotated)
            optimizer.zero_grad()  # (the coordinates are no parameters of the model)
            backward(model, bench, lowest)
            if name == "four products":
                assert weight.grad is not None
                weight.grad = four_products(weight.grad, u_out, u_in, keep)
            optimizer.step()

        return Way(step, displacement)

    return {name: way(name) for name in names}


def checked(shape: Shape, values: tuple[Tensor, Tensor], gamma: float, seed: int) -> dict[str, float]:
    """How far one SGD step of each way is from the four products', at a sixty-fourth of the widths."""
    small = replace(shape, width=max(shape.width // 64, 24), mlp=max(shape.mlp // 64, 48))
    bench = Bench.of(small, 40, seed)
    fewer = stretched(values[0], small.width), stretched(values[1], small.mlp)
    ways = layer_ways(bench, bench.null_space(fewer, gamma), partial(torch.optim.SGD, lr=1.0))
    for way in ways.values():
        way.step()
    reference = ways["four products"].displacement()
    constrained = [name for name in ways if not name.startswith("plain") and name != "four products"]
    return {name: difference(ways[name].displacement(), reference) for name in constrained}


def layer(config: Config) -> Iterator[Row]:
    """One step of one layer: plain, by the authors' formula, by the staircase of eigenvectors, in the eigenbasis."""
    sizes = config.sizes
    for whole in (LLAMA, QWEN):
        shape = whole if sizes.by == 1 else whole.scaled(sizes.by)
        tokens = max(TOKENS // sizes.by, 16)  # so that tokens and widths keep their proportion
        label, values = spectra(config, shape)
        bench = Bench.of(shape, tokens, config.seed)
        adam = partial(torch.optim.Adam, lr=LR)
        unconstrained: dict[str, list[float]] = {}
        for gamma in sizes.gammas:
            null = bench.null_space(values, gamma)
            diffs = checked(shape, values, gamma, config.seed)
            if not unconstrained:  # the same for every γ
                unconstrained, diffs["four products"] = of_no_gamma(bench, null, sizes.turns)
            ways = layer_ways(bench, null, adam, ("plain", "projected gradient", "projected update"))
            seconds, _ = race(min(sizes.turns, 2), {name: way.step for name, way in ways.items()})
            del ways
            yield from of_layer(shape, tokens, null, gamma, label, unconstrained, seconds, diffs)


def of_no_gamma(bench: Bench, null: NullSpace, turns: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of the ways whose cost the mask does not change; how far our projection is from the four products."""
    names = ("plain", "plain, lowest", "eigenbasis", "eigenbasis, lowest")
    ways = layer_ways(bench, null, partial(torch.optim.Adam, lr=LR), names)
    timed: dict[str, Callable[[], Any]] = {name: way.step for name, way in ways.items()}
    timed["products"] = partial(backward, bench.model(), bench)
    timed["four products"] = partial(four_products, bench.W, *orthogonal(bench), (~removed(null)).float())
    seconds, results = race(min(turns, 2), timed)
    ours = null.project({"layer": bench.W})["layer"]
    return seconds, difference(ours, results["four products"])


def backward(model: nn.Module, bench: Bench, lowest: bool = False) -> None:
    """The layer's three products: its output, the gradient at its input (not of the lowest one), that of its weight."""
    model.zero_grad()
    model(bench.x if lowest else bench.x.detach().requires_grad_()).backward(bench.g)


def orthogonal(bench: Bench) -> tuple[Tensor, Tensor]:
    """(U_out, U_in)."""
    assert bench.basis.u_out is not None
    return bench.basis.u_out, bench.basis.u_in


def removed(null: NullSpace) -> Tensor:
    """The mask of the one layer."""
    (block,) = null.blocks
    return block.removed


def of_layer(
    shape: Shape, tokens: int, null: NullSpace, gamma: float, label: str, unconstrained: dict[str, list[float]],
    seconds: dict[str, list[float]], diffs: dict[str, float],
) -> Iterator[Row]:  # fmt: skip
    """What one layer's seconds say of the projection alone and of the whole model's step."""
    s = {name: statistics.median(times) for name, times in unconstrained.items()}
    projected = {name: statistics.median(times) for name, times in seconds.items()}
    d, f, edited = shape.width, shape.mlp, len(shape.edited)
    (block,) = null.blocks
    assert isinstance(block.basis, KroneckerBasis)
    full = 2.0 * d * f * (d + f)
    rows, columns = int(block.removed.any(1).sum()), int(block.removed.any(0).sum())
    cost = block.basis.cost(block.removed)
    what = f"{shape.name}, {edited} × ({d}, {f}), {tokens} tokens, γ = {gamma}"
    note = f"{label}; removed staircase within {rows} × {columns}"
    speed = 3 * tokens * d * f / s["products"]  # for what is not measured of the model
    measured = tokens * (d * f * (3 * edited - 1))
    plain = (tokens * shape.step() - measured) / speed + (edited - 1) * s["plain"] + s["plain, lowest"]
    noise = 1e-9  # at tiny sizes a constraint can seem to take less than nothing
    extra = {
        name: edited * max(projected[name] - projected["plain"], noise)
        for name in ("projected gradient", "projected update")
    }
    extra["four products"] = edited * s["four products"]
    rotating = (edited - 1) * (s["eigenbasis"] - s["plain"]) + s["eigenbasis, lowest"] - s["plain, lowest"]
    extra["eigenbasis"] = max(rotating, noise)
    operations = {
        "four products": edited * full, "projected gradient": edited * cost, "projected update": edited * cost,
        "eigenbasis": tokens * shape.rotations(),
    }  # fmt: skip
    diff = diffs | {"eigenbasis": max(diffs["eigenbasis"], diffs["eigenbasis, lowest"])}
    goal = "≤ 1.3" if shape.name.startswith("Llama") else "≤ 1.2"
    best = min(("projected gradient", "projected update", "eigenbasis"), key=lambda name: extra[name])
    for name in extra:
        yield row(
            f"whole model's step, {name}: {what}", plain + extra[name], "plain step", plain, 1 + extra[name] / plain,
            goal if name == best else "", 1 + operations[name] / (tokens * shape.step()), diff.get(name),
            f"{'the fastest way; ' if name == best else ''}{note}; the rest of the model at the layer's own speed",
        )  # fmt: skip
    for name in ("projected gradient", "projected update", "eigenbasis"):
        yield row(
            f"projection alone, {name}: {what}", extra[name], "four full products", extra["four products"],
            extra["four products"] / extra[name], "≥ 2.5" if name == best else "",
            operations["four products"] / operations[name], diff[name],
            f"what it adds to a plain step of the {edited} layers; {note}",
        )  # fmt: skip


# --- a whole model's step --------------------------------------------------------------------------------------------


def model(config: Config) -> Iterator[Row]:
    """Training steps of whole models, narrower in proportion: work and rotations shrink alike at equal tokens."""
    sizes = config.sizes
    for whole in (LLAMA, QWEN):
        shape = whole.scaled(sizes.shrink)
        if sizes.shrink > 32:
            shape = replace(shape, blocks=shape.edited[-1] + 2)
        tokens = TOKENS if sizes.shrink <= 32 else 128
        tail = Tail.of(shape, tokens, config.seed)
        diff, seconds = tail.difference(), tail.race(sizes.turns)
        plain = statistics.median(seconds["plain"])
        goal = "≤ 1.3" if whole is LLAMA else "≤ 1.2"
        yield row(
            f"whole model's step, eigenbasis, measured: {shape.name} ({shape.width} wide), {tokens} tokens",
            statistics.median(seconds["eigenbasis"]), "plain step", plain,
            ratio(seconds["eigenbasis"], seconds["plain"]), goal, 1 + shape.rotations() / shape.step(), diff,
            f"{len(shape.edited)} down_proj, Adam, logits at every token, lowest input and its rotation cached",
        )  # fmt: skip


class Cached(nn.Module):
    """In place of the lowest edited block: its stored residual and input of down_proj."""

    def __init__(self, block: Any, residual: Tensor, inputs: Tensor) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"down_proj": block.mlp.down_proj})
        self.residual, self.inputs = residual, inputs

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.residual + self.mlp["down_proj"](self.inputs)


@dataclass(frozen=True)
class Tail:
    """A model from its lowest edited down_proj on, that layer's inputs, and a constraint on the edited layers."""

    model: Any
    layers: list[MatrixLayer]
    inputs: Tensor
    ids: Tensor
    targets: Tensor
    null: NullSpace
    start: list[Tensor]

    @classmethod
    def of(cls, shape: Shape, tokens: int, seed: int) -> "Tail":
        torch.manual_seed(seed)
        lowest = shape.edited[0]
        above = replace(shape, blocks=shape.blocks - lowest, edited=tuple(i - lowest for i in shape.edited))
        model = above.build()
        examples = max(tokens // 32, 1)
        residual, inputs = torch.randn(examples, 32, shape.width), torch.randn(examples, 32, shape.mlp)
        model.model.layers[0] = Cached(model.model.layers[0], residual, inputs)
        ids, targets = (torch.randint(shape.vocabulary, (examples, 32)) for _ in range(2))
        layers = find_layers(model, above.layers)
        generator = torch.Generator().manual_seed(seed)
        blocks = []
        for layer in layers:
            basis = KroneckerBasis(layer.shape, *(rotation(n, generator) for n in (layer.d_out, layer.d_in)))
            grid = torch.ones(layer.d_out, layer.d_in, dtype=torch.float64)
            grid[: layer.d_out // 2, : layer.d_in // 4] = 100.0
            blocks.append(Block(basis, grid, float(grid.sum())))
        null = Spectrum(tuple(blocks)).null_space(0.9)
        return cls(model, layers, inputs, ids, targets, null, [layer.matrix().clone() for layer in layers])

    def way(
        self, constrained: bool, make: Callable[..., torch.optim.Optimizer]
    ) -> tuple[Callable[[], None], Eigenbasis | None]:
        """A training step, in the eigenbasis or plain; all start from the same weights."""
        self.restore()
        self.model.requires_grad_(False)
        eigen = parametrize(self.model, self.null) if constrained else None
        weights = [p.requires_grad_() for layer in self.layers for p in layer.parameters()] if eigen is None else []
        optimizer = make(weights if eigen is None else eigen.parameters())
        lowest = self.layers[0].name
        rotated = None if eigen is None else eigen.attach(optimizer).rotate_input(lowest, self.inputs)

        def step() -> None:
            optimizer.zero_grad()
            if eigen is not None and rotated is not None:
                eigen.use_rotated(lowest, rotated)
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1), self.targets.flatten()).backward()
            optimizer.step()

        return step, eigen

    def restore(self) -> None:
        for layer, start in zip(self.layers, self.start, strict=True):
            layer.write(start)

    def difference(self) -> float:
        """Between one SGD step in the eigenbasis and the projection of the plain one."""
        sgd = partial(torch.optim.SGD, lr=1.0)
        self.way(False, sgd)[0]()
        plain = {layer.name: layer.matrix() - start for layer, start in zip(self.layers, self.start, strict=True)}
        expected = self.null.project(plain)
        step, eigen = self.way(True, sgd)
        step()
        assert eigen is not None
        found = eigen.displacement()
        eigen.merge()
        return max(difference(found[name], Q) for name, Q in expected.items())

    def race(self, turns: int) -> dict[str, list[float]]:
        """Seconds of plain and constrained steps with Adam, in turns."""
        seconds: dict[str, list[float]] = {"plain": [], "eigenbasis": []}
        for turn in range(turns + 1):
            for name, times in seconds.items():
                step, eigen = self.way(name == "eigenbasis", partial(torch.optim.Adam, lr=LR))
                step()  # Adam makes room for its moments, the weights are rotated
                begin = time.perf_counter()
                step()
                if turn:
                    times.append(time.perf_counter() - begin)
                if eigen is not None:
                    eigen.merge()
        return seconds


# --- stages ----------------------------------------------------------------------------------------------------------


def stages(config: Config) -> Iterator[Row]:
    """Factors, eigenvectors and edits of a randomly initialised model, one after another, on a GPU."""
    from curvlab.data.edits import load_edits
    from curvlab.editing import Capability, edit

    shape, counts, n_edits = config.sizes.stages
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and config.device is None and config.preset != "tiny":
        print("no GPU: the stages are left out (--device cpu runs them here)", flush=True)
        return
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    tokenizer = train_tokenizer(tuple(texts(config)[:2000]), min(shape.vocabulary, 8192))
    torch.manual_seed(config.seed)
    with device:
        model = shape.build().to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    length = 512 if device.type == "cuda" else 64

    def stage(name: str, function: Callable[[], Any], note: str = "") -> tuple[Row, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        most = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak()
        kind = "allocated on the GPU" if device.type == "cuda" else "resident, of the whole process so far"
        told = f"peak {human(most)} {kind}{note}"
        found = row(f"stage: {name}, {shape.name}, {where}", seconds, "", 0.0, 0.0, note=told)
        return found | {"ratio": None, "against_s": None, "peak_bytes": most, "device": where}, result

    fit = partial(KFAC.fit, model, CrossEntropy(), layers=shape.layers, labels="model")
    for n in counts:
        batches = full_documents(config, tokenizer, n, length, 8)
        found, kfac = stage(f"K-FAC factors of {n} documents of {length} tokens", partial(fit, batches))
        there = [Batch(to_device(b.inputs, device), b.targets.to(device)) for b in batches]
        plain, _ = stage("the passes alone", partial(forward_backward, model, there, shape.layers[0]))
        value = found["ours_s"] / plain["ours_s"]
        bound = factor_bound(shape, length)
        yield found | {"against": "forward + truncated backward", "against_s": plain["ours_s"], "ratio": value,
                       "goal": "≤ 1.3" if device.type == "cuda" else "", "bound": bound,
                       "met": value <= 1.3 if device.type == "cuda" else None}  # fmt: skip
    found, _ = stage("eigenvectors of all factors, float64", kfac.spectrum)
    yield found
    joined = " ".join(texts(config)[: 40 * counts[0]])
    pieces = [joined[i : i + 8 * length] for i in range(0, len(joined), 8 * length)]
    capability = Capability(pieces[: counts[0]], max_length=length)
    requests = load_edits("counterfact", n_edits, data=config.folder) if config.folder is not None else (
        make_world("tiny", seed=config.seed).requests(n_edits, config.seed))  # fmt: skip
    for project in ("gradient", "update", "eigenbasis"):
        found, edited = stage(
            f"{n_edits} edits with cached curvature, project={project}",
            partial(
                edit, model, tokenizer, requests, layers=shape.layers, capability=capability, seed=config.seed,
                project=project, drift=None,
            ),
        )  # fmt: skip
        goal = "≤ 90" if device.type == "cuda" and n_edits >= 3000 else ""
        note = f"; {edited.counts['epochs']} epochs, ended by {edited.stopped}; the paper: 246 s on an A40"
        yield found | {"ours_s": edited.seconds, "ratio": edited.seconds, "goal": goal, "note": found["note"] + note,
                       "met": edited.seconds <= 90 if goal else None}  # fmt: skip
        edited.undo()


# --- the run ---------------------------------------------------------------------------------------------------------


RUNNERS: dict[Section, Callable[[Config], Iterator[Row]]] = {
    "factors": factors, "peers": peers, "layer": layer, "model": model, "stages": stages,
}  # fmt: skip


def about_this_run(config: Config) -> Row:
    """Where and with what the numbers were measured."""
    installed = {d.name.lower() for d in importlib.metadata.distributions()}
    names = ("transformers", "curvlinops-for-pytorch", "kronfluence", "bergson")
    versions = {name: importlib.metadata.version(name) for name in names if name in installed}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    cpu = ", ".join(f"{name} {fields[name]}" for name in ("model name", "cpu family", "model") if name in fields)
    text = "$CURVLAB_DATA/text" if config.folder is not None else "the embedded world"
    return provenance(__file__) | versions | {"cpu": cpu, "preset": config.preset, "seed": config.seed, "text": text}


def show(rows: Sequence[Row]) -> str:
    """The rows as people read them."""
    shown = ["work", "ours_s", "against", "against_s", "ratio", "goal", "met", "bound", "max_rel_diff"]
    table = pd.DataFrame(rows)[shown]
    for name in ("ours_s", "against_s", "ratio", "bound", "max_rel_diff"):
        table[name] = ["" if value is None or pd.isna(value) else f"{value:.3g}" for value in table[name]]
    table["met"] = ["" if value is None else ("yes" if value else "no") for value in table["met"]]
    return table.to_string(index=False, max_colwidth=110)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    about = about_this_run(config)
    rows: list[Row] = []
    path = config.out / "benchmark_llm.json"
    for section in progress([s for s in SECTIONS if s in config.sections], "benchmark"):
        print(f"\n{section}: {RUNNERS[section].__doc__}", flush=True)
        found = list(RUNNERS[section](config))
        if not found:
            continue
        rows += [{"section": section} | entry | about for entry in found]
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        print(show(found), flush=True)
    print(f"\n{path}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
