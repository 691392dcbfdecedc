"""Leading eigenpairs of a symmetric operator that is known by its products only.

Block Lanczos with full reorthogonalisation: the Krylov space grows until the pairs asked for have
converged, and it can grow on when more are asked for. Eigenvalues are ordered by magnitude.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MatMat = Callable[[Tensor], Tensor]  # (b, dim) rows → (b, dim): the operator applied to each row


@dataclass(frozen=True)
class Eigenpairs:
    """Leading eigenpairs, descending in magnitude.

    Attributes:
        values: (r,) float64.
        vectors: (dim, r), orthonormal columns.
        residuals: (r,) norms ‖C u − σ u‖, float64.
        products: matrix–vector products spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


class BlockLanczos:
    """A growing Krylov space of a symmetric operator.

    A start of w vectors finds w copies of an eigenvalue: where w are found the start is widened.
    """

    def __init__(
        self,
        matmat: MatMat,
        dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        block: int = 16,
        seed: int = 0,
    ) -> None:
        self.matmat, self.dim, self.dtype, self.device = matmat, dim, dtype, torch.device(device)
        self.block = min(block, dim)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows = torch.empty(0, dim, dtype=dtype, device=device)  # the basis, one vector a row
        self.size = 0
        self.projected = torch.zeros(0, 0, dtype=torch.float64)  # QᵀCQ
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)  # of the next block with the last
        self.next = self._orthonormal(torch.zeros(self.block, dim, dtype=dtype, device=device))
        self.width = self.block  # random vectors that the space grew from

    def _orthonormal(self, rows: Tensor) -> Tensor:
        """Rows orthonormal and orthogonal to the basis; rows lost to rank are replaced by random ones."""
        q, r = torch.linalg.qr(rows.mT)
        scale = float(self.projected.abs().max()) if self.size else 0.0
        lost = r.diagonal().abs() <= 100 * torch.finfo(self.dtype).eps * scale
        noise = torch.randn(int(lost.sum()), self.dim, generator=self.generator, dtype=torch.float64)
        rows = q.mT.clone()
        rows[lost] = torch.nn.functional.normalize(noise.to(rows))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            rows = torch.linalg.qr((rows - (rows @ self.basis.mT) @ self.basis).mT)[0].mT
        return rows

    def _widen(self) -> None:
        """Random vectors join the next block, for further copies of repeated eigenvalues."""
        noise = torch.randn(self.block, self.dim, generator=self.generator, dtype=torch.float64).to(self.rows)
        known = torch.cat([self.basis, self.next])[: self.dim]
        for _ in range(2):
            noise = torch.linalg.qr((noise - (noise @ known.mT) @ known).mT)[0].mT
        self.next = torch.cat([self.next, noise])  # (orthogonal to what couples: residuals stay as they are)
        self.width += self.block

    @property
    def basis(self) -> Tensor:
        return self.rows[: self.size]

    @property
    def exhausted(self) -> bool:
        return self.size >= self.dim

    def extend(self, dimensions: int) -> None:
        """Grow the space by at least `dimensions`."""
        goal = min(self.dim, self.size + dimensions)
        if goal + len(self.next) > len(self.rows):
            grown = torch.empty(goal + len(self.next), self.dim, dtype=self.dtype, device=self.device)
            grown[: self.size] = self.basis
            self.rows = grown
        while self.size < goal:
            block = self.next[: self.dim - self.size]
            start, b = self.size, len(block)
            self.rows[start : start + b] = block
            self.size += b
            image = self.matmat(block).to(self.dtype)
            coefficients = image @ self.basis.mT
            rest = image - coefficients @ self.basis
            rest -= (rest @ self.basis.mT) @ self.basis
            projected = torch.zeros(self.size, self.size, dtype=torch.float64)
            projected[:start, :start] = self.projected
            projected[start:] = coefficients.cpu().double()
            projected[:, start:] = projected[start:].mT.clone()
            self.projected = projected
            if self.exhausted:
                self.coupling = torch.zeros(0, b, dtype=torch.float64)
                break
            self.next = self._orthonormal(rest)
            self.coupling = (self.next @ rest.mT).cpu().double()  # ‖coupling y‖ is the residual of a Ritz pair

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,) descending in magnitude, coordinates (m, m), residual norms (m,)."""
        projected = (self.projected + self.projected.mT) / 2
        values, coordinates = torch.linalg.eigh(projected)
        order = values.abs().argsort(descending=True, stable=True)
        values, coordinates = values[order], coordinates[:, order]
        last = self.coupling.shape[1]
        residuals = torch.linalg.vector_norm(self.coupling @ coordinates[self.size - last :], dim=0)
        return values, coordinates, residuals

    def solve(
        self, enough: Callable[[Tensor], bool], tolerance: float | None = None, limit: float | None = None
    ) -> Eigenpairs:
        """Grow until `enough(values)` holds for the leading converged values; the pair after them too.

        Args:
            enough: given the converged leading values (float64, descending in magnitude), whether they do.
            tolerance: residual, relative to the largest |σ|, that counts as converged.
            limit: give up, with what has converged, once the space is larger than this.
        """
        eps = torch.finfo(self.dtype).eps
        tolerance = max(50 * eps, 1e-10) if tolerance is None else tolerance
        if self.size == 0:
            self.extend(2 * self.block)
        while True:
            values, coordinates, residuals = self.ritz()
            bad = (residuals > tolerance * values.abs().max()).nonzero()
            converged = self.size if self.exhausted or not len(bad) else int(bad[0])
            # a converged pair below those asked for shows where the last eigenspace ends
            final = self.exhausted or (limit is not None and self.size > limit)
            done = final or (converged > 1 and enough(values[: clear(values[:converged], eps)]))
            # (float32 cannot tell repeated eigenvalues from the close ones of a dense tail, which need no widening)
            repeated = self.dtype == torch.float64 and largest_cluster(values[:converged], 1e-12) >= self.width
            if done and not final and repeated:
                self._widen()
            elif done:
                count = self.size if self.exhausted else converged
                vectors = self.basis.mT @ coordinates[:, :count].to(self.basis)
                return Eigenpairs(values[:count], vectors, residuals[:count], self.size)
            self.extend(max(self.block, self.size // 5))


def clear(values: Tensor, eps: float) -> int:
    """How many leading values (descending in magnitude) lie clearly above the last one, as null spaces see ties."""
    sizes = values.abs()
    if not len(sizes):
        return 0
    return int((sizes - (16 * eps * sizes[0]).minimum(1e-3 * sizes) > sizes[-1]).sum())


def largest_cluster(values: Tensor, tolerance: float) -> int:
    """The largest number of values, other than zero, that agree up to `tolerance` of the largest magnitude."""
    width = tolerance * float(values.abs().max()) if len(values) else 0.0
    ordered = values[values.abs() > width].sort().values
    if not len(ordered):
        return 0
    edges = (ordered.diff() > width).nonzero().flatten() + 1
    return int(torch.tensor([0, *edges.tolist(), len(ordered)]).diff().max())


def absolute_trace(
    matmat: MatMat,
    dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    deflate: Tensor | None = None,
    probes: int = 16,
    steps: int = 40,
    seed: int = 0,
) -> tuple[float, float]:
    """Σ|σ| of a symmetric operator by stochastic Lanczos quadrature, and its standard error.

    Args:
        deflate: (dim, r) orthonormal eigenvectors to leave out; the estimate is of the rest of the spectrum.
    """
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randint(0, 2, (probes, dim), generator=generator) * 2 - 1).to(dtype=dtype, device=device)
    if deflate is not None:
        z = z - (z @ deflate) @ deflate.mT
    norms = torch.linalg.vector_norm(z, dim=1)
    rank = dim if deflate is None else dim - deflate.shape[1]
    steps = min(steps, rank)
    if steps < 1 or float(norms.max()) == 0.0:
        return 0.0, 0.0
    basis = torch.zeros(probes, steps, dim, dtype=dtype, device=device)
    alpha = torch.zeros(probes, steps, dtype=torch.float64)
    beta = torch.zeros(probes, steps, dtype=torch.float64)
    q = z / norms.clamp_min(torch.finfo(dtype).tiny)[:, None]
    for j in range(steps):
        basis[:, j] = q
        w = matmat(q).to(dtype)
        if deflate is not None:
            w = w - (w @ deflate) @ deflate.mT
        alpha[:, j] = (w * q).sum(1).cpu().double()
        for _ in range(2):
            w = w - torch.einsum("pj,pjd->pd", torch.einsum("pd,pjd->pj", w, basis[:, : j + 1]), basis[:, : j + 1])
        length = torch.linalg.vector_norm(w, dim=1)
        beta[:, j] = length.cpu().double()
        alive = beta[:, j] > 100 * torch.finfo(dtype).eps * alpha.abs().amax(1)
        beta[~alive, j] = 0.0  # an invariant subspace: the quadrature is exact from here
        q = torch.where(alive.to(w.device)[:, None], w / length.clamp_min(torch.finfo(dtype).tiny)[:, None], 0.0)
    tridiagonal = torch.diag_embed(alpha)
    off = torch.diag_embed(beta[:, :-1], offset=1) if steps > 1 else 0.0
    tridiagonal = tridiagonal + off + (off.mT if isinstance(off, Tensor) else 0.0)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    estimates = norms.cpu().double() ** 2 * (vectors[:, 0, :] ** 2 * nodes.abs()).sum(1)
    return float(estimates.mean()), float(estimates.std() / probes**0.5) if probes > 1 else float("nan")
