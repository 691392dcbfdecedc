"""EK-FAC: K-FAC's eigenbasis with the best eigenvalues in it, E[(U_outᵀ q U_in)²] of per-example gradients q."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab import distributed as processes
from curvlab.capture import Data, Pass, require_reiterable
from curvlab.checksum import digest
from curvlab.curvature.gather import Sums, Vectors, Work, count, gather, scale_of, sum_dtype
from curvlab.curvature.kfac import KFAC, Sharing
from curvlab.curvature.origin import Origin
from curvlab.losses import Labels, Scale
from curvlab.spectrum import Basis, Block, KroneckerBasis, Spectrum, pack_bases, unpack_bases, values_of
from curvlab.storage import load_tensors, parsing, require_sum_of_squares, save_tensors

COLUMNS = 16  # backward passes whose gradients go into one product
PIECE = 2**26  # numbers of per-example gradients at a time


@dataclass(frozen=True)
class EKFAC:
    """EK-FAC of chosen layers; eigenvalues live in one basis, so that fits do not merge across bases.

    Attributes:
        eigen: the spectrum.
        labels: which labels the gradients were taken at.
        scales: loss terms and positions behind it, by layer name.
        origin: of which model, at which weights.
    """

    eigen: Spectrum
    labels: Labels
    scales: dict[str, Scale]
    origin: Origin | None = None

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loss: Any,
        data: Data,
        layers: str | Sequence[str],
        *,
        labels: Labels,
        draws: int = 1,
        seed: int = 0,
        sharing: Sharing = "expand",
        bias: bool = False,
        first_example: int = 0,
        micro_batch: int | None = None,
        checkpoint: str | Path | None = None,
        distributed: bool = False,
        kfac: KFAC | None = None,
        basis: Sequence[KroneckerBasis] | None = None,
    ) -> "EKFAC":
        """Two passes over `data`: K-FAC factors (or `kfac`, given), then true per-example gradients in their basis.

        Arguments as in `KFAC.fit`. With `labels="model"` both passes see the same draws. The first pass keeps its
        checkpoint beside `checkpoint`, its name ending in "-factors", and the eigenvectors theirs, "-basis".
        `basis`: other complete bases to take the eigenvalues in, one a layer; the first pass is not needed then.
        """
        work = Work.of(
            model, loss, data, layers, labels, draws, seed, bias, first_example, micro_batch, checkpoint, distributed
        )
        if labels is None:
            raise ValueError("labels must be 'exact', 'model' or 'data', got None")
        if basis is not None:
            full = {own.layer.name: own for own in basis}
            if [own.layer for own in basis] != [layer.shape for layer in work.layers] or not all(
                own.complete for own in basis
            ):
                raise ValueError("basis must hold a complete basis of each layer, in the model's order")
        else:
            if kfac is None:
                require_reiterable(data)
                path = work.checkpoint
                kfac = KFAC.fit(
                    model, loss, data, layers, labels=labels, draws=draws, seed=seed, sharing=sharing, bias=bias,
                    first_example=first_example, micro_batch=micro_batch, distributed=distributed,
                    checkpoint=None if path is None else path.with_stem(f"{path.stem}-factors"),
                )  # fmt: skip
            elif [f.layer for f in kfac.factors.values()] != [layer.shape for layer in work.layers]:
                raise ValueError("kfac was fitted on other layers")
            full = _bases(kfac, work)
        bases: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in work.layers:
            u_out, u_in = full[layer.name].u_out, full[layer.name].u_in
            like = torch.empty(0, dtype=sum_dtype(layer), device=layer.device)
            bases[layer.name] = (torch.eye(layer.d_out) if u_out is None else u_out).to(like), u_in.to(like)
        sums = work.zeros("EK-FAC eigenvalues", lambda layer: {"squares": (layer.d_out, layer.d_in)})

        def add(sums: Sums, pass_: Pass, vectors: Vectors) -> None:
            inputs = {}
            for layer in work.layers:
                a = pass_.inputs(layer)
                count(sums, layer, pass_.scale(layer, a))
                inputs[layer.name] = a.to(bases[layer.name][1])
            for several in _batched(pass_.gradients(vectors), COLUMNS):
                for name, a in inputs.items():
                    g = torch.stack([by_layer[name].mT for by_layer in several], dim=1).to(a)  # (N, K, d_out, T)
                    add_squares(sums[f"{name}/squares"], g, a, *bases[name])

        # sums of squares mean something in their basis only
        rotations = digest((name, u) for name, pair in bases.items() for u in pair)
        gather(work, sums, add, desc="EK-FAC eigenvalues", identity={"kind": "ekfac", "basis": rotations})
        corrected = []
        for layer in work.layers:
            total = sums[f"{layer.name}/squares"]
            values = (total.double() / scale_of(sums, layer.name).terms).clamp_min(0)
            precision = torch.finfo(total.dtype).eps
            corrected.append(Block(full[layer.name], values, float(values.sum()), precision=precision))
        scales = {layer.name: scale_of(sums, layer.name) for layer in work.layers}
        return cls(Spectrum(tuple(corrected)), labels, scales, work.origin)

    def spectrum(self) -> Spectrum:
        """K-FAC's basis with the corrected eigenvalues."""
        return self.eigen

    def save(self, path: str | Path) -> None:
        """Write basis and eigenvalues to a safetensors file, with a JSON header that says where they come from."""
        tensors, bases = pack_bases([block.basis for block in self.eigen.blocks])
        tensors |= {f"{i}.values": block.values for i, block in enumerate(self.eigen.blocks)}
        blocks = [{"total": block.total, "precision": block.precision} for block in self.eigen.blocks]
        meta = {
            "labels": self.labels,
            "bases": bases,
            "blocks": json.dumps(blocks),
            "scales": json.dumps({name: asdict(scale) for name, scale in self.scales.items()}),
            "origin": Origin.pack(self.origin),
        }
        save_tensors(path, "ekfac", tensors, meta)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "EKFAC":
        """Read what `save` wrote; `model` and errors as in `KFAC.load`."""
        tensors, meta = load_tensors(path, "ekfac")
        with parsing(path):
            blocks = []
            for i, (basis, numbers) in enumerate(
                zip(unpack_bases(tensors, meta["bases"]), json.loads(meta["blocks"]), strict=True)
            ):
                values = values_of(tensors, i, basis)
                require_sum_of_squares(f"{i}.values", values)
                blocks.append(Block(basis, values, **numbers))
            spectrum = Spectrum(tuple(blocks))
            scales = {name: Scale(**scale) for name, scale in json.loads(meta["scales"]).items()}
            return cls(spectrum, meta["labels"], scales, Origin.unpack(meta, model, spectrum.layers))  # type: ignore[arg-type]


