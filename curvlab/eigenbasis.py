"""Descent in the eigenbasis: W = W0 + U_out (M ⊙ Z) U_inᵀ, the mask in the forward pass.

Z is the parameter; whatever an optimiser does to it, the weights never leave the null space (an ellipsoid:
Z is shrunk after each step). With T tokens a step the rotations cost 2 T (d_in² + d_out²) multiply–adds, where
projecting a gradient costs 2 (d_out² d_in + d_out d_in²); the input's rotation can be computed once and cached.

In float32 or better the layer computes U_out (U_outᵀ W0 U_in + M ⊙ Z) U_inᵀ x, without a product with W0 itself; below
that W0 x stays as it is, since W0 would not survive the rotation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from curvlab.descent import DriftRule, Moving, constrained_layers
from curvlab.layers import Conv2dLayer, Matrices, MatrixLayer
from curvlab.projector import Ellipsoid, NullBlock, NullSpace
from curvlab.spectrum import KroneckerBasis


class Eigenbasis(Moving):
    """Layers of a model that descend in the eigenbasis of a constraint; made by `parametrize`.

    Attributes:
        coordinates: Z, one parameter a block of the constraint.
        constraint: the one in force.
        refits: how often the drift rule replaced it.
        start: the weights at the beginning, the centre of an ellipsoid.
    """

    def __init__(self, model: nn.Module, constraint: NullSpace | Ellipsoid) -> None:
        self.layers: list[MatrixLayer] = constrained_layers(model, constraint)
        first = self.layers[0].parameters()[0]
        # Z and the constraint in float32 or better: steps would be lost in bfloat16
        self._dtype, self._device = torch.promote_types(first.dtype, torch.float32), first.device
        self.constraint: NullSpace | Ellipsoid = constraint.to(self._dtype, self._device)
        self.start = {layer.name: layer.matrix().clone() for layer in self.layers}
        self.reference = self.start
        self.coordinates = [
            nn.Parameter(torch.zeros(shape, dtype=self._dtype, device=self._device))
            for shape in self.constraint.coordinate_shapes
        ]
        self.refits = 0
        self.steps = 0
        self._rotated: dict[str, Tensor] = {}
        self._narrow: dict[str, KroneckerBasis] = {}  # eigenvectors in the dtype of a layer below float32
        self._base: dict[str, tuple[list[int], Tensor]] = {}  # U_outᵀ W0 U_in, and the state of W0 that it is of
        self._folded = [torch.zeros_like(Z) for Z in self.coordinates]  # of the displacement already in the weights
        self._optimizer: Optimizer | None = None
        self._step_handle: Any = None
        self._drift_rule: DriftRule | None = None
        self._flags = [(p, p.requires_grad) for layer in self.layers for p in layer.parameters()]
        for p, _ in self._flags:
            p.requires_grad_(False)
        self._replaced: list[nn.Module] = []
        self._handles: list[Any] = []
        self._install()

    def parameters(self) -> list[nn.Parameter]:
        """Z, for an optimiser."""
        return self.coordinates

    def attach(self, optimizer: Optimizer, drift: DriftRule | None = None) -> "Eigenbasis":
        """Let an optimiser over `parameters()` obey an ellipsoid and the drift rule.

        Raises:
            ValueError: an optimiser that does not move Z, or moves other parameters too.
        """
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if moved != {id(Z) for Z in self.coordinates}:
            raise ValueError(
                "the optimiser must move exactly the eigenbasis coordinates: Optimizer(eigenbasis.parameters())"
            )
        if isinstance(optimizer, torch.optim.LBFGS) and not self.constraint.linear:
            raise ValueError("LBFGS relies on its step having been taken in full; an ellipsoid would shorten it")
        self._optimizer, self._drift_rule = optimizer, drift
        self._step_handle = optimizer.register_step_post_hook(lambda *_: self._post())
        return self

    def matrices(self) -> Matrices:
        """The weights as they stand, W0 + U (M ⊙ Z) Uᵀ."""
        with torch.no_grad():
            delta = self.constraint.displacement(self.coordinates)
        return {layer.name: layer.matrix() + delta[layer.name] for layer in self.layers}

    def check_drift(self) -> bool:
        """Refit if the weights have drifted; whether they had. The refit sees the merged weights."""
        if self._drift_rule is None or self.drift() <= self._drift_rule.threshold:
            return False
        self.fold()
        with self._paused():
            constraint = self._drift_rule.refit()
        self.replace(constraint)
        self.refits += 1
        return True

    def fold(self) -> None:
        """Add the displacement to the weights and set Z to zero."""
        merged = self.matrices()
        for layer in self.layers:
            layer.write(merged[layer.name])
        with torch.no_grad():
            for Z in self.coordinates:
                Z.zero_()
        self._folded = self.constraint.coordinates(self.displacement())

    def replace(self, constraint: NullSpace | Ellipsoid) -> None:
        """Go on in another eigenbasis. SGD's momentum is rotated into it; other optimisers start afresh."""
        old = self.constraint
        self.fold()
        self.constraint = constraint.to(self._dtype, self._device)
        self._remove()
        self._install()
        self.reference = self.matrices()
        self._folded = self.constraint.coordinates(self.displacement())
        optimizer = self._optimizer
        if optimizer is None:
            return
        buffers = [optimizer.state.get(Z, {}).get("momentum_buffer") for Z in self.coordinates]
        if isinstance(optimizer, SGD) and all(b is not None for b in buffers):
            moved = self.constraint.coordinates(old.displacement(buffers))
            for Z, new in zip(self.coordinates, moved, strict=True):
                optimizer.state[Z]["momentum_buffer"] = new
        else:
            optimizer.state.clear()

    def merge(self) -> None:
        """Write the displacement into the weights and leave the model as a plain one."""
        self.fold()
        self._remove()
        if self._step_handle is not None:
            self._step_handle.remove()
        for p, flag in self._flags:
            p.requires_grad_(flag)

    def rotate_input(self, layer: str, x: Tensor) -> Tensor:
        """x U_in of a layer's inputs (…, d_in), to be computed once and handed to `use_rotated` batch by batch."""
        block, found = self._block(layer)
        if not _rotates(found, block):
            raise ValueError(f"{layer!r}: only a linear layer in a complete Kronecker basis has rotated inputs")
        return _rotate(x, self._basis(found, block, x.dtype).u_in, found.bias)

    def use_rotated(self, layer: str, rotated: Tensor) -> None:
        """Let the next forward pass through `layer` use `rotated` = `rotate_input(layer, x)` of its input x."""
        self._rotated[layer] = rotated

    def _block(self, name: str) -> tuple[Any, MatrixLayer]:
        for block in self.constraint.blocks:
            for shape in block.basis.layers:
                if shape.name == name:
                    return block, next(layer for layer in self.layers if layer.name == name)
        raise ValueError(f"no constrained layer {name!r}; layers: {[layer.name for layer in self.layers]}")

    def _install(self) -> None:
        """Put the layers' forward passes into the eigenbasis."""
        self._base.clear()
        self._narrow.clear()
        for layer in self.layers:
            block, _ = self._block(layer.name)
            wide = layer.parameters()[0].dtype == self._dtype
            if _rotates(layer, block) and wide and "forward" not in vars(layer.module):  # (accelerate puts one there)
                layer.module.forward = self._forward(layer, block)
                self._replaced.append(layer.module)
            else:
                self._handles.append(layer.module.register_forward_hook(self._hook(layer, block)))

    def _remove(self) -> None:
        """The layers compute as they did."""
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        self._handles, self._replaced = [], []

    def _forward(self, layer: MatrixLayer, block: Any) -> Callable[[Tensor], Tensor]:
        """In place of the layer's own: U_out (U_outᵀ W0 U_in + M ⊙ Z) U_inᵀ x, rotating x once for W0 and Z."""
        index = self._index(block)
        u_out = block.basis.u_out

        def forward(x: Tensor) -> Tensor:
            Z, base = self.coordinates[index], self._rotated_weight(layer, block)
            W = torch.where(block.removed, base, base + Z) if isinstance(block, NullBlock) else base + Z
            s = self._rotated_input(layer, block, x) @ W.mT
            s = s if u_out is None else s @ u_out.mT
            bias = cast(Tensor | None, layer.module.bias)
            return s if layer.bias or bias is None else s + bias

        return forward

    def _hook(self, layer: MatrixLayer, block: Any) -> Any:
        """The layer's own output plus that of the displacement."""
        index = self._index(block)

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            if not _rotates(layer, block):
                delta = self.constraint.displacement(self.coordinates)[layer.name]
                return output + _apply(layer, delta.to(x.dtype), x)
            Z: Tensor = self.coordinates[index]
            if isinstance(block, NullBlock):
                Z = Z * ~block.removed
            s = self._rotated_input(layer, block, x) @ Z.mT.to(x.dtype)
            u_out = self._basis(layer, block, x.dtype).u_out
            return output + (s if u_out is None else s @ u_out.mT)

        return add

    def _index(self, block: Any) -> int:
        return [b is block for b in self.constraint.blocks].index(True)

    def _rotated_input(self, layer: MatrixLayer, block: Any, x: Tensor) -> Tensor:
        """x U_in, or what `use_rotated` left for it."""
        rotated = self._rotated.pop(layer.name, None)
        if rotated is None:
            return _rotate(x, self._basis(layer, block, x.dtype).u_in, layer.bias)
        if rotated.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"{layer.name!r}: rotated inputs {tuple(rotated.shape)} are not of x {tuple(x.shape)}")
        return rotated

    def _rotated_weight(self, layer: MatrixLayer, block: Any) -> Tensor:
        """U_outᵀ W0 U_in, anew when W0 was written to."""
        state = [version for p in layer.parameters() for version in (p.data_ptr(), p._version)]
        known = self._base.get(layer.name)
        if known is None or known[0] != state:
            with torch.no_grad():
                known = state, block.basis.rotate({layer.name: layer.matrix()})
            self._base[layer.name] = known
        return known[1]

    def _basis(self, layer: MatrixLayer, block: Any, dtype: torch.dtype) -> KroneckerBasis:
        """The eigenvectors in the dtype that a layer computes in."""
        basis: KroneckerBasis = block.basis
        if basis.u_in.dtype == dtype:
            return basis
        known = self._narrow.get(layer.name)
        if known is None or known.u_in.dtype != dtype:
            known = self._narrow[layer.name] = basis.map(lambda t: t.to(dtype))
        return known

    def _post(self) -> None:
        if isinstance(self.constraint, Ellipsoid):
            with torch.no_grad():
                # displacement counts from θ0: what was folded in at refits is still spent
                whole = [Z + spent for Z, spent in zip(self.coordinates, self._folded, strict=True)]
                allowed = self.constraint.confine_coordinates(whole)
                for Z, value, spent in zip(self.coordinates, allowed, self._folded, strict=True):
                    Z.copy_(value - spent)
        self.steps += 1
        rule = self._drift_rule
        if rule is not None and rule.every and self.steps % rule.every == 0:
            self.check_drift()

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """The model without the parametrization, for a refit."""
        self._remove()
        try:
            yield
        finally:
            self._install()


