"""How passes are added to a layer's moments."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from curvlab.capture import Pass
from curvlab.crosscheck.layout import CORE, POSITIONS, Layout
from curvlab.crosscheck.moments import Gram, Key, LayerMoments
from curvlab.crosscheck.squares import Squares
from curvlab.layers import MatrixLayer
from curvlab.memory import available, bytes_of

LARGE_LAYER = 2048  # products of wider layers are taken in float32 (and added up in float64)


@dataclass
class Adder:
    """How passes are added to one layer's moments."""

    moments: LayerMoments
    a_weights: dict[str, Mapping[str, Tensor]]  # by weight, then choice of positions: (examples,)
    s_weights: dict[str, Tensor]
    thorough: bool
    squares: Squares | None
    product: torch.dtype
    open: dict[Key, Tensor] = field(default_factory=dict)  # sums over the batch that is not yet complete: rows,
    open_gradients: dict[Key, Tensor] = field(default_factory=dict)  # and whole gradients
    batch: int = 0

    @classmethod
    def of(
        cls, layer: MatrixLayer, layout: Layout, a: Tensor, thorough: bool, basis: tuple[Tensor, Tensor] | None
    ) -> "Adder":
        T = layout.codes[0].shape[1]
        flagged = a.shape[1] == T > 1
        present = set(layout.counts.sum(0).nonzero().flatten().tolist()) if flagged else {0}
        sets: dict[str, frozenset[int]] = {}
        for name, counts in POSITIONS.items():
            classes = frozenset(c for c in present if counts(c))
            if classes and classes not in sets.values():
                sets[name] = classes
        scales: dict[str, float] = {}
        ones = torch.ones(len(layout.terms), dtype=torch.int64)
        a_weights: dict[str, Mapping[str, Tensor]] = {"sum": {}}
        for name, group in (("batches alike", layout.by_batch), ("documents alike", lambda n: n)):
            own = {
                s: group(layout.positions(s) if flagged else ones).clamp_min(1).double().rsqrt()
                for s in sets
                if s in CORE
            }
            if thorough and any(_varies(w) for w in own.values()):
                a_weights[name] = own
        s_weights: dict[str, Tensor] = {}
        terms = layout.terms.clamp_min(1)
        batch_terms = layout.by_batch(layout.terms).clamp_min(1)
        for name, w in (
            ("sum", ones.double()),
            ("mean over each batch", 1 / batch_terms.double()),
            ("mean over each document", 1 / terms.double()),
            ("batches alike", batch_terms.double().rsqrt()),
        ):
            if name == "sum" or (thorough and _varies(w)):
                s_weights[name] = w
            elif thorough and name != "batches alike" and float(w[0]) != 1.0:
                scales[name] = float(w[0]) ** 2
        core = sum(name in CORE for name in sets)
        matrices = len(present) + core * (3 * thorough + len(a_weights) - 1), len(s_weights) * (len(present) + core)
        needed = bytes_of(matrices[0], layer.d_in, layer.d_in, dtype=torch.float64)
        needed += 6 * bytes_of(matrices[1], layer.d_out, layer.d_out, dtype=torch.float64)  # of six kinds of labels
        if thorough and needed > available(layer.device) / 2:
            return cls.of(layer, layout, a, False, basis)
        moments = LayerMoments(layer, flagged, sets, layout, scales, thorough=thorough)
        product = torch.float64 if max(layer.d_in, layer.d_out) <= LARGE_LAYER else torch.float32
        return cls(moments, a_weights, s_weights, thorough, None if basis is None else Squares(*basis), product)

    @property
    def _core(self) -> list[str]:
        return [name for name in self.moments.sets if name in CORE]

    def add_inputs(self, pass_: Pass, a: Tensor) -> None:
        self._flush(pass_)
        codes, a = self._codes(pass_, a), a.detach()
        self.moments.positions_seen += a.shape[0] * a.shape[1]
        for weight, by_set in self.a_weights.items():
            if weight == "sum":
                self._by_class(("", "position", "sum"), codes, a, None)
                continue
            for name, w in by_set.items():
                self._rows(("", "position", weight, name), self._in(codes, name), a, w[pass_.examples.cpu()])
        if not self.thorough:
            return
        for name in self._core:
            chosen = self._in(codes, name)
            summed, n = a.masked_fill(~chosen.unsqueeze(-1), 0).sum(1, dtype=self.product), chosen.sum(1).to(a.device)
            if a.shape[1] > 1:
                used = n > 0
                self._gram(("", "example", "sum", name), torch.cat([summed, n[:, None].to(summed)], 1)[used])
                mean = summed / n.clamp_min(1)[:, None]
                self._gram(("", "example", "mean", name), F.pad(mean, (0, 1), value=1.0)[used])
            self._open(("", "batch", "mean", name), torch.cat([summed.sum(0), n.sum()[None].to(summed)]))

    def add_gradients(self, labels: str, pass_: Pass, a: Tensor, g: Tensor) -> None:
        if labels not in self.moments.labels:
            self.moments.labels.append(labels)
        codes = self._codes(pass_, g)
        weights = {w: every[pass_.examples.cpu()] for w, every in self.s_weights.items()}
        for c in _present(codes):
            chosen = codes == c
            rows = g[chosen].to(self.product)
            for weight, w in weights.items():
                scale = w.to(rows)[:, None].expand(chosen.shape)[chosen].unsqueeze(-1)
                self._gram((labels, "position", weight, c), torch.cat([rows * scale, scale], 1))
        if self.squares is not None:
            self._add_squares(labels, weights, codes, a, g)
        whole = labels != "exact"  # whose vectors are many for a label: no gradient of a batch
        if not self.thorough or (g.shape[1] == 1 and not whole):
            return
        for name in self._core:
            total = g.masked_fill(~self._in(codes, name).unsqueeze(-1), 0).sum(1, dtype=self.product)
            for weight, w in weights.items():
                if weight == "batches alike":
                    continue
                summed = total * w.to(total)[:, None]
                if g.shape[1] > 1:
                    self._gram((labels, "example", weight, name), F.pad(summed, (0, 1), value=1.0))
                if whole:
                    self._open((labels, "batch", weight, name), F.pad(summed.sum(0), (0, 1)))

    def _add_squares(self, labels: str, weights: Mapping[str, Tensor], codes: Tensor, a: Tensor, g: Tensor) -> None:
        assert self.squares is not None
        sums, own = self.moments.squares, None if labels == "exact" else self.open_gradients
        for weight, w in weights.items():
            if weight == "batches alike":
                continue
            scaled = g * w.to(g)[:, None, None]
            for c in _present(codes):
                self.squares.add_positions(sums, (labels, "position", weight, c), a[codes == c], scaled[codes == c])
            for name in self._core:
                self.squares.add_examples(sums, own, (labels, weight, name), a, scaled, self._in(codes, name))

    def _by_class(self, key: tuple[str, str, str], codes: Tensor, x: Tensor, w: Tensor | None) -> None:
        for c in _present(codes):
            self._rows((*key, c), codes == c, x, w)

    def _rows(self, key: Key, chosen: Tensor, x: Tensor, w: Tensor | None) -> None:
        rows = F.pad(x[chosen].to(self.product), (0, 1), value=1.0)
        if w is not None:
            rows = rows * w.to(rows)[:, None].expand(chosen.shape)[chosen].unsqueeze(-1)
        self._gram(key, rows)

    def _gram(self, key: Key, rows: Tensor) -> None:
        if key not in self.moments.grams:
            self.moments.grams[key] = Gram.empty(rows.shape[1] - 1, rows.device)
        self.moments.grams[key].add(rows)

    def _open(self, key: Key, vector: Tensor) -> None:
        self.open[key] = self.open[key] + vector if key in self.open else vector

    def _flush(self, pass_: Pass) -> None:
        """Products of the batch before, once a pass of another one comes."""
        number = int(self.moments.layout.batch[int(pass_.examples[0])])
        if number != self.batch:
            self.finish()
            self.batch = number

    def finish(self) -> None:
        for key, q in self.open_gradients.items():
            assert self.squares is not None
            self.squares.add_gradient(self.moments.squares, key, q)
        for key, total in self.open.items():
            if key[0] == "":
                if float(total[-1]) > 0:
                    self._gram(key, (total / total[-1])[None])
            else:
                self._gram(key, torch.cat([total[:-1], total.new_ones(1)])[None])
        self.open.clear()
        self.open_gradients.clear()

    def _codes(self, pass_: Pass, x: Tensor) -> Tensor:
        """Classes (N, T) of the positions of x."""
        layout = self.moments.layout
        if not self.moments.flagged:
            return torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
        number = int(layout.batch[int(pass_.examples[0])])
        start = int((layout.batch < number).sum())
        return layout.codes[number][(pass_.examples - start).cpu()].to(x.device)

    def _in(self, codes: Tensor, name: str) -> Tensor:
        classes = torch.tensor(sorted(self.moments.sets[name]), device=codes.device)
        return torch.isin(codes, classes)


def _present(codes: Tensor) -> list[int]:
    return codes.unique().tolist()


def _varies(w: Tensor) -> bool:
    return bool((w != w[0]).any())
