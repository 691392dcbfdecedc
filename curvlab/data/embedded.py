"""A pair of image tasks that needs no files: real handwritten digits, and letters rendered from fonts.

Both come from packages that are installed anyway (scikit-learn and Matplotlib) and have the form of MNIST:
28×28 pixels, white ink on black, ten classes. They are far smaller and easier than the real pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, radians
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

LETTERS = "ABCDEFGHIJ"

# Named, not listed from the folder, so that a new Matplotlib does not change the task.
TRAIN_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "cmr10.ttf",
    "cmmi10.ttf",
)
TEST_FONTS = (
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "STIXGeneralBolIta.ttf",
    "cmb10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
)

_CANVAS = 56  # letters are drawn and warped at twice the final size, then averaged down
_CHUNK = 1000


@dataclass(frozen=True)
class RawSet:
    """Images (N, 28, 28) uint8, 0 black to 255 white, and labels (N,) int64."""

    images: Tensor
    labels: Tensor


@lru_cache(maxsize=4)
def embedded_digits(seed: int = 0, copies: int = 8, n_test: int = 450) -> tuple[RawSet, RawSet]:
    """Train and test set of scikit-learn's 1,797 handwritten digits, brought from 8×8 to 28×28 pixels.

    The originals are split by class and `seed` before anything else; each train original is then drawn
    `copies` times, once upright and otherwise slightly turned, shifted, scaled and slanted. Test originals
    are drawn once, upright. The result is kept in memory and shared: do not write into it.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Ink 0..16 to 0..1; float32 holds these exactly.
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=n_test, random_state=seed, stratify=digits.target)
    generator = torch.Generator().manual_seed(seed)
    train = torch.from_numpy(train).repeat_interleave(copies)
    jitter = _affine(len(train), generator, turn=10, slant=0.15, stretch=0.1, shift=2 / 14)
    upright = _affine(len(test), generator, turn=0, slant=0, stretch=0, shift=0)
    jitter[::copies] = upright[:1]
    # The 8×8 digit fills the middle 20×20 pixels, as in MNIST.
    train_images = _warp(images[train], jitter * (28 / 20), size=28, mode="bicubic")
    test_images = _warp(images[test], upright * (28 / 20), size=28, mode="bicubic")
    return RawSet(_to_bytes(train_images), labels[train]), RawSet(_to_bytes(test_images), labels[test])


@lru_cache(maxsize=4)
def embedded_letters(seed: int = 0, n_train: int = 10_000, n_test: int = 2_000) -> tuple[RawSet, RawSet]:
    """Train and test set of the letters A to J in Matplotlib's own fonts, in the manner of notMNIST.

    Letters are turned, slanted, stretched, shifted, thickened or thinned, dimmed and covered with noise. The
    fonts of the test set are not among those of the train set. The result is kept in memory and shared: do
    not write into it.
    """
    train = _letters(TRAIN_FONTS, n_train, torch.Generator().manual_seed(2 * seed))
    test = _letters(TEST_FONTS, n_test, torch.Generator().manual_seed(2 * seed + 1))
    return train, test


def _letters(fonts: Sequence[str], n: int, generator: torch.Generator) -> RawSet:
    """n letters, balanced over classes and fonts, in random order."""
    glyphs = _weights(torch.stack([_glyph(font, letter) for font in fonts for letter in LETTERS]))
    which = torch.randperm(n, generator=generator) % glyphs.shape[1]
    weight = torch.randint(len(glyphs), (n,), generator=generator)
    jitter = _affine(n, generator, turn=25, slant=0.3, stretch=0.2, shift=0.12)
    contrast = 0.3 + 0.7 * torch.rand(n, 1, 1, generator=generator)
    noise = 0.4 * torch.rand(n, 1, 1, generator=generator)
    parts = []
    for rows in torch.arange(n).split(_CHUNK):
        ink = glyphs[weight[rows], which[rows]].unsqueeze(1)
        ink = _warp(ink, jitter[rows], size=_CANVAS, mode="bilinear")
        ink = F.avg_pool2d(ink, 2).squeeze(1)
        grain = torch.randn(ink.shape, generator=generator)
        parts.append(_to_bytes(ink * contrast[rows] + grain * noise[rows]))
    return RawSet(torch.cat(parts), which % len(LETTERS))


def _glyph(font: str, letter: str) -> Tensor:
    """One letter as ink (56, 56) in [0, 1], scaled so that its longer side is 40 pixels, in the middle."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    if not path.is_file():
        raise FileNotFoundError(f"Matplotlib's font {path} is missing; the embedded letters need it")
    face = ImageFont.truetype(str(path), size=64, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(letter)
    picture = Image.new("L", (ceil(right - left), ceil(bottom - top)))
    ImageDraw.Draw(picture).text((-left, -top), letter, fill=255, font=face)
    scale = 40 / max(picture.size)
    picture = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BOX
    )
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(picture, ((_CANVAS - picture.width) // 2, (_CANVAS - picture.height) // 2))
    return torch.from_numpy(np.array(canvas)).float() / 255


def _weights(ink: Tensor) -> Tensor:
    """Strokes (N, H, W) in four weights (4, N, H, W): thin, as they are, thick and thicker."""
    thick = F.max_pool2d(ink, 3, stride=1, padding=1)
    thicker = F.max_pool2d(thick, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-ink, 3, stride=1, padding=1)
    # A hairline would vanish when thinned; half of it stays.
    return torch.stack([(thin + ink) / 2, ink, thick, thicker])


def _affine(n: int, generator: torch.Generator, *, turn: float, slant: float, stretch: float, shift: float) -> Tensor:
    """n random maps (n, 2, 3) from output to input coordinates; turn in degrees, shift in half widths."""
    # Uniform in [-1, 1]: angle, slant, the two stretches and the two shifts.
    u = 2 * torch.rand(n, 6, generator=generator) - 1
    cos, sin = torch.cos(u[:, 0] * radians(turn)), torch.sin(u[:, 0] * radians(turn))
    across, down = 1 + stretch * u[:, 2], 1 + stretch * u[:, 3]
    lean = slant * u[:, 1]
    rows = [across * cos, across * (lean * cos - sin), shift * u[:, 4]]
    rows += [down * sin, down * (lean * sin + cos), shift * u[:, 5]]
    return torch.stack(rows, dim=1).reshape(n, 2, 3)


def _warp(ink: Tensor, maps: Tensor, *, size: int, mode: str) -> Tensor:
    """Images (N, 1, h, w) drawn through affine maps (N, 2, 3) onto (N, 1, size, size), black outside."""
    grid = F.affine_grid(maps, [len(ink), 1, size, size], align_corners=False)
    return F.grid_sample(ink, grid, mode=mode, padding_mode="zeros", align_corners=False)


def _to_bytes(ink: Tensor) -> Tensor:
    """Ink (N, 28, 28) or (N, 1, 28, 28), clipped to [0, 1], as uint8 (N, 28, 28)."""
    return (ink.clamp(0, 1) * 255).round().to(torch.uint8).reshape(-1, 28, 28)
