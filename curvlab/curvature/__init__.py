"""The five curvatures; each is one file that ends in a `Spectrum`."""

from curvlab.curvature.covariance import Covariance
from curvlab.curvature.ekfac import EKFAC
from curvlab.curvature.gauss_newton import GaussNewton
from curvlab.curvature.hessian import Hessian
from curvlab.curvature.kfac import KFAC

__all__ = ["EKFAC", "KFAC", "Covariance", "GaussNewton", "Hessian"]
