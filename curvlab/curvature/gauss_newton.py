"""The exact Gauss–Newton matrix G = 1/M Σ Jᵀ H_ŷ J (paper, section 2), and Fishers with other labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Data, Pass, columns, count_examples, passes, require_reiterable
from curvlab.curvature.exact import ExactCurvature
from curvlab.curvature.products import AutogradProduct, FullRows, OuterRows, RowGram, Rows, concatenate
from curvlab.layers import MatrixLayer, find_layers
from curvlab.losses import Labels, as_loss
from curvlab.memory import announce, bytes_of


class GaussNewton(ExactCurvature):
    """The GGN of the mean loss over chosen layers jointly."""

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loss: Any,
        data: Data,
        layers: str | Sequence[str],
        *,
        bias: bool = False,
        labels: Labels = "exact",
        draws: int = 1,
        seed: int = 0,
        store: bool = True,
        first_example: int = 0,
        micro_batch: int | None = None,
    ) -> "GaussNewton":
        """One pass over `data`.

        Args:
            model, loss, data: see `curvlab.capture` and `curvlab.losses`.
            layers: names or patterns (`find_layers`); several are treated jointly.
            bias: join each layer's bias to its W.
            labels: "exact" is the GGN; "model" a Monte-Carlo Fisher (its expectation); "data" the empirical Fisher.
            draws, seed: of `labels="model"`.
            store: keep gradient rows (fast products; C·N rows). False: recompute them by autograd in each product, at
                the model's weights at that time: leave the model as it is meanwhile.
        """
        loss = as_loss(loss)
        chosen = find_layers(model, layers, bias)
        if not store and labels != "exact":
            raise ValueError("store=False gives the exact GGN; labels must be 'exact'")
        if not store:
            require_reiterable(data)
        collected: dict[str, list[Rows]] = {layer.name: [] for layer in chosen}
        examples, terms, trace = count_examples(data), 0, 0.0
        for pass_ in passes(
            model,
            loss,
            data,
            chosen,
            desc="Gauss–Newton rows",
            first_example=first_example,
            micro_batch=micro_batch,
        ):
            vectors = list(columns(pass_, loss, labels, draws, seed))
            if terms == 0 and store:
                _announce_rows(pass_, len(vectors), examples)
            terms += pass_.terms
            for name, rows in gradient_rows(pass_, vectors).items():
                if store:
                    collected[name].append(rows)
                else:
                    trace += rows.squared_norm()
        if not store:
            product = AutogradProduct(model, loss, data, chosen, False, micro_batch=micro_batch, known_trace=trace)
            return cls(chosen, product, terms, semidefinite=True)
        return cls(chosen, RowGram([concatenate(parts) for parts in collected.values()]), terms, semidefinite=True)


def gradient_rows(pass_: Pass, vectors: Sequence[Tensor]) -> dict[str, Rows]:
    """The per-example gradients of ⟨v_k, ŷ⟩ for each v_k (N, T, C), by layer."""
    gradients: dict[str, list[Tensor]] = {layer.name: [] for layer in pass_.layers}
    for by_layer in pass_.gradients(vectors):
        for name, g in by_layer.items():
            gradients[name].append(g)
    return {layer.name: _rows(layer, pass_.inputs(layer), gradients[layer.name]) for layer in pass_.layers}


def _rows(layer: MatrixLayer, a: Tensor, gradients: list[Tensor]) -> Rows:
    if a.shape[1] == 1:
        return OuterRows(layer.shape, a[:, 0], torch.cat(gradients, dim=1))
    g = torch.cat([g.mT for g in gradients], dim=1)  # (N, K·d_out, T)
    return FullRows(layer.shape, (g @ a).unflatten(1, (len(gradients), layer.d_out)).flatten(2))


def _announce_rows(pass_: Pass, K: int, examples: int | None) -> None:
    if examples is None:
        return
    numbers = 0
    for layer in pass_.layers:
        once = layer.inputs(pass_.raw_inputs[layer.name][:1]).shape[1] == 1
        numbers += layer.d_in + K * layer.d_out if once else K * layer.size
    announce(
        f"gradient rows of {examples:,} examples",
        bytes_of(examples, numbers, dtype=pass_.outputs.dtype),
        "store=False recomputes them in every product; fewer examples; labels='model'",
        pass_.outputs.device,
    )
