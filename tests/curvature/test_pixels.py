"""K-FAC's A of a convolution from pixels equals the sum over unfolded patches."""

from typing import Any

import pytest
import torch
from torch import nn

from curvlab.curvature import KFAC
from curvlab.curvature.kfac import PixelGram
from curvlab.layers import find_layers
from curvlab.losses import CrossEntropy


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": (1, 2), "padding_mode": "circular", "stride": (2, 1)},
        {"padding": 1, "padding_mode": "replicate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pays", [False, True])
def test_pixels_and_patches_agree(
    options: dict[str, Any], bias: bool, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PixelGram, "pays", staticmethod(lambda layer, x: pays))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    )
    model = model.double().eval()
    # images of two sizes, in batches of their own
    data = [(torch.randn(3, 2, size, 7).double(), torch.randint(0, 4, (3,))) for size in (8, 6, 8)]
    factors = KFAC.fit(model, CrossEntropy(), data, "0", labels="exact", bias=bias).factors["0"]
    (layer,) = find_layers(model, "0", bias)
    patches = [layer.inputs(x).flatten(0, 1) for x, _ in data]
    expected = sum(a.mT @ a for a in patches)
    assert factors.scale.positions == sum(len(a) for a in patches)
    torch.testing.assert_close(factors.a_sum, expected, rtol=1e-12, atol=1e-12)
