"""Hidden states below the edited layers, computed once and replayed: nothing that is seen above may change."""

from typing import Any

import pytest
import torch
from requests_and_text import DOCUMENTS, FAMILIES, REQUESTS, TOKENIZER, plain_loss
from torch import Tensor, nn

from curvlab.capture import Batch
from curvlab.data.text import encode_documents, encode_pairs, select
from curvlab.editing.prefix import Prefix, blocks_below
from curvlab.layers import find_layers


def batch_of_requests() -> Batch:
    (batch,) = encode_pairs(TOKENIZER, [(r.prompt, r.target) for r in REQUESTS])
    return batch


def upper(family: str) -> tuple[Any, str]:
    """A model in float64 and the MLP output of its second block."""
    make, pattern = FAMILIES[family]
    model = make(3, dtype=torch.float64)
    return model, find_layers(model, pattern)[1].name


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_logits_and_gradients_are_those_of_the_whole_pass(family: str) -> None:
    model, layer = upper(family)
    batch = batch_of_requests()
    prefix = Prefix(model, [layer], batch, micro_batch=2)
    assert prefix.skipped == 1
    weight = model.get_submodule(layer).weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    for index in (torch.tensor([3, 0]), torch.tensor([4]), torch.arange(len(batch))):
        chosen = select(batch, index)
        wanted = plain_loss(model, chosen)
        (gradient,) = torch.autograd.grad(wanted, weight)
        with prefix.replay(index):
            found = plain_loss(model, chosen)
            logits = model(**chosen.inputs).logits
        (replayed,) = torch.autograd.grad(found, weight)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        torch.testing.assert_close(replayed, gradient, rtol=1e-10, atol=1e-12)
        real = chosen.mask
        torch.testing.assert_close(logits[real], model(**chosen.inputs).logits[real], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_lower_blocks_do_not_run_and_forwards_come_back(family: str) -> None:
    model, layer = upper(family)
    prefix = Prefix(model, [layer], batch_of_requests())
    chosen = select(batch_of_requests(), torch.tensor([1]))
    (block,) = prefix.blocks
    ran: list[str] = []
    inner = [module for _, module in block.named_modules() if isinstance(module, nn.LayerNorm | nn.Linear)]
    assert inner
    handles = [module.register_forward_hook(lambda *_: ran.append("below")) for module in inner]
    with prefix.replay(torch.tensor([1])):
        model(**chosen.inputs)
    assert ran == []
    model(**chosen.inputs)
    assert ran
    for handle in handles:
        handle.remove()

    whole = model(**chosen.inputs).logits

    def fail() -> None:
        with prefix.replay(torch.tensor([1])):
            assert "forward" in vars(block)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert "forward" not in vars(block)
    assert torch.equal(model(**chosen.inputs).logits, whole)


def test_a_forward_of_someone_else_comes_back() -> None:
    """accelerate puts a forward of its own on each block."""
    model, layer = upper("llama")
    block = model.model.layers[0]
    own = block.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    block.forward = wrapped
    prefix = Prefix(model, [layer], batch_of_requests())
    with prefix.replay(torch.tensor([0])):
        assert block.forward is not wrapped
    assert block.forward is wrapped


def test_documents_of_several_lengths() -> None:
    """As replay uses it: whole batches, padding among them."""
    model, layer = upper("gpt2")
    (batch,) = encode_documents(TOKENIZER, DOCUMENTS)
    with Prefix(model, [layer], batch, micro_batch=3).replay(torch.arange(len(batch))):
        found = plain_loss(model, batch)
    torch.testing.assert_close(found, plain_loss(model, batch), rtol=1e-12, atol=0)


class Several(nn.Module):
    """Blocks in a list, one list inside another, and layers outside of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(2, 2)}) for _ in range(3))
        self.layers.append(nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))}))
        self.others = nn.ModuleList([nn.Linear(2, 2)])
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        (["layers.2.mlp"], 2),
        (["layers.2.mlp", "layers.1.mlp"], 1),
        (["layers.0.mlp", "layers.2.mlp"], 0),
        (["layers.3.experts.1"], 3),  # the outer list counts
        (["head"], 0),
        (["layers.2.mlp", "head"], 0),
        (["layers.2.mlp", "others.0"], 0),
    ],
)
def test_which_blocks_lie_below(layers: list[str], count: int) -> None:
    model = Several()
    assert blocks_below(model, layers) == list(model.layers)[:count]


@pytest.mark.parametrize("where", ["lm_head", "model.layers.0.mlp.down_proj"])
def test_nothing_to_skip(where: str) -> None:
    model, _ = upper("llama")
    batch = batch_of_requests()
    prefix = Prefix(model, [where], batch)
    assert prefix.skipped == 0
    wanted = plain_loss(model, batch)
    with prefix.replay(torch.arange(len(batch))):
        assert torch.equal(plain_loss(model, batch), wanted)


def test_blocks_that_hand_on_more_than_hidden_states_are_seen() -> None:
    """The second block adds what the first one left for it: replaying would lose that."""
    model, layer = upper("llama")
    left: list[Tensor] = []

    class Leaves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left[:] = [x.mean()]
            return x

    class Finds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + left.pop() * 50 if left else x

    first, second = model.model.layers
    first.input_layernorm = nn.Sequential(first.input_layernorm, Leaves())
    second.input_layernorm = nn.Sequential(second.input_layernorm, Finds())
    with pytest.warns(UserWarning, match="hand on more than hidden states"):
        prefix = Prefix(model, [layer], batch_of_requests())
    assert prefix.skipped == 0
    with prefix.replay(torch.tensor([0])):
        assert "forward" not in vars(first)


def test_bfloat16_is_no_reason_to_run_everything() -> None:
    model, layer = upper("gpt2")
    assert Prefix(model.bfloat16(), [layer], batch_of_requests()).skipped == 1


def test_bytes_are_announced_before_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from curvlab.editing import prefix as module

    asked: list[tuple[str, int, str]] = []

    def announce(what: str, needed: int, cheaper: str, device: Any) -> None:
        asked.append((what, needed, cheaper))
        raise MemoryError(what)

    monkeypatch.setattr(module, "announce", announce)
    model, layer = upper("llama")
    batch = batch_of_requests()
    with pytest.raises(MemoryError, match="hidden states"):
        Prefix(model, [layer], batch, micro_batch=2)
    assert asked[0][1:] == (batch.targets.numel() * 32 * 8, "cache_prefix=False")
