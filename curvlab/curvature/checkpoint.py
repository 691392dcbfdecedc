"""Fits that survive an interruption: their sums so far and how far they came, in one file."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvlab.capture import Batch
from curvlab.storage import load_tensors, parsing, require_shape, save_tensors

SECONDS = 5.0  # between two saves, and at least `PATIENCE` times what a save takes
PATIENCE = 20


class Checkpoint:
    """The file of one pass: sums, the number of micro-batches in them, and a hash of these micro-batches.

    A finished pass stays in its file, and a repetition takes its sums from there; delete the file when the
    statistics are saved.

    Args:
        path: of the file.
        identity: what the fit is; a file of another one is refused.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.done, self.expected = 0, ""
        self.seen, self.digest = 0, hashlib.sha256()
        self.saved = time.perf_counter()
        self.took = 0.0

    def restore(self, sums: dict[str, Tensor]) -> None:
        """Put what was saved, if anything was, into `sums` (in place; tensors they lack are added).

        Raises:
            ValueError: a file that is damaged, no checkpoint, or one of another fit.
        """
        if not self.path.exists():
            return
        tensors, header = load_tensors(self.path, "checkpoint")
        with parsing(self.path):
            before = dict(json.loads(header["identity"]))
            done, expected = int(header["micro_batches"]), header["data"]
        other = sorted(k for k in before | self.identity if before.get(k) != self.identity.get(k))
        if other:
            pairs = "; ".join(f"{k}: {before.get(k)!r} there, {self.identity.get(k)!r} here" for k in other)
            raise ValueError(f"{self.path} is a checkpoint of another fit ({pairs}); delete it or name another file")
        with parsing(self.path):
            for name in sums:
                require_shape(name, tensors[name], tuple(sums[name].shape))
            for name, t in tensors.items():
                if name in sums:
                    sums[name].copy_(t)
                else:
                    sums[name] = t.to(sums[name.split("/")[0] + "/A"].device)
        self.done, self.expected = done, expected

    def known(self, number: int, batch: Batch) -> bool:
        """Whether micro-batch `number` is in the sums already.

        Raises:
            ValueError: the data up to here are not those of the checkpoint.
        """
        update(self.digest, batch)
        self.seen = number + 1
        if self.seen == self.done and self.digest.hexdigest() != self.expected:
            raise ValueError(
                f"{self.path} was made on other data (or other batches of them); delete it or name another file"
            )
        return number < self.done

    def tick(self, sums: dict[str, Tensor]) -> None:
        """Between two micro-batches: save, if it is time."""
        if time.perf_counter() - self.saved >= max(SECONDS, PATIENCE * self.took):
            self._save(sums)

    def finish(self, sums: dict[str, Tensor]) -> None:
        """After the last micro-batch.

        Raises:
            ValueError: the data ended before the place where the checkpoint was made.
        """
        if self.seen < self.done:
            raise ValueError(f"{self.path} was made on more data than there are now; delete it or name another file")
        if self.seen > self.done:
            self._save(sums)

    def _save(self, sums: dict[str, Tensor]) -> None:
        started = time.perf_counter()
        header = {
            "identity": json.dumps(self.identity),
            "micro_batches": str(self.seen),
            "data": self.digest.hexdigest(),
        }
        save_tensors(self.path, "checkpoint", sums, header)
        self.saved = time.perf_counter()
        self.took = self.saved - started


def update(digest: Any, value: Any) -> None:
    """Add a batch, or whatever tensors are nested in one, to a running hash."""
    if isinstance(value, Batch):
        value = (value.inputs, value.targets, value.mask)
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        for key in sorted(value):
            digest.update(key.encode())
            update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            update(digest, part)
    else:
        digest.update(repr(value).encode())
