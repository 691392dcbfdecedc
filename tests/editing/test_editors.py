"""What every editor must do: learn, undo, survive an exception, repeat itself, and leave all else as it was."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
from language import tiny_llama
from requests_and_text import DOCUMENTS, FAMILIES, REQUESTS, TOKENIZER, same, state
from torch import nn

from curvlab.data.edits import Request
from curvlab.data.text import encode_pairs
from curvlab.editing import Capability, Training, default_layers, edit, editor, editors
from curvlab.editing import job as job_module
from curvlab.editing.job import Job
from curvlab.editing.training import target_loss
from curvlab.editing.wording import Wording

# editors that do not train on the requests (UltraEdit, MEND) have their contract in test_gradient_editors.py
TRAINED = [name for name, found in editors().items() if issubclass(found.options, Training)]
MAKE, BOTH = FAMILIES["llama"]
LOCATING: dict[str, dict[str, Any]] = {
    "rome": {}, "memit": {"weight": 1.0}, "alphaedit": {"gamma": 0.5, "l2": 0.1}
}  # fmt: skip


def settings(name: str) -> dict[str, Any]:
    """Options under which a tiny model learns in a few steps."""
    found: dict[str, Any] = {"epochs": 6, "lr": 1e-2, "batch_size": 3}
    if name.endswith("-seq") or "-seq-" in name:
        found["chunk"] = 3
    if "eps" in name:
        found["epsilon"] = 1.0
    if name == "adam-nscl":
        found["ratio"] = 1e4
    if name in ("kfac-penalty", "ewc"):
        found["strength"] = 1e-2
    if name in LOCATING:  # the requests name no subjects
        found |= {"subject": "last-token", "prefixes": 2, "prefix_length": 4, "epochs": 10, "lr": 0.3, "clamp": 4.0}
        found |= LOCATING[name]
    return found


def run(model: Any, name: str, *, seed: int = 0, requests: Any = REQUESTS, **options: Any) -> Any:
    given = {"layers": BOTH, "capability": Capability(DOCUMENTS), "seed": seed} | settings(name) | options
    return edit(model, TOKENIZER, requests, editor=name, **given)


def loss_of(model: nn.Module) -> float:
    (batch,) = encode_pairs(TOKENIZER, [(r.prompt, r.target) for r in REQUESTS])
    return float(target_loss(model, batch).detach())


class Breaks(torch.optim.Adam):
    """Fails in its third step, after having taken it."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if max(int(s["step"]) for s in self.state.values()) >= 3:
            raise RuntimeError("in mid-edit")


