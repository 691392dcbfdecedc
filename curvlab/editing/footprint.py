"""What editing a model takes, in bytes: known from its configuration, before its weights are read.

Activations are counted, not guessed: the model runs on the meta device, and what autograd would keep is added up.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlab.batches import examples_at_once, output_width
from curvlab.capture import output_bytes
from curvlab.editing.job import Editor, default_layers, editors
from curvlab.editing.methods.alphaedit import AlphaEdit
from curvlab.editing.methods.crispedit import Constrained
from curvlab.editing.methods.ewc import EWC
from curvlab.editing.methods.lora import LoRA, adapted
from curvlab.editing.prefix import blocks_below
from curvlab.editing.training import Sequential, Training
from curvlab.editing.values import Locating
from curvlab.layers import LayerShape, find_layers
from curvlab.memory import announce, available, human
from curvlab.models.skeleton import skeleton

Parts = dict[str, int]  # bytes by what they hold

CHEAPER = {
    "weights": "a smaller model, bfloat16 weights, or another device",
    "curvature": "fewer or narrower layers, or one editor (one curvature) at a time",
    "eigenvectors": "fewer or narrower layers",
    "trained": "fewer or narrower layers",
    "activations": "a smaller batch size, or higher layers only",
    "logits": "a smaller batch size, or shorter texts",
    "hidden": "fewer edits at a time, or cache_prefix=False and cache_rotated=False",
}


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        editors: names, run one after another on one model; curvature that is kept for later edits adds up.
        n_edits, batch_size: requests in all and a step.
        request_tokens: of the longest request in its template.
        documents, document_tokens: of a batch of the capability set.
        project: of the constrained editors; None takes each one's own.
    """

    editors: Sequence[str]
    n_edits: int
    batch_size: int = 32
    request_tokens: int = 64
    documents: int = 8
    document_tokens: int = 512
    project: str | None = None


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of each stage, by what they hold (`CHEAPER`).

    Attributes:
        stages: what will surely come.
        refits: what comes where an edited layer drifts far enough; the fit itself refuses what cannot fit then.
    """

    stages: dict[str, Parts]
    refits: dict[str, Parts]

    @property
    def largest(self) -> str:
        """The stage that takes most."""
        return max(self.stages, key=lambda name: sum(self.stages[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.stages[self.largest].values())

    def require(self, device: torch.device | str) -> None:
        """Refuse what cannot fit.

        Raises:
            MemoryError: the largest stage exceeds what `device` has left, or the weights what the host has, through
                which they go; the message names what takes most and a cheaper way.
        """
        parts = self.stages[self.largest]
        by_size = sorted((name for name in parts if parts[name]), key=lambda name: -parts[name])
        listed = ", ".join(f"{name} {human(parts[name])}" for name in by_size)
        announce(f"editing ({self.largest}: {listed})", self.peak, CHEAPER[by_size[0]], device)
        if torch.device(device).type != "cpu":
            announce("reading the weights", parts["weights"], "a host with more memory", "cpu")

    def __str__(self) -> str:
        lines = []
        for name, parts in (self.stages | self.refits).items():
            listed = ", ".join(f"{kind} {human(parts[kind])}" for kind in CHEAPER if parts.get(kind))
            lines.append(f"  {name}: {human(sum(parts.values()))} ({listed})")
        return "\n".join(lines)


def announced(
    name_or_path: str, layers: str | Sequence[str] | None, plan: Plan, device: torch.device | str = "cpu"
) -> str:
    """What a study prints before it loads a model.

    Raises:
        FileNotFoundError, ValueError: no such model, layer or editor.
        MemoryError: as `Footprint.require`.
    """
    found = footprint(skeleton(name_or_path), layers, plan)
    free = human(available(device))
    text = f"estimated memory, at most {human(found.peak)} of {free} free on {device} ({found.largest}):\n{found}"
    found.require(device)
    return text


def footprint(model: nn.Module, layers: str | Sequence[str] | None, plan: Plan) -> Footprint:
    """The stages of `plan` for a model, which may lie on the meta device and is run there (`skeleton`).

    Factors are fitted and decomposed, edits made, and all is evaluated.

    Raises:
        ValueError: an unknown editor or layer.
    """
    known = editors()
    unknown = sorted(set(plan.editors) - set(known))
    if unknown:
        raise ValueError(f"unknown editors {unknown}; choose from {', '.join(known)}")
    chosen = [known[name] for name in plan.editors]
    names = [layer.name for layer in find_layers(model, layers if layers is not None else default_layers(model))]
    own = _Bytes(model, names, plan)
    weights = {"weights": sum(p.numel() * p.itemsize for p in model.parameters())}
    kept = {"curvature": sum(own.of(item) for item in dict.fromkeys(item for e in chosen for item in kept_by(e)))}
    always = weights | kept
    stages: dict[str, Parts] = {}
    if kept["curvature"]:
        stages["factors"] = always | own.factors()
        stages["eigenvectors"] = always | {"eigenvectors": own.decomposition}
    refits: dict[str, Parts] = {}
    for editor in chosen:
        stages |= {name: _added(always, parts) for name, parts in own.edits(editor).items()}
        if issubclass(editor.options, Constrained) and _option(editor, "drift") is not None:
            again = own.refit(_option(editor, "curvature"))
            resting = stages[editor.name] | {"activations": 0, "logits": 0}
            refits[f"{editor.name}, should a layer drift"] = _added(resting, again)
    stages["evaluation"] = always | own.evaluation()
    return Footprint(stages, refits)


def kept_by(editor: Editor) -> list[str]:
    """Which curvature of the capability set an editor leaves for those after it."""
    if issubclass(editor.options, AlphaEdit):
        return ["covariance statistics", "covariance spectrum"]
    if issubclass(editor.options, Locating):
        return ["covariance statistics"]
    if issubclass(editor.options, EWC):
        return ["diagonal"]
    curvature = _option(editor, "curvature")
    if curvature is None:
        return []
    if issubclass(editor.options, Sequential):
        return [f"{curvature} statistics"]
    return [f"{_first(curvature)} statistics", f"{curvature} spectrum"]


def _first(curvature: str) -> str:
    """Whose statistics a curvature needs: EK-FAC takes K-FAC's."""
    return "kfac" if curvature == "ekfac" else curvature


