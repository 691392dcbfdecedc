"""One file an editor; `curvlab.editing.editors()` finds every file here."""