@pytest.mark.parametrize("name", TRAINED)
def test_contract(name: str) -> None:
    model = MAKE(0)
    flagged = model.model.embed_tokens.weight.requires_grad_(False)
    model.train()
    model.model.layers[0].eval()  # modes may be mixed
    before, keys, kind = state(model), list(model.state_dict()), type(model)
    config = model.generation_config.to_dict()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]

    def unchanged_around() -> None:
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert not flagged.requires_grad
        assert [module.training for module in model.modules()] == modes
        assert (type(model), list(model.state_dict())) == (kind, keys)
        assert model.generation_config.to_dict() == config
        assert not hasattr(model, "peft_config")
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())

    base = loss_of(model)
    edited = run(model, name)
    assert loss_of(model) < base - 0.1
    assert len(edited.losses) == edited.counts["epochs"] > 0
    assert edited.losses[0] > edited.losses[len(edited.losses) // 2 - 1] or "seq" in name
    assert edited.drift > 0
    unchanged_around()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == set(edited.originals)
    if not name.startswith("lora"):
        assert changed <= {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    first = state(model)
    assert edited.undo() is model
    assert same(state(model), before)

    again = run(model, name)
    assert same(state(model), first)
    assert again.losses == edited.losses
    again.undo()
    run(model, name, seed=1)
    assert not same(state(model), first)
    model.load_state_dict(before)

    with pytest.raises(RuntimeError, match="in mid-edit"):
        run(model, name, optimizer=Breaks)
    assert same(state(model), before)
    unchanged_around()


@pytest.mark.parametrize("project", ["update", "eigenbasis"])
def test_an_exception_in_other_projections(project: str) -> None:
    model = MAKE(0)
    before = state(model)
    with pytest.raises(RuntimeError, match="in mid-edit"):
        run(model, "crispedit", optimizer=Breaks, project=project)
    assert same(state(model), before)
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_none_is_the_model_as_it_is() -> None:
    model = MAKE(0)
    before = state(model)
    edited = edit(model, TOKENIZER, REQUESTS, editor="none")
    assert (edited.losses, edited.stopped, edited.drift, edited.displacement()) == ([], "", 0.0, {})
    assert same(state(edited.undo()), before)


def test_edits_where_gradients_are_switched_off() -> None:
    expected = run(MAKE(0), "crispedit").losses
    with torch.no_grad():
        assert run(MAKE(0), "crispedit").losses == expected


def test_weights_that_are_not_finite_are_not_put_on_the_step() -> None:
    model = MAKE(0)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="no step was taken: look at the weights"):
        run(model, "ft")


def test_locbf_edits_the_second_highest() -> None:
    model = MAKE(0)
    assert set(run(model, "locbf-ft").originals) == {"model.layers.0.mlp.down_proj.weight"}
    assert set(run(model, "locbf-ft", layers=None).originals) == {"model.layers.1.mlp.down_proj.weight"}


def test_ft_seq_is_ft_round_by_round() -> None:
    one, other = MAKE(0), MAKE(0)
    run(one, "ft-seq", chunk=3)
    for start in (0, 3):
        run(other, "ft", requests=REQUESTS[start : start + 3], seed=start)
    assert same(state(one), state(other))


def test_weights_that_end_up_not_finite_are_put_back() -> None:
    class Last(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.param_groups[0]["params"][0].data.mul_(torch.nan)

    model = MAKE(0)
    before = state(model)
    with pytest.raises(FloatingPointError, match="not finite after the edit"):
        run(model, "ft", optimizer=Last, epochs=1, batch_size=5)
    assert same(state(model), before)


def test_default_layers_are_at_the_papers_depth() -> None:
    class Block(nn.Module):
        def __init__(self, end: str) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({end: nn.Linear(2, 2), "up_proj": nn.Linear(2, 2)})

    def layers(depth: int, end: str = "down_proj") -> list[str]:
        return default_layers(nn.ModuleDict({"layers": nn.ModuleList(Block(end) for _ in range(depth))}))

    assert layers(32) == [f"layers.{i}.mlp.down_proj" for i in range(19, 24)]
    assert layers(1) == ["layers.0.mlp.down_proj"]
    assert layers(8, "dense_4h_to_h") == ["layers.5.mlp.dense_4h_to_h"]
    assert all(len(layers(n)) >= 1 for n in range(1, 40))
    with pytest.raises(ValueError, match="name the layers to edit"):
        layers(4, "other")
    assert default_layers(FAMILIES["gpt2"][0](0)) == ["transformer.h.1.mlp.c_proj"]


TWICE = [*REQUESTS, Request(REQUESTS[0].prompt, "Berlin")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"editor": "crispedi"}, "did you mean one of .*crispedit"),
        ({"editor": "ft", "gama": 0.9}, r"ft has no option \['gama'\]; it has .*epochs"),
        ({"requests": []}, "no requests"),
        ({"requests": ["The capital of France is"]}, "must be a list of curvlab.data.edits.Request, got 'The capital"),
        ({"epochs": 2.5}, "must be whole numbers"),
        ({"requests": TWICE}, "asks for 'Berlin' where"),
        ({"editor": "ft", "template": "{question} " + "long " * 600}, "more tokens in their template than the model"),
        ({"layers": "model.layers.7.mlp.down_proj"}, "no layer fits .*did you mean"),
        ({"layers": "model.norm"}, "curvature is defined for Linear"),
        ({"capability": None}, "crispedit needs a capability set"),
        ({"capability": []}, "at least one document"),
        ({"capability": "a single text"}, "as a list of strings"),
        ({"gamma": 1.0}, "gamma must lie strictly between 0 and 1"),
        ({"constraint": "ball"}, "constraint must be"),
        ({"curvature": "hessian"}, "curvature must be"),
        ({"project": "weights"}, "project must be"),
        ({"drift": 0.0}, "drift must be positive"),
        ({"constraint": "ellipsoid", "epsilon": float("inf")}, "epsilon must be positive and finite"),
        ({"constraint": "ellipsoid", "project": "gradient"}, "bounds the displacement"),
        ({"constraint": "ellipsoid", "curvature": "covariance"}, "no units of loss"),
        ({"optimizer": "adamw"}, "weight decay leaves the null space"),
        ({"optimizer": torch.optim.LBFGS, "project": "update"}, "LBFGS relies"),
        ({"editor": "ft-seq", "chunk": 0}, "chunk must be at least 1"),
        ({"editor": "lora-seq", "chunk": 0}, "chunk must be at least 1"),
        ({"editor": "lora", "rank": 0}, "rank must be at least 1"),
        ({"editor": "lora", "variant": "dora"}, "variant must be"),
        ({"editor": "lora", "modules": ("w_proj",)}, "no layer fits"),
        ({"editor": "crispedit-seq", "curvature": "ekfac"}, "do not merge over rounds"),
        ({"editor": "crispedit-seq", "curvature": "covariance", "weights": "share"}, "merged by tokens"),
        ({"editor": "crispedit-seq", "drift": 0.1}, "drift must be None"),
        ({"editor": "crispedit-seq", "share": 1.0}, "share must lie"),
        ({"editor": "crispedit-seq", "weights": "rounds"}, "weights must be"),
        ({"editor": "kfac-penalty", "strength": -1.0}, "strength must be positive"),
        ({"editor": "kfac-penalty", "curvature": "covariance"}, "curvature must be 'kfac' or 'ekfac'"),
        ({"editor": "ewc", "strength": float("nan")}, "strength must be positive"),
        ({"editor": "ewc", "capability": None}, "ewc needs a capability set"),
        ({"editor": "replay", "strength": 0.0}, "strength must be positive"),
        ({"editor": "replay", "capability": None}, "replay needs a capability set"),
        ({"editor": "adam-nscl", "ratio": 0.5}, "ratio must be at least 1"),
        ({"editor": "adam-nscl", "curvature": "kfac"}, "defined by the covariance"),
    ],
)
def test_bad_input_before_any_change(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MAKE(0)
    model.train()
    before = state(model)
    monkeypatch.setattr(job_module, "descend", lambda *args, **how: pytest.fail("training began"))
    monkeypatch.setattr(Capability, "batches", lambda *args, **how: pytest.fail("curvature was taken"))
    arguments = {"requests": REQUESTS, "layers": BOTH, "capability": DOCUMENTS} | given
    with pytest.raises(ValueError, match=message):
        edit(model, TOKENIZER, **arguments)
    assert same(state(model), before)
    assert model.training


def test_tied_and_quantised_weights_are_refused() -> None:
    model = FAMILIES["gpt2"][0](0)  # its head is the embedding
    with pytest.raises(ValueError, match="shares its weight"):
        edit(model, TOKENIZER, REQUESTS, editor="ft", layers="lm_head")
    model = MAKE(0)
    module = model.model.layers[1].mlp.down_proj
    module.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(torch.uint8\)"):
        edit(model, TOKENIZER, REQUESTS, editor="ft", layers=BOTH)
    module.weight = nn.Parameter(torch.zeros(32, 48, device="meta"))
    with pytest.raises(ValueError, match="offloaded"):
        edit(model, TOKENIZER, REQUESTS, editor="ft", layers=BOTH)


def test_shared_modules_elsewhere_do_no_harm() -> None:
    """GPT-2's head is its embedding: one parameter under two names."""
    model = FAMILIES["gpt2"][0](0)
    before = state(model)
    edited = edit(model, TOKENIZER, REQUESTS, editor="ft", epochs=4, lr=1e-2, batch_size=3)
    assert edited.losses[-1] < edited.losses[0]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert same(state(edited.undo()), before)


def test_gradient_checkpointing_changes_nothing() -> None:
    models = [MAKE(0), MAKE(0)]
    models[1].gradient_checkpointing_enable()
    for model in models:
        model.train()
        run(model, "crispedit", layers=None)
    assert same(state(models[0]), state(models[1]))


@dataclass(frozen=True)
class Shift:
    """Options of the test's own editor."""

    by: float = 1.0


def test_a_new_editor_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_EDITORS", dict(editors()))

    @editor("shift", Shift)
    @editor("shift-more", Shift, by=3.0)
    def shift(job: Job, options: Shift) -> None:
        """Adds a number to every weight."""
        for parameter in job.parameters():
            with torch.no_grad():
                parameter += options.by
        job.counts["shifted"] = 1

    assert editors()["shift"].summary == "Adds a number to every weight."
    assert all(found.summary.endswith(".") for found in editors().values())
    model = tiny_llama(0)
    before = state(model)
    for name, options, by in (("shift", {}, 1.0), ("shift-more", {}, 3.0), ("shift-more", {"by": 2.0}, 2.0)):
        edited = edit(model, TOKENIZER, REQUESTS, editor=name, **options)
        (moved,) = edited.displacement().values()
        torch.testing.assert_close(moved, torch.full_like(moved, by))
        assert (edited.counts["shifted"], edited.options["by"]) == (1, by)
        edited.undo()
    assert same(state(model), before)


def test_options_are_documented() -> None:
    """Every option of every editor is in the docstring of its class or of a parent."""
    for name, found in editors().items():
        text = " ".join(parent.__doc__ or "" for parent in found.options.__mro__)
        missing = [f.name for f in dataclasses.fields(found.options) if f.name not in text]
        assert not missing, (name, missing)
        assert issubclass(found.options, (Training, Wording)) or name == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{"project": "gradient"}, {"project": "eigenbasis"}, {"editor": "lora"}], ids=str)
