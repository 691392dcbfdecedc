"""ROME (Meng et al. 2022, arXiv 2202.05262): one rank-one update a request that writes a value v* at a key k."""

from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.editing.job import Job, editor
from curvlab.editing.locating import cholesky, damped, descend_on_values, lookup_of, trained_layers, usable_layers
from curvlab.editing.lookup import sample_prefixes
from curvlab.editing.reading import read
from curvlab.editing.values import Locating, Site


@dataclass(frozen=True)
class ROME(Locating):
    """Rank-one edits of one layer, one request after another.

    `batch_size` requests find their values at the same weights; 1 is the paper's.
    """

    batch_size: int = 1
    lr: float = 0.5
    decay: float = 1e-3
    clamp: float = 4.0


@editor("rome", ROME)
def rome(job: Job, options: ROME) -> None:
    """ROME: W += (v* − W k)(C⁻¹k)ᵀ / kᵀC⁻¹k in the middle one of the edited layers, request after request."""
    names = usable_layers(job, options)
    names = [names[(len(names) - 1) // 2]]
    job.matrix_layers(names)
    capability = job.needs_capability()
    covariance = job.timed(capability.statistics, job.model, job.tokenizer, names, "covariance")
    (layer,) = trained_layers(job, names)
    L = cholesky(damped(covariance.moments[layer.name].A, options.damping))
    prefixes = sample_prefixes(job.model, job.tokenizer, options.prefixes, options.prefix_length, job.seed)
    for start in range(0, len(job.requests), options.batch_size):
        look = lookup_of(job, job.requests[start : start + options.batch_size], prefixes, options)
        values = descend_on_values(job, Site(layer.module, layer.name), look, options)
        inputs, _ = read(job.model, look.batch, look.positions, [layer])
        keys = look.mean(inputs[layer.name])
        wanted = keys @ layer.matrix().double().mT + values.shifts.double()
        for k, v in zip(keys, wanted, strict=True):
            W = layer.matrix().double()
            layer.write(W + rank_one(W, k, v, L))


def rank_one(W: Tensor, k: Tensor, v: Tensor, L: Tensor) -> Tensor:
    """The ΔW with (W + ΔW) k = v of least tr(ΔW C ΔWᵀ), C = L Lᵀ (d_in, d_in): (v − W k) uᵀ / kᵀu, u = C⁻¹k."""
    u = torch.cholesky_solve(k.unsqueeze(1), L).squeeze(1)
    return torch.outer(v - W @ k, u / (k @ u))
