"""curvlab: curvature of neural networks, and what constrained descent keeps and loses."""

__version__ = "0.1.0"