class _Bytes:
    """Bytes for a model's edited layers."""

    def __init__(self, model: Any, names: list[str], plan: Plan) -> None:
        self.model, self.names, self.plan = model, names, plan
        layers: list[LayerShape] = list(find_layers(model, names))
        dtype = next(model.parameters()).dtype
        self.dtype, self.narrow = dtype, dtype.itemsize
        self.wide = torch.promote_types(dtype, torch.float32).itemsize
        self.vocabulary = output_width(model) or 0
        self.inputs = sum(layer.d_in**2 for layer in layers)
        self.squares = self.inputs + sum(layer.d_out**2 for layer in layers)
        self.products = sum(layer.size for layer in layers)
        self.largest = max(max(layer.d_in, layer.d_out) for layer in layers) ** 2
        self.widest = max(layer.d_in for layer in layers)

    def of(self, item: str) -> int:
        """Of one of `kept_by`."""
        curvature, _, what = item.partition(" ")
        sides = self.inputs if curvature == "covariance" else self.squares
        if what == "statistics":
            return self.wide * sides
        if curvature == "diagonal":
            return self.wide * self.products
        # eigenvectors in float64; eigenvalues and their magnitudes (covariance: those of d_in, repeated in a view)
        return 8 * sides + (8 if curvature == "covariance" else 16) * self.products

    @property
    def decomposition(self) -> int:
        """Beside the result, of one factor: its symmetrised copy and LAPACK's copy and workspace, in float64."""
        return 32 * self.largest + self.wide * self.largest

    def factors(self) -> Parts:
        shape = (min(self.plan.documents, self._at_once), self.plan.document_tokens)
        return {
            "activations": saved_for_backward(self.model, self.names, shape, loss=False),
            "logits": output_bytes(shape, self.vocabulary, self.dtype),
        }

    @property
    def _at_once(self) -> int:
        return examples_at_once(self.plan.document_tokens, self.vocabulary or None)

    def edits(self, editor: Editor) -> dict[str, Parts]:
        """The stages of one editor beside weights and kept curvature."""
        name, options = editor.name, editor.options
        if issubclass(options, Locating):
            return {name: self._located(editor)}
        if not issubclass(options, Training):
            return {} if name == "none" else {name: self._step(self.names, self.plan.batch_size)}
        if issubclass(options, LoRA):
            layers = [layer for layer in find_layers(self.model, adapted(self.model))]
            step = self._step([layer.name for layer in layers], self.plan.batch_size)
            return {name: step | {"trained": self.narrow * sum(layer.size for layer in layers)}}
        parts = self._step(self.names, self.plan.batch_size)
        # before; in float32, rounded in each pass; gradient and Adam's two moments; what they are compared with
        parts["trained"] = (2 * self.narrow + 7 * self.wide) * self.products
        parts["hidden"] = self._hidden()
        if not issubclass(options, Constrained):
            if _option(editor, "curvature") is not None:
                parts["trained"] += (self.wide + 24) * self.products + self.wide * self.squares  # the penalty
            return {name: parts}
        bound = _option(editor, "constraint") == "ellipsoid"
        # the constraint in the weights' dtype and restricted to what it uses; an ellipsoid's multiplier in float64
        parts["trained"] += 2 * self.wide * self.squares + (self.wide + 2 + (64 if bound else 0)) * self.products
        if self.plan.project == "eigenbasis":
            parts["trained"] += 4 * self.wide * self.products
            parts["hidden"] += self._texts * self.widest * self.narrow
        if not issubclass(options, Sequential):
            return {name: parts}
        # the merged statistics, the earlier rounds' and the sum of both, and the spectrum of the merged ones
        curvature = str(_option(editor, "curvature"))
        parts["curvature"] = 3 * self.of(f"{curvature} statistics") + self.of(f"{curvature} spectrum")
        resting = parts | {"activations": 0, "logits": 0, "eigenvectors": self.decomposition}
        return {name: parts, f"{name}, between rounds": resting}

    def refit(self, curvature: str) -> Parts:
        """Statistics and spectrum anew, while the first ones are kept."""
        again = self.of(f"{_first(curvature)} statistics") + self.of(f"{curvature} spectrum")
        return {"curvature": again, "eigenvectors": self.decomposition}

    def evaluation(self) -> Parts:
        """Logits of the documents whose likelihood is measured, and their float32 copies one by one."""
        tokens = self.plan.document_tokens
        return {"logits": (self.narrow * self.plan.documents + 2 * self.wide) * tokens * self.vocabulary}

    def _step(self, names: Sequence[str], texts: int, tokens: int = 0) -> Parts:
        shape = (texts, tokens or self.plan.request_tokens)
        # beside what the graph keeps: logits, their wider copy and gradients
        spread = (self.narrow + 3 * self.wide) * shape[0] * shape[1] * self.vocabulary
        return {"activations": saved_for_backward(self.model, names, shape, loss=True), "logits": spread}

    def _located(self, editor: Editor) -> Parts:
        """Values of a batch behind all prefixes; then least squares in float64, a layer at a time."""
        settings = editor.options(**editor.presets)
        contexts, longer = 1 + settings.prefixes, settings.prefix_length if settings.prefixes else 0
        parts = self._step(self.names, contexts * self.plan.batch_size, self.plan.request_tokens + longer)
        projectors = 2 if issubclass(editor.options, AlphaEdit) else 0
        parts["trained"] = (self.narrow + self.wide) * self.products + 8 * projectors * self.inputs
        parts["eigenvectors"] = 40 * self.widest**2 + 24 * self.products // len(self.names)
        return parts

    @property
    def _texts(self) -> int:
        return self.plan.n_edits * self.plan.request_tokens

    def _hidden(self) -> int:
        """Hidden states below the lowest edited block."""
        if not blocks_below(self.model, self.names):
            return 0
        return self._texts * int(self.model.get_input_embeddings().weight.shape[1]) * self.narrow


