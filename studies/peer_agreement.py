"""The same model and data through other libraries: Hessian, GGN, K-FAC, EK-FAC and input covariances in one table.

    python studies/peer_agreement.py --preset default --out results/crosscheck

An MLP, a small CNN, a causal sequence model and a small Llama (where transformers is installed), in float64, by curvlab
and by curvlinops, nngeometry and kronfluence (extra `peers`; those that are not installed are left out, and said).
Kronecker factors are compared as the product A ⊗ S, between whose two sides scalars move freely; input covariances by
themselves. Where scales differ, the factor is named by counts (`curvlab.crosscheck.scales`), never fitted.

Writes DIR/peers.json (a row a comparison) and DIR/peers.md. Exit status 1 where a row does not agree.
"""

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from benchmark_curvature import markdown
from peers import NOT_COMPARED, PEERS, Case, Matrices, installed, kronecker, reordered
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlab.crosscheck.scales import explain
from curvlab.curvature import EKFAC, KFAC, GaussNewton, Hessian
from curvlab.losses import CrossEntropy
from curvlab.models import MLP
from curvlab.models.sequence import RunningMean
from curvlab.progress import progress
from curvlab.records import Row, provenance
from curvlab.storage import replacing

# round-off of float64 through sums over all examples and eigenvectors of well-separated eigenvalues
TOLERANCE = 2**20 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Config:
    """Command line of the study.

    Attributes:
        preset: tiny (seconds, for tests) or default (wider models, more examples, three seeds).
        out: folder of the table.
        seed: of the models and data; the default preset takes it and the next two.
    """

    preset: Literal["tiny", "default"] = "default"
    out: Path = Path("results/crosscheck")
    seed: int = 0


def cases(seed: int, large: bool) -> Iterator[Case]:
    """The models with their data; sizes are chosen so that no two counts are equal."""
    torch.manual_seed(seed)
    wide = 2 if large else 1
    n, batch = (55, 11) if large else (22, 11)
    classes, sizes = 4, (batch,) * (n // batch)
    mlp = MLP([5 * wide, 6 * wide, 3 * wide, classes], "tanh")
    x = torch.randn(n, 5 * wide)
    yield Case("MLP", mlp, x, torch.randint(classes, (n,)), classes, sizes, {"fc1": 1, "fc2": 1, "fc3": 1}, True)

    side = 14 if large else 10
    pixels = (side // 2 - 2) ** 2
    cnn = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(3 * pixels, 5), nn.Tanh(), nn.Linear(5, classes),
    )  # fmt: skip
    x = torch.randn(n, 1, side, side)
    positions = {"0": side**2, "3": pixels, "6": 1, "8": 1}
    yield Case("CNN", cnn, x, torch.randint(classes, (n,)), classes, sizes, positions, True)

    T = 7
    sequence = RunningMean([3 * wide, 5 * wide, classes])
    x = torch.randn(n, T, 3 * wide)
    y = torch.randint(classes, (n, T))
    yield Case("sequence model", sequence, x, y, classes, sizes, {"fc1": T, "fc2": T}, True)

    if find_spec("transformers") is None:
        print("transformers is not installed: the Llama is left out (pip install 'curvlab[llm]')")
        return
    vocabulary, names = 13, [f"model.model.layers.{i}.mlp.down_proj" for i in range(2)]
    ids = torch.randint(vocabulary, (n, T + 1))
    llama = Llama(vocabulary, 4 * wide, 6 * wide)
    yield Case("Llama", llama, ids[:, :-1], ids[:, 1:], vocabulary, sizes, dict.fromkeys(names, T), False)


class Llama(nn.Module):
    """Two layers with random weights, called with token numbers, giving logits."""

    def __init__(self, vocabulary: int, width: int, mlp: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.5,
        )  # fmt: skip
        config._attn_implementation = "sdpa"  # transformers' own takes the softmax in float32
        llama: Any = LlamaForCausalLM(config)
        self.model = llama.to(dtype=torch.get_default_dtype()).eval()
        for layer in self.model.model.layers:
            layer.mlp.act_fn = Swish()
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, nn.RMSNorm(width, eps=1e-6))  # transformers' own computes in float32
        self.model.model.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, ids: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only one with second derivatives
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


