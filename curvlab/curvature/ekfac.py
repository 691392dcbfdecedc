"""EK-FAC: K-FAC's eigenbasis with the best eigenvalues in it, E[(U_outᵀ q U_in)²] of per-example gradients q."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Data, columns, passes, require_reiterable
from curvlab.curvature.kfac import KFAC, Sharing
from curvlab.layers import find_layers
from curvlab.losses import Labels, as_loss
from curvlab.spectrum import Block, KroneckerBasis, Spectrum

COLUMNS = 16  # backward passes whose gradients go into one product


@dataclass(frozen=True)
class EKFAC:
    """EK-FAC of chosen layers; eigenvalues live in one basis, so that fits do not merge across bases."""

    eigen: Spectrum
    labels: Labels

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
        kfac: KFAC | None = None,
    ) -> "EKFAC":
        """Two passes over `data`: K-FAC factors (or `kfac`, given), then true per-example gradients in their basis.

        Arguments as in `KFAC.fit`. With `labels="model"` both passes see the same draws.
        """
        loss = as_loss(loss)
        chosen = find_layers(model, layers, bias)
        if kfac is None:
            require_reiterable(data)
            kfac = KFAC.fit(
                model, loss, data, layers, labels=labels, draws=draws, seed=seed, sharing=sharing, bias=bias,
                first_example=first_example, micro_batch=micro_batch,
            )  # fmt: skip
        elif [f.layer for f in kfac.factors.values()] != [layer.shape for layer in chosen]:
            raise ValueError("kfac was fitted on other layers")
        spectrum = kfac.spectrum()
        blocks = {layer.name: block for layer, block in zip(chosen, spectrum.blocks, strict=True)}
        bases: dict[str, tuple[Tensor, Tensor]] = {}
        sums: dict[str, Tensor] = {}
        for layer in chosen:
            dtype = torch.promote_types(layer.parameters()[0].dtype, torch.float32)
            basis = blocks[layer.name].basis
            assert isinstance(basis, KroneckerBasis)
            assert basis.u_out is not None
            bases[layer.name] = basis.u_out.to(dtype), basis.u_in.to(dtype)
            sums[layer.name] = torch.zeros(layer.d_out, layer.d_in, dtype=dtype, device=basis.u_in.device)
        terms = 0
        for pass_ in passes(
            model,
            loss,
            data,
            chosen,
            desc="EK-FAC eigenvalues",
            first_example=first_example,
            micro_batch=micro_batch,
        ):
            terms += pass_.terms
            inputs = {layer.name: pass_.inputs(layer).to(bases[layer.name][1]) for layer in chosen}
            for several in _batched(pass_.gradients(columns(pass_, loss, labels, draws, seed)), COLUMNS):
                for layer in chosen:
                    g = torch.stack([gradients[layer.name].mT for gradients in several], dim=1)  # (N, K, d_out, T)
                    add_squares(sums[layer.name], g.to(inputs[layer.name]), inputs[layer.name], *bases[layer.name])
        corrected = []
        for name, block in blocks.items():
            values = (sums[name].double() / terms).clamp_min(0)
            precision = torch.finfo(sums[name].dtype).eps
            corrected.append(Block(block.basis, values, float(values.sum()), precision=precision))
        return cls(replace(spectrum, blocks=tuple(corrected)), labels)

    def spectrum(self) -> Spectrum:
        """K-FAC's basis with the corrected eigenvalues (`Spectrum.save` keeps it)."""
        return self.eigen


def add_squares(total: Tensor, g: Tensor, a: Tensor, u_out: Tensor, u_in: Tensor) -> None:
    """total += Σ_nk (U_outᵀ Σ_t g_nkt a_ntᵀ U_in)²: g (N, K, d_out, T), a (N, T, d_in).

    Rotates a (and the sum over t by U_out), or the sum over t by both, whichever is cheaper.
    """
    N, K, d_out, T = g.shape
    d_in = a.shape[2]
    if T == 1:
        total.addmm_((g[..., 0] @ u_out).square_().sum(1).mT, (a[:, 0] @ u_in).square_())
        return
    first = T * d_in**2 < K * d_out * d_in**2
    q = g.flatten(1, 2) @ (a @ u_in if first else a)  # (N, K·d_out, d_in), the K columns in one product
    q = q.flatten(0, 1) if first else q.flatten(0, 1) @ u_in
    total += (u_out.mT @ q.view(N * K, d_out, d_in)).square_().sum(0)


def _batched(gradients: Iterator[dict[str, Tensor]], n: int) -> Iterator[list[dict[str, Tensor]]]:
    while chunk := list(islice(gradients, n)):
        yield chunk