def _rotates(layer: MatrixLayer, block: Any) -> bool:
    """Whether Z stands in the eigenbasis itself: W's own coordinates else."""
    return isinstance(block.basis, KroneckerBasis) and block.basis.complete and not isinstance(layer, Conv2dLayer)


def _rotate(x: Tensor, u_in: Tensor, bias: bool) -> Tensor:
    return x @ u_in[:-1] + u_in[-1] if bias else x @ u_in


def _apply(layer: MatrixLayer, delta: Tensor, x: Tensor) -> Tensor:
    """The layer's response to x with ΔW in place of W."""
    tensors = layer.tensors(delta)
    if isinstance(layer, Conv2dLayer):
        conv = cast(nn.Conv2d, layer.module)
        return conv._conv_forward(x, tensors[0], tensors[1] if layer.bias else None)
    W = delta[:, :-1] if layer.bias else delta
    return F.linear(x, W, delta[:, -1] if layer.bias else None)


def parametrize(model: nn.Module, constraint: NullSpace | Ellipsoid) -> Eigenbasis:
    """Let the constraint's layers descend in its eigenbasis, until `merge`.

    The optimiser moves `Eigenbasis.parameters()`; `Eigenbasis.attach(optimizer)` is needed for an ellipsoid or
    the drift rule. The layers' own weights are frozen meanwhile. A null space that knows only the removed
    eigenvectors takes Z in W's own coordinates, W = W0 + P Z.
    """
    return Eigenbasis(model, constraint)
