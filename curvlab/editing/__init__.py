"""Editors of language models behind one call."""

from curvlab.editing.capability import Capability
from curvlab.editing.job import EditedModel, Editor, Job, default_layers, edit, editor, editors, output_projections
from curvlab.editing.training import Training

__all__ = [
    "Capability", "EditedModel", "Editor", "Job", "Training", "default_layers", "edit", "editor", "editors",
    "output_projections",
]  # fmt: skip
