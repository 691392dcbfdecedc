"""Σ a aᵀ of a convolution from one product over its input's pixels, folded into patches at the end."""

import torch
from torch import Tensor

from curvlab.layers import Conv2dLayer

PIXELS = 4096  # of an image at most: 64 MiB in float32


class PixelGram:
    """One layer and one size of images.

    Overlapping patches share pixels: (C·H·W)² multiply–adds an example instead of T · d_in², in one large product.

    Attributes:
        name: of its sum among the sums of a fit, "layer/pixels/CxHxW".
    """

    def __init__(self, layer: Conv2dLayer, shape: tuple[int, ...], device: torch.device) -> None:
        self.layer = layer
        self.name = f"{layer.name}/pixels/{'x'.join(map(str, shape))}"
        self.places = layer.places(torch.zeros(1, *shape, device=device))

    @staticmethod
    def pays(layer: Conv2dLayer, x: Tensor) -> bool:
        """Whether it is the cheaper way (small products an example run at half the speed of a large one)."""
        return x[0].numel() <= PIXELS and x[0].numel() ** 2 < 2 * layer.places(x[:1]).shape[1] * layer.d_in**2

    @property
    def positions(self) -> int:
        return self.places.shape[1]

    def add(self, sums: dict[str, Tensor], x: Tensor) -> None:
        """Another batch (N, C, H, W), of the same size of images."""
        like = sums[f"{self.layer.name}/A"]
        pixels = self.layer.pixels(x).to(like)
        if self.name not in sums:
            sums[self.name] = like.new_zeros(pixels.shape[1], pixels.shape[1])
        sums[self.name].addmm_(pixels.mT, pixels)

    @classmethod
    def fold(cls, layer: Conv2dLayer, sums: dict[str, Tensor]) -> None:
        """Pixels become patches: Σ a aᵀ of `layer` += Σ_t of the entries that position t touches, for all sizes."""
        total = sums[f"{layer.name}/A"]
        for name in sorted(name for name in sums if name.startswith(f"{layer.name}/pixels/")):
            gram = sums.pop(name)
            shape = tuple(map(int, name.rsplit("/", 1)[1].split("x")))
            for index in cls(layer, shape, gram.device).places.mT:
                total.add_(gram[index[:, None], index])
