"""The edit loss and its descent against a plain loop; the stop rules, seeds and what is refused."""

from typing import Any

import pytest
import torch
from requests_and_text import FAMILIES, REQUESTS, TOKENIZER, plain_loss, same, state
from torch import Tensor, nn

from curvlab.data.text import QA, encode_pairs
from curvlab.editing.training import Curve, Training, descend, target_loss
from curvlab.layers import find_layers


def setting(family: str = "llama", lr: float = 1e-2, **options: Any) -> tuple[Any, list[str], Training]:
    """A model in float64 with the MLP outputs of both blocks to train."""
    make, pattern = FAMILIES[family]
    model = make(1, dtype=torch.float64)
    names = [layer.name for layer in find_layers(model, pattern)]
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).weight.requires_grad_(True)
    return model, names, Training(**({"lr": lr, "batch_size": 2, "epochs": 3} | options))


def run(model: Any, names: list[str], options: Training, **how: Any) -> Curve:
    optimizer = how.pop("optimizer", None) or options.optimise([p for p in model.parameters() if p.requires_grad])
    given: dict[str, Any] = {"layers": names, "seed": 5, "desc": "test"} | how
    return descend(model, TOKENIZER, how.pop("requests", REQUESTS), optimizer, options, **given)


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_target_loss_token_by_token(family: str, mask_prompt: bool) -> None:
    model, _, options = setting(family, mask_prompt=mask_prompt, template=QA, ending=".")
    (batch,) = options.encode(TOKENIZER, REQUESTS)
    pairs = [(r.prompt, f"{r.target}.") for r in REQUESTS]
    (by_hand,) = encode_pairs(TOKENIZER, pairs, template=QA, mask_prompt=mask_prompt)
    assert torch.equal(batch.targets, by_hand.targets)
    torch.testing.assert_close(target_loss(model, batch), plain_loss(model, batch), rtol=1e-12, atol=0)
    assert target_loss(model.bfloat16(), batch).dtype == torch.float32


@pytest.mark.parametrize("cache_prefix", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_loop(family: str, cache_prefix: bool) -> None:
    """Batches in the order of the seed, Adam, the mean over each batch's tokens; only the upper block is edited."""
    model, names, options = setting(family, cache_prefix=cache_prefix)
    other, _, _ = setting(family)
    model.get_submodule(names[0]).weight.requires_grad_(False)
    weight = other.get_submodule(names[1]).weight
    curve = run(model, names[1:], options)

    optimizer = torch.optim.Adam([weight], lr=1e-2)
    generator, losses = torch.Generator().manual_seed(5), []
    for _ in range(3):
        order, total = torch.randperm(len(REQUESTS), generator=generator).tolist(), 0.0
        for start in range(0, len(order), 2):
            few = [REQUESTS[i] for i in order[start : start + 2]]
            (batch,) = encode_pairs(TOKENIZER, [(r.prompt, r.target) for r in few])
            optimizer.zero_grad()
            loss = plain_loss(other, batch)
            loss.backward()
            optimizer.step()
            total += len(few) * loss.item()
        losses.append(total / len(order))
    assert curve.losses == pytest.approx(losses, rel=1e-9)
    assert (curve.skipped, curve.stopped) == ([0, 0, 0], "epochs")
    found = model.get_submodule(names[1]).weight
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-8)  # (Adam divides small gradients by their size)
    untouched = [n for n, p in model.named_parameters() if p is not found]
    assert same({n: model.state_dict()[n] for n in untouched}, {n: other.state_dict()[n] for n in untouched})
    assert all(p.grad is None for p in model.parameters())


def test_batches_below_the_skip_rule_take_no_step() -> None:
    model, names, options = setting(skip_below=1e9, stop_below=0.0)
    before, steps = state(model), []
    curve = run(model, names, options, after_step=lambda: steps.append(1))
    assert (curve.skipped, curve.stopped, steps) == ([3, 3, 3], "epochs", [])
    assert curve.losses[0] == pytest.approx(curve.losses[1])
    assert same(before, state(model))