def saved_for_backward(model: Any, names: Iterable[str], shape: tuple[int, int], *, loss: bool) -> int:
    """Bytes that autograd keeps of a forward pass over (N, T) tokens with the named layers' weights in training.

    The model lies on the meta device and its attention is the plain one, whose maps (T, T) others never form: they are
    left out. 0 where a model cannot run there.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, Any] = {}

    def remember(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights and t.shape[-2:] != (shape[1], shape[1]):
            seen[storage._cdata] = storage  # alive, so that no other takes its place
        return t

    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    trained = [p for layer in find_layers(model, list(names)) for p in layer.parameters()]
    try:
        for p in trained:
            p.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            if loss:
                F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    except (RuntimeError, NotImplementedError):  # an operation that asks for a number
        return 0
    finally:
        for p in trained:
            p.requires_grad_(False)
    return sum(storage.nbytes() for storage in seen.values())


def _option(editor: Editor, name: str) -> Any:
    """What an editor's option is by default; None where it has none of that name."""
    defaults = {field.name: field.default for field in dataclasses.fields(editor.options)}
    return editor.presets.get(name, defaults.get(name))


def _added(first: Parts, second: Parts) -> Parts:
    return {kind: first.get(kind, 0) + second.get(kind, 0) for kind in first | second}