class Swish(nn.Module):
    """SiLU in two operations: torch's own has no second derivative in forward mode, which curvlinops' Hessian takes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def by_curvlab(case: Case) -> Matrices:
    """Ours, in our scale: means over loss terms, A over positions."""
    arguments = (case.model, CrossEntropy(), case.data, list(case.positions))
    out: Matrices = {
        ("Hessian", ""): Hessian.fit(*arguments, bias=case.bias).dense("parameters"),
        ("GGN", ""): GaussNewton.fit(*arguments, bias=case.bias).dense("parameters"),
    }
    for labels, name in (("exact", "exact labels"), ("data", "labels of the data")):
        kfac = KFAC.fit(*arguments, labels=labels, bias=case.bias)  # type: ignore[arg-type]
        ekfac = EKFAC.fit(*arguments, labels=labels, bias=case.bias, kfac=kfac)  # type: ignore[arg-type]
        for layer, block in zip(case.layers, ekfac.spectrum().blocks, strict=True):
            f = kfac.factors[layer.name]
            out["covariance of inputs", layer.name] = f.A
            out[f"K-FAC, {name}", layer.name] = kronecker(layer, f.A, f.S)  # type: ignore[index]
            U = torch.kron(block.basis.u_out, block.basis.u_in)  # type: ignore[union-attr, arg-type]
            corrected = reordered(layer, (U * block.values.flatten()) @ U.mT)
            out[f"EK-FAC, {name}", layer.name] = corrected  # type: ignore[index]
    return out


TOGETHER = (
    "the Hessian's columns of all loss positions go back in one pass, so that S holds products of gradients of "
    "different positions, which the Hessian of the mean loss has not"
)


def columns_together(case: Case) -> Matrices:
    """K-FAC as curvlinops takes exact labels of sequences: column √p_c (e_c − p) at all positions at once."""
    out: Matrices = {}
    for layer in case.layers:
        caught: list[tuple[Tensor, Tensor]] = []
        handle = layer.module.register_forward_hook(lambda m, x, s, caught=caught: caught.append((x[0].detach(), s)))
        A, S = torch.zeros(layer.d_in, layer.d_in), torch.zeros(layer.d_out, layer.d_out)
        for x, _ in case.data:
            p = case.model(x)
            a, s = caught.pop()
            probabilities = p.detach().softmax(-1)
            for c, unit in enumerate(torch.eye(case.classes)):
                v = probabilities[..., c, None].sqrt() * (unit - probabilities)
                (g,) = torch.autograd.grad(p, s, v, retain_graph=True)
                S += g.flatten(0, 1).mT @ g.flatten(0, 1)
            one = F.pad(a, (0, 1), value=1.0) if case.bias else a
            A += one.flatten(0, 1).mT @ one.flatten(0, 1)
        handle.remove()
        terms = case.targets.numel()
        out["K-FAC, exact labels", layer.name] = kronecker(layer, A / terms, S / terms)
    return out


def compare(case: Case, peer: str, ours: Matrices, theirs: Matrices) -> Iterator[Row]:
    """A row for each matrix that both have: the scale between them, its name, and what remains once it is taken out.

    Where ours in its own convention is no multiple of theirs, ours in the peer's convention is tried, and named.
    """
    other = columns_together(case) if case.sequences and peer == "curvlinops" else {}
    for (quantity, layer), matrix in theirs.items():
        row = _row(ours[quantity, layer], matrix, case.counts(layer))
        if not row["agrees"] and (quantity, layer) in other:
            row = _row(other[quantity, layer], matrix, case.counts(layer)) | {"convention": TOGETHER}
        what = {"model": case.name, "quantity": quantity, "layer": layer or "all", "size": len(matrix), "peer": peer}
        yield what | {"convention": ""} | row


def _row(ours: Tensor, theirs: Tensor, counts: dict[str, float]) -> Row:
    ratio = float((theirs * ours).sum() / ours.square().sum())
    residual = float((theirs / ratio - ours).abs().max() / ours.abs().max())
    scale = explain(ratio, counts, rtol=TOLERANCE) if ratio > 0 else None
    agrees = scale is not None and residual <= TOLERANCE
    return {"ratio": ratio, "scale": scale, "residual": residual, "tolerance": TOLERANCE, "agrees": agrees}


def run(config: Config) -> list[Row]:
    """All rows."""
    seeds = range(config.seed, config.seed + (3 if config.preset == "default" else 1))
    rows = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for seed in progress(seeds, "seeds"):
            for case in cases(seed, config.preset == "default"):
                ours = by_curvlab(case)
                for name in installed():
                    found = compare(case, name, ours, PEERS[name][1](case))
                    rows += [row | {"seed": seed} for row in found]
    finally:
        torch.set_default_dtype(before)
    return rows


def show(rows: list[Row]) -> pd.DataFrame:
    """One line a model, quantity, peer and scale: the worst residual over its layers and seeds."""
    table = pd.DataFrame(rows).fillna({"scale": "unexplained"})
    table["scale"] = [
        scale + (f"; {convention}" if convention else "")
        for scale, convention in zip(table["scale"], table["convention"], strict=True)
    ]
    keys = ["model", "quantity", "peer", "scale"]
    grouped = table.groupby(keys, sort=False).agg(
        layers=("layer", lambda names: ", ".join(dict.fromkeys(name.removeprefix("model.model.") for name in names))),
        residual=("residual", "max"),
        tolerance=("tolerance", "first"),
        agrees=("agrees", "all"),
    )
    out = grouped.reset_index()[["model", "quantity", "layers", "peer", "scale", "residual", "tolerance", "agrees"]]
    for name in ("residual", "tolerance"):
        out[name] = [f"{value:.1e}" for value in out[name]]
    out["agrees"] = ["yes" if value else "NO" for value in out["agrees"]]
    return out


def as_json(about: Row, rows: list[Row]) -> str:
    """{"about": …, "rows": […]}, one row a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f'{{"about": {json.dumps(about, ensure_ascii=False)},\n"rows": [\n{lines}\n]}}'


def main(config: Config) -> int:
    missing = [name for name in PEERS if name not in installed()]
    for name in missing:
        print(f"{name} is not installed: its rows are left out (pip install 'curvlab[peers]')")
    if not installed():
        print("no peer is installed: nothing to compare")
        return 1
    rows = run(config)
    versions = {name: importlib.metadata.version(PEERS[name][0]) for name in installed()}
    about = provenance(__file__) | versions | {"preset": config.preset, "dtype": "float64"}
    table = show(rows)
    with pd.option_context("display.width", 250, "display.max_colwidth", 90, "display.max_rows", None):
        print(table.to_string(index=False))
    text = [
        "scale = theirs / ours; residual = max |theirs / scale − ours| / max |ours|. Not compared: ",
        "; ".join(NOT_COMPARED) + ".", "", ", ".join(f"{key} {value}" for key, value in about.items()), "",
        markdown(table),
    ]  # fmt: skip
    for name, content in (
        ("peers.json", as_json(about, rows)),
        ("peers.md", "\n".join(text)),
    ):
        with replacing(config.out / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
    wrong = [row for row in rows if not row["agrees"]]
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} comparisons agree; {config.out / 'peers.json'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
