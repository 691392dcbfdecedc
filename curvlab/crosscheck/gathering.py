"""One pass over the data that gathers what every convention of a factor is made of.

A convention says which positions count, how each is weighted, whether products are taken a position, an example or a
batch, and at which labels. Positions are sorted into classes by four flags; sums over positions are kept a class, so
that every choice of positions is a sum of them. Padding is hidden from `curvlab.capture`, which would remove it, and
batches run exactly as they are given (left padding stays left).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from curvlab.batches import as_batch
from curvlab.capture import Pass, columns, passes
from curvlab.crosscheck.adding import Adder
from curvlab.crosscheck.layout import AsGiven, Layout, hidden
from curvlab.crosscheck.moments import LayerMoments
from curvlab.layers import find_layers
from curvlab.losses import Loss, as_loss

MAX_EXACT = 64  # backward passes a batch for exact labels: classes × loss positions


def gather(
    model: nn.Module,
    loss: Any,
    data: Sequence[Any],
    layers: str | Sequence[str],
    *,
    bases: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
    draws: int = 4,
    exact: bool = True,
    thorough: bool = True,
) -> dict[str, LayerMoments]:
    """The moments of `layers`, by name, from one pass over `data`.

    Args:
        model, loss, data: see `curvlab.capture`; batches as the production run made them.
        bases: (U_out, U_in) by layer, eigenvectors in columns, for EK-FAC's sums of squares in them; U_in may have
            one more row for a joint bias.
        seed: draw k of the model's labels has the seed `seed` + k.
        draws: of the model's labels.
        exact: exact labels too, where they take at most `MAX_EXACT` backward passes a batch.
        thorough: False gathers sums over positions alone, at the data's labels and one draw: enough to tell layers
            from one another.

    Raises:
        ValueError: what `curvlab.capture.passes` and `find_layers` refuse.
    """
    loss = as_loss(loss)
    batches = [as_batch(item) for item in data]
    if not batches:
        raise ValueError("the data are empty: no batch with at least one example")
    layout = Layout.of(batches, loss)
    found = find_layers(model, layers)
    sums: dict[str, Adder] = {}
    desc = "moments of every convention" if thorough else "moments of all layers of this shape"
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for pass_ in passes(AsGiven(model), loss, [hidden(b) for b in batches], found, desc=desc):
            inputs = {layer.name: pass_.inputs(layer) for layer in found}
            for layer in found:
                if layer.name not in sums:
                    basis = (bases or {}).get(layer.name)
                    sums[layer.name] = Adder.of(layer, layout, inputs[layer.name], thorough, basis)
                sums[layer.name].add_inputs(pass_, inputs[layer.name])
            tags: deque[str] = deque()
            vectors = _vectors(pass_, loss, tags, seed, draws if thorough else 1, exact and thorough)
            for by_layer in pass_.gradients(vectors):
                tag = tags.popleft()
                for name, g in by_layer.items():
                    sums[name].add_gradients(tag, pass_, inputs[name], g)
            del pass_
    finally:
        for module in training:
            module.training = True
    for adder in sums.values():
        adder.finish()
    return {name: adder.moments for name, adder in sums.items()}


def _vectors(pass_: Pass, loss: Loss, tags: deque[str], seed: int, draws: int, exact: bool) -> Iterator[Tensor]:
    """The vectors of every kind of labels, each with its name put into `tags`."""
    kinds: list[tuple[str, Any, int]] = [("data", "data", 0)]
    kinds += [(f"model {seed + k}", "model", seed + k) for k in range(draws)]
    if exact and pass_.outputs.shape[1] * pass_.outputs.shape[2] <= MAX_EXACT:
        kinds.append(("exact", "exact", 0))
    for tag, labels, own in kinds:
        for v in columns(pass_, loss, labels, 1, own):
            tags.append(tag)
            yield v
