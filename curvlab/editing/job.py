"""One call for every editor: `edit(model, tokenizer, requests, editor="crispedit", …) -> EditedModel`.

An editor is a function (job, options) in a file of its own in `curvlab/editing/methods/`, made known by `@editor`.
"""

import dataclasses
import difflib
import importlib
import json
import os
import pkgutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvlab.batches import context_length
from curvlab.data.edits import Request, check_requests
from curvlab.editing.capability import Capability
from curvlab.editing.precision import widened
from curvlab.editing.training import Curve, Training, descend
from curvlab.layers import Matrices, MatrixLayer, device_of, find_layers
from curvlab.memory import peak
from curvlab.storage import replacing

Run = Callable[["Job", Any], None]
R = TypeVar("R", bound=Run)


@dataclass(frozen=True)
class Editor:
    """A known editor: its function, the class of its options, and those that its name presets."""

    name: str
    run: Run
    options: type[Any]
    presets: dict[str, Any]

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.run.__doc__ or "").strip().split("\n")[0]


_EDITORS: dict[str, Editor] = {}


def editor(name: str, options: type[Any], **presets: Any) -> Callable[[R], R]:
    """Make a function (job, options) known as the editor `name`; `presets` are its defaults of some options."""

    def register(run: R) -> R:
        _EDITORS[name] = Editor(name, run, options, presets)
        return run

    return register


def editors() -> dict[str, Editor]:
    """All editors by name: every file in `curvlab/editing/methods/`."""
    from curvlab.editing import methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    return dict(sorted(_EDITORS.items()))


