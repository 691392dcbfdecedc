"""The order at which one quantity vanishes with another."""

from torch import Tensor


def order(x: Tensor, y: Tensor) -> float:
    """Least-squares slope of log y in log x."""
    u, v = x.log(), y.log()
    u = u - u.mean()
    return float((u * v).sum() / u.square().sum())
