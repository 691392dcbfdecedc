"""Another implementation's factors, masks and updates, held against the reference."""

from curvlab.crosscheck.findings import Finding
from curvlab.crosscheck.report import Report, crosscheck
from curvlab.crosscheck.testing import assert_agrees

__all__ = ["Finding", "Report", "assert_agrees", "crosscheck"]
