"""Data for the studies."""

from curvlab.data.embedded import embedded_digits, embedded_letters
from curvlab.data.vision import ImagePair, ImageSet, load_pair, subset

__all__ = ["ImagePair", "ImageSet", "embedded_digits", "embedded_letters", "load_pair", "subset"]
