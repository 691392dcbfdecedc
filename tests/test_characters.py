"""Letters as one-hot pieces, and a character model that learns from them."""

import pytest
import torch
import torch.nn.functional as F

from curvlab.models.characters import ALPHABET, IGNORE, character_model, pieces

TEXT = ["Ada was born in London, and Alan in Paris. "] * 40


def test_pieces_are_the_text_and_its_next_letters() -> None:
    x, y = pieces(TEXT, 20, length=8, seed=3)
    text = " ".join(TEXT).lower()
    for hot, following in zip(x, y, strict=True):
        letters = "".join(ALPHABET[int(i)] for i in hot.argmax(-1))
        assert letters in text
        assert "".join(ALPHABET[int(i)] for i in following[:-1]) == letters[1:]
        assert following[-1] == IGNORE
    assert torch.equal(x.sum(-1), torch.ones(20, 8, dtype=torch.float64))
    assert not torch.equal(x, pieces(TEXT, 20, length=8, seed=4)[0])


def test_the_model_learns_and_repeats() -> None:
    x, y = pieces(TEXT, 40, length=8)
    model = character_model(x, y, width=6, steps=150)
    again = character_model(x, y, width=6, steps=150)
    with torch.no_grad():
        loss = float(F.cross_entropy(model(x).mT, y, ignore_index=IGNORE))
        assert torch.equal(model(x), again(x))
    counts = x.flatten(0, 1).mean(0)
    entropy = -float((counts * counts.clamp_min(1e-12).log()).sum())
    assert loss < 0.8 * entropy  # better than letters drawn by their frequency
    assert not model.training


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="3 were asked for"):
        pieces(["hello"], 3)