def test_models_spread_by_accelerate(how: dict[str, Any], dtype: torch.dtype) -> None:
    """Modules with accelerate's hooks, the first block's weights offloaded: the same edit, and hooks stay."""
    plain, spread = MAKE(0, dtype=dtype), MAKE(0, dtype=dtype)
    accelerate.dispatch_model(spread, {"": "cpu"}, force_hooks=True)
    editor_of = how.get("editor", "crispedit")
    if editor_of != "lora":  # which edits the first block, too
        accelerate.cpu_offload(spread.model.layers[0], execution_device=torch.device("cpu"))
    hooked = [name for name, module in spread.named_modules() if hasattr(module, "_hf_hook")]
    options = {"layers": None, "epochs": 4, "seed": 2} | {k: v for k, v in how.items() if k != "editor"}
    flags = {name: p.requires_grad for name, p in spread.named_parameters()}
    edits = [run(model, editor_of, **options) for model in (plain, spread)]
    assert edits[0].losses == pytest.approx(edits[1].losses, rel=1e-5 if dtype == torch.float32 else 0.03)
    assert [name for name, module in spread.named_modules() if hasattr(module, "_hf_hook")] == hooked
    assert {name: p.requires_grad for name, p in spread.named_parameters()} == flags
    for name, moved in edits[0].displacement().items():
        found = edits[1].displacement()[name]
        assert ((found - moved).norm() / moved.norm()).item() < (1e-4 if dtype == torch.float32 else 0.5)
    assert loss_of(spread) == pytest.approx(loss_of(plain), rel=1e-4 if dtype == torch.float32 else 0.1)
    for done in edits:
        done.undo()
    assert loss_of(spread) == pytest.approx(loss_of(plain), rel=1e-6)