def test_training_stops_once_an_epoch_is_below() -> None:
    model, names, options = setting(epochs=300, stop_below=0.3, skip_below=0.0, lr=5e-3)
    epochs: list[int] = []
    curve = run(model, names, options, after_epoch=lambda: epochs.append(1))
    assert curve.stopped == "loss"
    assert curve.losses[-1] < 0.3 <= min(curve.losses[:-1])
    assert len(curve.losses) < 300
    assert len(epochs) == len(curve.losses) - 1  # not after the last: nothing follows it
    model, names, options = setting(epochs=4)
    epochs.clear()
    run(model, names, options, after_epoch=lambda: epochs.append(1))
    assert len(epochs) == 3


def test_the_seed_orders_the_requests() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model, names, options = setting()
        run(model, names, options, seed=seed)
        return state(model)

    assert same(weights(1), weights(1))
    assert not same(weights(1), weights(2))


def test_the_extra_term_is_descended_but_not_counted() -> None:
    model, names, options = setting(epochs=1, batch_size=5, optimizer="sgd", lr=0.1)
    plain, _, _ = setting()
    weight = model.get_submodule(names[0]).weight
    pull = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curve = run(model, names, options, extra=lambda: (weight * pull).sum())
    alone = run(plain, names, options)
    assert curve.losses == alone.losses
    expected = plain.get_submodule(names[0]).weight - 0.1 * pull
    torch.testing.assert_close(weight, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.get_submodule(names[1]).weight, plain.get_submodule(names[1]).weight)


def test_losses_that_are_not_finite_are_reported() -> None:
    model, names, options = setting(lr=1e37, epochs=50, skip_below=0.0)
    with pytest.raises(FloatingPointError, match=r"try a smaller lr than 1e\+37"):
        run(model, names, options)
    with torch.no_grad():
        model.get_submodule(names[0]).weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="epoch 1; no step was taken"):
        run(model, names, options)


def test_an_optimiser_that_asks_for_the_loss_itself() -> None:
    """LBFGS evaluates a closure as often as it likes: the loss with the extra term, of the same batch."""
    model, names, options = setting(optimizer=torch.optim.LBFGS, lr=0.5, epochs=2, batch_size=5)
    weight = model.get_submodule(names[0]).weight
    start = weight.detach().clone()

    def penalty() -> Tensor:
        return 3 * (weight - start).square().sum()

    curve = run(model, names, options, extra=penalty)
    other, _, _ = setting()
    own = [other.get_submodule(name).weight for name in names]
    optimizer = torch.optim.LBFGS(own, lr=0.5)
    (batch,) = options.encode(TOKENIZER, REQUESTS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = plain_loss(other, batch) + 3 * (own[0] - start).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert curve.losses[1] < curve.losses[0]
    assert (own[0] - start).norm().item() > 0.01
    torch.testing.assert_close(weight, own[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"optimizer": "adagrad"}, "one of adam, sgd"),
        ({"template": "Q:"}, "must contain {question}"),
        ({"skip_below": -1.0}, "losses ≥ 0"),
        ({"stop_below": float("nan")}, "losses ≥ 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**options)


def test_requests_longer_than_the_model_in_their_template() -> None:
    options = Training(template=QA, ending=".")
    (batch,) = options.encode(TOKENIZER, REQUESTS)
    longest = int(batch.inputs["attention_mask"].sum(1).max())
    options.check(TOKENIZER, REQUESTS, longest)
    with pytest.raises(ValueError, match=f"1 requests have more tokens .*{longest} of {longest - 1}"):
        options.check(TOKENIZER, REQUESTS, longest - 1)


def test_logits_are_formed_where_targets_are() -> None:
    model, _, options = setting()
    (batch,) = options.encode(TOKENIZER, REQUESTS)
    widths: list[int] = []
    head: nn.Module = model.lm_head
    head.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    target_loss(model, batch)
    assert widths == [int((batch.targets != -100).any(0).sum())]
    assert widths[0] < batch.targets.shape[1]
