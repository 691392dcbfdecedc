"""What shapes and names tell together: the layer of nameless tensors, sides exchanged, sides that stay open."""

from collections.abc import Mapping
from dataclasses import replace

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.parts import Part, Role
from curvlab.crosscheck.sides import resolve
from curvlab.layers import LayerShape

CHECKPOINT: set[Role] = {"base", "edited"}


def said_of_sides(part: Part, layers: Mapping[str, LayerShape] | None) -> Part:
    """Where a square layer leaves nothing but the keys to tell the sides."""
    sided = [role for role in ("A", "S", "U_in", "U_out") if role in part.items]
    told = layers is not None and part.layer in layers
    if part.shape is None or part.shape[0] != part.shape[1] or not sided:
        return part
    cause = "the layer is square: which side is the input's is taken from the keys, shapes cannot tell"
    remedy = "" if told else "give a model and data to have it tested"
    finding = Finding("sides", "convention", part.subject(*sided), "by key", None, cause, remedy)
    return replace(part, assumed=(*part.assumed, finding))


NARROWING, WIDENING = ("down_proj", "fc2", "wo", "dense_4h_to_h"), ("up_proj", "gate_proj", "c_fc", "fc1")


def hinted(part: Part, layers: Mapping[str, LayerShape] | None) -> Part:
    """A hint where a layer's name says which side is the wider, and the sides are the other way round."""
    last = part.layer.rsplit(".", 1)[-1]
    sided = [role for role in ("A", "S", "U_in", "U_out") if role in part.items]
    if (layers and part.layer in layers) or part.shape is None or not sided:
        return part
    d_out, d_in = part.shape
    narrowing = last in NARROWING or part.layer.endswith("mlp.c_proj")
    exchanged = d_in < d_out if narrowing else last in WIDENING and d_in > d_out
    if not exchanged:
        return part
    cause = (
        f"the input side has {d_in} and the output side {d_out} dimensions, though layers called {last!r} mostly "
        f"{'narrow' if narrowing else 'widen'}: A and B may be exchanged throughout"
    )
    finding = Finding(
        "sides", "convention", part.subject(*sided), f"{d_out} x {d_in}", f"{d_in} x {d_out}", cause, "give the model"
    )
    return replace(part, assumed=(*part.assumed, finding))


def named_by_shape(part: Part, layers: Mapping[str, LayerShape] | None) -> Part:
    """A part whose name the model does not know takes the name of the only layer with its shape."""
    if not layers or part.layer in layers or part.shape is None or (part.layer and set(part.items) <= CHECKPOINT):
        return part
    d_out, d_in = part.shape
    fits = [n for n, own in layers.items() if own.d_out == d_out and d_in - own.d_in in (0, 1)]
    swaps = [n for n, own in layers.items() if own.d_in == d_out and own.d_out == d_in and d_out != d_in]
    if len(fits or swaps) != 1:
        cause = f"no layer of the model is called {part.layer!r}, and {len(fits)} have W of {d_out} x {d_in}"
        finding = Finding("layer", "convention", part.subject(*part.items), part.layer, None, cause, "name the layer")
        return replace(part, assumed=(*part.assumed, finding))
    name = (fits or swaps)[0]
    cause = f"no name tells the layer; {name} is the only one of the model with such a shape"
    finding = Finding("layer", "convention", part.subject(*part.items), name, None, cause)
    part = resolve(replace(part, layer=name, shape=None), layers[name])
    return replace(part, assumed=(*part.assumed, finding))
