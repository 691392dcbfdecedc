"""EK-FAC: K-FAC's eigenbasis with the best eigenvalues in it, E[(U_outᵀ q U_in)²] of per-example gradients q."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.capture import Data, columns, passes, require_reiterable
from curvlab.curvature.kfac import KFAC, Sharing
from curvlab.layers import find_layers
from curvlab.losses import Labels, as_loss
from curvlab.spectrum import Block, KroneckerBasis, Spectrum


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
            rotated = {layer.name: _rotate(pass_.inputs(layer), bases[layer.name][1]) for layer in chosen}
            for gradients in pass_.gradients(columns(pass_, loss, labels, draws, seed)):
                for name, g in gradients.items():
                    add_squares(sums[name], _rotate(g, bases[name][0]), rotated[name])
        corrected = []
        for name, block in blocks.items():
            values = (sums[name].double() / terms).clamp_min(0)
            corrected.append(Block(block.basis, values, float(values.sum())))
        return cls(replace(spectrum, blocks=tuple(corrected)), labels)

    def spectrum(self) -> Spectrum:
        """K-FAC's basis with the corrected eigenvalues."""
        return self.eigen

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file (`Spectrum.save`; the labels are not kept in it)."""
        self.eigen.save(path)


def _rotate(x: Tensor, basis: Tensor) -> Tensor:
    return x.to(basis) @ basis


def add_squares(total: Tensor, g: Tensor, a: Tensor) -> None:
    """total += Σ_n (Σ_t g_t a_tᵀ)²: g (N, T, d_out), a (N, T, d_in), in the eigenbasis."""
    if a.shape[1] == 1:
        total.addmm_(g[:, 0].square().mT, a[:, 0].square())
    else:
        total += (g.mT @ a).square_().sum(0)
