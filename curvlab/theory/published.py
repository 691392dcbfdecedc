"""Claim 5: the figures on storage and cost that the paper and its reviews print, against the formulas of `storage`."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from curvlab.theory.check import Case, Findings, claim, control
from curvlab.theory.storage import LLAMA, Shape, entries, products


@dataclass(frozen=True)
class Figure:
    """A published figure.

    Attributes:
        quote, place: what is printed, and where.
        stated: the number.
        unit: value of one unit in its last printed digit.
        true: what it should be.
        right: whether it is expected to be.
    """

    quote: str
    place: str
    stated: float
    unit: float
    true: float
    right: bool

    @property
    def factor(self) -> float:
        """By which it is off; above one if too small."""
        return self.true / self.stated

    @property
    def allowed(self) -> float:
        """The factor that rounding to the printed digits explains, on the side on which it is off."""
        side = self.stated + (self.unit / 2 if self.true > self.stated else -self.unit / 2)
        return max(side / self.stated, self.stated / side)


def figures(shape: Shape = LLAMA) -> list[Figure]:
    """Every figure on storage and cost in the paper's text and the reviews, with its true value.

    The formulas are those that the two claims above verify on allocated objects. Bytes are decimal.
    """
    n, step = entries(shape), products(shape)
    single = 4  # bytes of float32, the authors' dtype
    explicit, bases, mask = n["explicit projector"], n["bases"], n["mask"]
    method, memory = "review, key designs, K-FAC", "review, highlights"
    batches = ceil(3000 / 32)  # 3000 edits, batches of 32 (Table 2)
    return [
        Figure("an explicit projector would require ~3.4TB (float32)", method, 3.4e12, 1e11, explicit * single, False),
        Figure("the same, one bit an entry", method, 3.4e12, 1e11, explicit / 8, False),
        Figure("the same digits, as 3.4e15 entries", method, 3.4e15, 1e14, explicit, True),
        Figure("MLP of 4096 × 14336, 58.7 million products", "ours", 58.7e6, 1e5, mask, True),
        Figure("storage d_in² + d_out² ≈ 200M scale", method, 2e8, 1e8, bases, True),
        Figure("the same with the mask", method, 2e8, 1e8, bases + mask, False),
        Figure("3.4TB → 200MB (bases in float32)", memory, 2e8, 1e8, bases * single, False),
        Figure("3.4TB → 200MB (bases in float32, mask of bytes)", memory, 2e8, 1e8, bases * single + mask, False),
        Figure("3.4TB → 200MB (bases in bfloat16)", memory, 2e8, 1e8, bases * 2, False),
        Figure("3.4TB → 200MB: ratio 17,000 (ours, of the two)", memory, 17e3, 1e3, explicit / bases, False),
        Figure("3 matrix multiplies", method, 3, 1, step["matrix products"], False),
        Figure("1 Hadamard product", method, 1, 1, step["Hadamard products"], True),
        Figure("projection once per epoch", "review, loss & training", 1, 1, batches, False),
        Figure("LLM scale, 10^10 parameters", "review, key challenge", 1e10, 1e10, llama_parameters(), True),
        Figure("8B parameters", "paper, model name", 8e9, 1e9, llama_parameters(), True),
    ]


@claim(5, "reviews, on paper section 3.3")
def published_storage_figures(*, shape: Shape = LLAMA, published: Sequence[Figure] | None = None) -> Findings:
    """The published figures on storage and cost of a projection at 4096 × 14336 are right to their printed digits.

    Each is divided by the value of the formula that the library's objects obey; what rounding to the printed digits
    does not explain is off, by the factor in the series. "3.4TB" is 3.4e15 entries: 13.8 PB in float32.

    Control: an explicit projector counted as d_in d_out entries, without the square.

    Args:
        published: the figures, `figures(shape)` by default.
    """
    cases, rows = [], []
    for figure in figures(shape) if published is None else published:
        off = max(figure.factor, 1 / figure.factor)
        cases.append(Case(f"{figure.quote} ({figure.place}): off by a factor", off, figure.allowed, figure.right))
        rows.append(
            {
                "quote": figure.quote, "place": figure.place, "stated": figure.stated, "true": figure.true,
                "true / stated": figure.factor,
            }
        )  # fmt: skip
    n = entries(shape)
    p, square = n["mask"], n["explicit projector"]
    cases.append(control("an explicit projector of d_in d_out entries: off by a factor", square / p, 1.015))
    return Findings(cases, {"shape": list(shape), "figures": rows})


def llama_parameters() -> int:
    """Of Llama-3-8B, from its configuration: 32 layers of width 4096, 8 of 32 heads for keys and values."""
    width, inner, layers, vocabulary, kv = 4096, 14336, 32, 128256, 1024
    attention = 2 * width * width + 2 * width * kv
    return 2 * vocabulary * width + layers * (attention + 3 * width * inner + 2 * width) + width