@dataclass
class Job:
    """What an editor works on.

    Attributes:
        model, tokenizer: the model is edited in place.
        requests: what is to be learnt.
        layers: names of the edited layers.
        capability: the capability set; None where none was given.
        seed: of every draw the editor makes.
        curves: how its trainings went, in order.
        counts: what else is worth recording, such as the number of refits.
        curvature_seconds: time spent on curvature that a later edit would find kept.
        originals: what the parameters that are edited held before.
    """

    model: Any
    tokenizer: Any
    requests: list[Request]
    layers: list[str]
    capability: Capability | None
    seed: int
    desc: str
    curves: list[Curve] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    curvature_seconds: float = 0.0
    originals: dict[str, Tensor] = field(default_factory=dict)
    _training: ExitStack = field(default_factory=ExitStack)
    _widened: set[str] = field(default_factory=set)

    def needs_capability(self) -> Capability:
        """The capability set, for an editor that cannot do without."""
        if self.capability is None:
            raise ValueError(f"{self.desc} needs a capability set: edit(…, capability=documents)")
        return self.capability

    def matrix_layers(self, names: Sequence[str] | None = None) -> list[MatrixLayer]:
        """The layers that are about to be edited; what they hold now is remembered for `undo`.

        Raises:
            ValueError: weights that cannot be trained in place: offloaded by accelerate, or quantised.
        """
        chosen = find_layers(self.model, self.layers if names is None else list(names))
        for layer in chosen:
            for name, parameter in zip(layer.parameter_names, layer.parameters(), strict=True):
                if parameter.is_meta:
                    raise ValueError(f"{name} is offloaded: keep the edited layers on a device (device_map)")
                if not parameter.is_floating_point():
                    raise ValueError(f"{name} is quantised ({parameter.dtype}): load the model in bfloat16 or float32")
        for layer in chosen:
            for name, parameter in zip(layer.parameter_names, layer.parameters(), strict=True):
                if name not in self.originals:
                    self.originals[name] = parameter.detach().clone()
        return chosen

    def parameters(self, names: Sequence[str] | None = None) -> list[nn.Parameter]:
        """Their parameters, asking for gradients and in float32 or better (`widened`); no other of the model does."""
        layers = self.matrix_layers(names)
        for layer in layers:
            if layer.name not in self._widened:
                self._widened.add(layer.name)
                self._training.enter_context(widened(layer))
        chosen = [p for layer in layers for p in layer.parameters()]
        self.model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def finish(self) -> None:
        """Edited weights in the model's dtype again, without gradients."""
        self._training.close()
        self._widened.clear()
        for name in self.originals:
            self.model.get_parameter(name).grad = None

    def train(self, optimizer: torch.optim.Optimizer, options: Training, **how: Any) -> Curve:
        """`descend` on the job's requests (or `requests=`), its curve kept."""
        given: dict[str, Any] = {"requests": self.requests, "layers": self.layers, "seed": self.seed} | how
        given.setdefault("desc", self.desc)
        curve = descend(self.model, self.tokenizer, optimizer=optimizer, options=options, **given)
        self.curves.append(curve)
        return curve

    def timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(…), its time counted as curvature that can be kept."""
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.curvature_seconds += time.perf_counter() - start
        return result


@dataclass(frozen=True)
class EditedModel:
    """An edited model and how it came about.

    Attributes:
        model, tokenizer: the model, edited in place; all but its weights is as it was (training mode, flags).
        editor, options: what edited it; options["layers"] are the layers that were edited.
        losses: mean edit loss of each epoch, of all trainings one after another (nats a target token).
        stopped: why the last training ended ("loss", "epochs"; "" where nothing was trained).
        seconds: wall time of the edit without the curvature that can be kept.
        curvature_seconds: wall time of that curvature (0 where it was found kept).
        peak_bytes: largest resident size of this process; on a GPU, the largest allocation during the edit.
        drift: relative Frobenius change ‖W − W0‖ / ‖W0‖, the largest over the edited layers.
        counts: more numbers from the editor, such as refits.
        originals: what the edited parameters held before.
    """

    model: Any
    tokenizer: Any
    editor: str
    options: dict[str, Any]
    losses: list[float]
    stopped: str
    seconds: float
    curvature_seconds: float
    peak_bytes: int
    drift: float
    counts: dict[str, float]
    originals: dict[str, Tensor] = field(repr=False)

    def displacement(self) -> Matrices:
        """θ − θ0 of each edited parameter, by name, in the parameter's own layout, in float32 or better."""
        return _displacement(self.model, self.originals)

    def undo(self) -> Any:
        """Put the original weights back, bit for bit; returns the model."""
        _put_back(self.model, self.originals)
        return self.model

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer by `save_pretrained`, and curvlab_edit.json, which says how they came about.

        Everything is written beside `folder` first and then moved into it, file by file; weights that another model
        left there are removed.

        Raises:
            ValueError: the edit was undone.
        """
        if self.drift > 0 and not any(bool(moved.any()) for moved in self.displacement().values()):
            raise ValueError("the edit was undone: there is no edited model to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            written = sorted(Path(temporary).iterdir())
            for file in written:
                os.replace(file, folder / file.name)
        for stale in set(folder.glob("model*.safetensors*")) - {folder / file.name for file in written}:
            stale.unlink()
        record = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("model", "tokenizer", "originals")
        }
        with replacing(folder / "curvlab_edit.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1, default=str))


def edit(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    editor: str = "crispedit",
    layers: str | Sequence[str] | None = None,
    capability: Capability | Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> EditedModel:
    """Edit a causal language model in place.

    Args:
        model, tokenizer: a transformers causal LM and its fast tokenizer.
        requests: what it is to say (`curvlab.data.edits`).
        editor: one of `editors()`.
        layers: names or patterns of the edited layers (`find_layers`); None takes `default_layers`.
        capability: documents whose predictions are to stay, or a `Capability`, which keeps its curvature.
        seed: of every random draw.
        options: of the editor; `editors()[name].options` says which there are.

    Raises:
        ValueError: an unknown editor or option, options that make no sense, requests that cannot be encoded, are
            empty, duplicate or contradictory, or documents longer than the model takes: before anything is changed.
        FloatingPointError: a loss that is not finite; the model is then as it was.
    """
    known = editors()
    if editor not in known:
        near = difflib.get_close_matches(editor, known, n=3) or sorted(known)
        raise ValueError(f"no editor {editor!r}; did you mean one of {near}?")
    chosen = known[editor]
    names = {f.name for f in dataclasses.fields(chosen.options)}
    unknown = sorted(set(options) - names)
    if unknown:
        raise ValueError(f"{editor} has no option {unknown}; it has {sorted(names)}")
    settings = chosen.options(**(chosen.presets | options))
    check_requests(requests, tokenizer, max_length=longest(model))
    if isinstance(settings, Training):
        settings.check(tokenizer, requests, longest(model))
    choose = getattr(settings, "default_layers", default_layers)
    targets = [layer.name for layer in find_layers(model, layers if layers is not None else choose(model))]
    room = context_length(model)
    if isinstance(capability, Capability):
        capability.check(tokenizer, room)
    elif capability is not None:
        capability = Capability(capability, max_length=min(512, room or 512), seed=seed)
    job = Job(model, tokenizer, list(requests), targets, capability, seed, editor)
    device = device_of(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    start = time.perf_counter()
    try:
        model.eval()
        try:
            with torch.enable_grad():
                chosen.run(job, settings)
        finally:
            job.finish()
        _require_finite(model, job.originals)
    except BaseException:
        _put_back(model, job.originals)
        raise
    finally:
        for name, parameter in model.named_parameters():  # anew: weights that accelerate offloads are exchanged
            parameter.requires_grad_(flags.get(name, parameter.requires_grad))
        for module, mode in modes:
            module.training = mode
    seconds = time.perf_counter() - start
    shown = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    return EditedModel(
        model,
        tokenizer,
        editor,
        {"layers": [name.removesuffix(".weight") for name in job.originals], "seed": seed} | shown,
        [loss for curve in job.curves for loss in curve.losses],
        job.curves[-1].stopped if job.curves else "",
        seconds - job.curvature_seconds,
        job.curvature_seconds,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak(),
        _drift(model, job.originals),
        {"epochs": sum(len(c.losses) for c in job.curves), "skipped": sum(sum(c.skipped) for c in job.curves)}
        | job.counts,
        job.originals,
    )


OUTPUT_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "fc2")


def output_projections(model: nn.Module) -> list[str]:
    """The names of the MLP output projections, from the lowest block up.

    Raises:
        ValueError: a model whose MLPs have none of `OUTPUT_PROJECTIONS`.
    """
    decoder = getattr(model, "get_decoder", lambda: None)() or model
    inside = set(decoder.modules())  # a tower for images has MLPs, too
    ends = tuple(f".{end}" for end in OUTPUT_PROJECTIONS)
    names = [name for name, module in model.named_modules() if module in inside and name.endswith(ends)]
    if not names:
        raise ValueError(f"none of {', '.join(OUTPUT_PROJECTIONS)} was found; name the layers to edit: layers=[…]")
    return names


def default_layers(model: nn.Module) -> list[str]:
    """The MLP output projections of the blocks at 59 to 73 % of the depth, as the paper's 19–23 of Llama-3's 32.

    Raises:
        ValueError: a model whose MLPs have none of `OUTPUT_PROJECTIONS`.
    """
    names = output_projections(model)
    depth = len(names)
    first, last = round(19 / 32 * depth), round(24 / 32 * depth)
    return names[min(first, depth - 1) : max(last, first + 1)]


def longest(model: Any) -> int:
    """Tokens that the model can take; where it sets no limit, 512."""
    return context_length(model) or 512


def _put_back(model: nn.Module, originals: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in originals.items():
            model.get_parameter(name).copy_(value)


def _displacement(model: nn.Module, originals: dict[str, Tensor]) -> Matrices:
    found = {}
    for name, value in originals.items():
        wide = torch.promote_types(value.dtype, torch.float32)
        found[name] = model.get_parameter(name).detach().to(wide) - value.to(wide)
    return found


def _require_finite(model: nn.Module, originals: dict[str, Tensor]) -> None:
    for name in originals:
        if not bool(model.get_parameter(name).isfinite().all()):
            raise FloatingPointError(f"{name} is not finite after the edit; try a smaller lr")


def _drift(model: nn.Module, originals: dict[str, Tensor]) -> float:
    moved = _displacement(model, originals)
    changes = [float(moved[name].norm() / value.float().norm().clamp_min(1e-30)) for name, value in originals.items()]
    return max(changes, default=0.0)