def _bases(kfac: KFAC, work: Work) -> dict[str, KroneckerBasis]:
    """K-FAC's eigenvectors by layer name, float64; the same bits on all processes and after an interruption."""
    path, key = None, ""
    if work.checkpoint is not None:
        path = work.checkpoint.with_stem(f"{work.checkpoint.stem}-basis")
        key = digest((name, t) for name, f in kfac.factors.items() for t in (f.a_sum, f.s_sum))
    found: Sequence[Basis] = []
    if path is not None and path.exists():
        tensors, meta = load_tensors(path, "basis")
        with parsing(path):
            found = unpack_bases(tensors, meta["bases"]) if meta["factors"] == key else []
    if not found:
        found = [block.basis for block in kfac.spectrum().blocks]
        if path is not None and (not work.distributed or processes.turn()[0] == 0):
            tensors, bases = pack_bases(found)
            save_tensors(path, "basis", tensors, {"bases": bases, "factors": key})
    out = {}
    for layer, basis in zip(work.layers, found, strict=True):
        basis = basis.map(lambda t, device=layer.device: t.to(device))  # type: ignore[misc]
        assert isinstance(basis, KroneckerBasis)
        out[layer.name] = basis
    if work.distributed:
        processes.same(t for basis in out.values() for t in basis.tensors().values())
    return out


def add_squares(total: Tensor, g: Tensor, a: Tensor, u_out: Tensor, u_in: Tensor) -> None:
    """total += Σ_nk (U_outᵀ Σ_t g_nkt a_ntᵀ U_in)²: g (N, K, d_out, T), a (N, T, d_in).

    Rotates a (and the sum over t by U_out), or the sum over t by both, whichever is cheaper.
    """
    _, K, d_out, T = g.shape
    d_in = a.shape[2]
    if T == 1:
        total.addmm_((g[..., 0] @ u_out).square_().sum(1).mT, (a[:, 0] @ u_in).square_())
        return
    first = T * d_in**2 < K * d_out * d_in**2
    size = max(1, PIECE // (K * d_out * d_in))
    for few, own in zip(g.split(size), a.split(size), strict=True):
        q = few.flatten(1, 2) @ (own @ u_in if first else own)  # (n, K·d_out, d_in), the K columns in one product
        q = q.flatten(0, 1) if first else q.flatten(0, 1) @ u_in
        total += (u_out.mT @ q.view(-1, d_out, d_in)).square_().sum(0)


def _batched(gradients: Iterator[dict[str, Tensor]], n: int) -> Iterator[list[dict[str, Tensor]]]:
    while chunk := list(islice(gradients, n)):
        yield chunk
