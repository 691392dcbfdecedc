"""What keys and file names claim: which layer, which role, how many samples. Claims, to be held against evidence."""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Literal

from curvlab.crosscheck.parts import Role

Claim = Role | Literal["removed", "weight", "vectors", "values", "factor", "count", "count_out", "ignored", "bias"]

# claims that leave the side open
OPEN: dict[Claim, tuple[Role, Role]] = {
    "factor": ("A", "S"), "vectors": ("U_in", "U_out"), "values": ("values_in", "values_out"),
}  # fmt: skip

# By the last part of a key, in small letters. "factor", "vectors" and "values" leave the side open.
KEYS: dict[str, Claim] = {
    # the authors, K-FAC papers and libraries
    "a": "A", "aa": "A", "a_cov": "A", "cov_a": "A", "m_aa": "A", "a_sum": "A", "factor_a": "A", "a_factor": "A",
    "activation_covariance": "A", "input_covariance": "A", "input_covariances": "A", "mom2.mom2": "A", "mom2": "A",
    "cov_in": "A", "c_in": "A", "input_factor": "A", "covariance": "A", "cov": "A",
    "b": "S", "s": "S", "g": "S", "gg": "S", "m_gg": "S", "s_sum": "S", "g_cov": "S", "cov_g": "S", "factor_g": "S",
    "factor_b": "S", "factor_s": "S", "b_factor": "S", "s_factor": "S", "g_factor": "S", "cov_s": "S", "cov_b": "S",
    "gradient_covariance": "S", "gradient_covariances": "S", "cov_out": "S", "output_factor": "S",
    "ua": "U_in", "u_a": "U_in", "u_in": "U_in", "qa": "U_in", "q_a": "U_in", "va": "U_in", "v_a": "U_in",
    "activation_eigenvectors": "U_in", "input_covariances_eigenvectors": "U_in", "eigvecs_a": "U_in",
    "ub": "U_out", "u_b": "U_out", "us": "U_out", "u_s": "U_out", "u_out": "U_out", "qg": "U_out", "q_g": "U_out",
    "qs": "U_out", "q_s": "U_out", "ug": "U_out", "u_g": "U_out", "vg": "U_out", "v_g": "U_out",
    "gradient_eigenvectors": "U_out", "gradient_covariances_eigenvectors": "U_out", "eigvecs_g": "U_out",
    "activation_eigenvalues": "values_in", "values_in": "values_in", "la": "values_in", "lambda_a": "values_in",
    "da": "values_in", "d_a": "values_in", "ea": "values_in", "eigvals_a": "values_in", "lam_a": "values_in",
    "lambda_in": "values_in", "l_a": "values_in", "s_a": "values_in", "sa": "values_in",
    "gradient_eigenvalues": "values_out", "values_out": "values_out", "lg": "values_out", "lambda_g": "values_out",
    "lb": "values_out", "lambda_b": "values_out", "dg": "values_out", "d_g": "values_out", "lambda_s": "values_out",
    "ls": "values_out", "eigvals_g": "values_out", "lam_g": "values_out", "lambda_out": "values_out",
    "l_b": "values_out", "l_g": "values_out", "db": "values_out", "eigvals_b": "values_out", "lam_b": "values_out",
    "lambda_matrix": "eigenvalues", "corrected_eigenvalues": "eigenvalues", "products": "eigenvalues",
    "lambda": "eigenvalues", "ekfac_eigenvalues": "eigenvalues", "squares": "eigenvalues",
    "values": "values", "eigenvalues": "values", "eigvals": "values",
    "vectors": "vectors", "eigenvectors": "vectors", "eigvecs": "vectors", "u": "vectors", "q": "vectors",
    "m": "mask", "mask": "mask", "keep": "mask", "kept": "mask", "removed": "removed",
    "p": "projector", "projector": "projector", "projection": "projector", "null_space_project": "projector",
    "null_space_projector": "projector", "proj": "projector",
    "weight": "weight", "w": "weight", "bias": "bias",
    "base": "base", "before": "base", "w0": "base", "original": "base", "pre": "base",
    "edited": "edited", "after": "edited", "post": "edited",
    "gradient": "gradient", "grad": "gradient", "grads": "gradient", "gradients": "gradient",
    "update": "update", "updates": "update", "delta": "update", "step": "update", "displacement": "update",
    "delta_w": "update", "upd_matrix": "update",
    "n": "count", "count": "count", "mom2.count": "count", "n_tokens": "count", "num_tokens": "count",
    "n_samples": "count", "positions": "count", "num_activation_covariance_processed": "count",
    "num_samples": "count",
    "num_gradient_covariance_processed": "count_out", "terms": "count_out",
    "num_lambda_processed": "ignored", "energy": "ignored", "threshold": "ignored", "sample_size": "ignored",
    "mom2.constructor": "ignored", "constructor": "ignored", "cached_activations": "ignored",
}  # fmt: skip
SUMS = (
    "mom2.mom2",
    "mom2",
    "activation_covariance",
    "gradient_covariance",
    "a_sum",
    "s_sum",
)  # divided by their counts

# words of file names that name no layer
NOISE = {
    "factors", "factor", "kfac", "ekfac", "cache", "caches", "stats", "statistics", "masks", "projectors",
    "covariances",
    "float32", "float64", "float16", "bfloat16", "fp32", "weights", "model", "tensors", "null", "space", "project",
    "projection_cache", "eigen", "out", "in", "state", "dict", "checkpoint", "data", "new", "old",
    "layer",
}  # fmt: skip

STATISTICS = re.compile(
    r"^(?P<layer>.+?)_(?P<dtype>b?float\d+)_(?P<kind>[a-z0-9-]+?)(?:_t\d+)?(?:_(?P<n>\d+|all))?$", re.IGNORECASE
)
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+){2,}")


def role_of_key(key: str) -> tuple[Claim | None, str]:
    """What a key claims and what is left of it as the name of a layer: "fc2/Ua" -> ("U_in", "fc2")."""
    pieces = [piece for piece in key.split("/") if piece]
    for i in reversed(range(len(pieces))):
        claim = KEYS.get(pieces[i].lower())
        if claim is not None:
            return claim, _layer("/".join(pieces[:i] + pieces[i + 1 :]))
    if pieces:
        names = pieces[-1].split(".")
        for length in (2, 1):  # "mom2.mom2", then "fc2.A"
            claim = KEYS.get(".".join(names[-length:]).lower()) if len(names) > length else None
            if claim is not None:
                return claim, _layer("/".join([*pieces[:-1], ".".join(names[:-length])]))
    return None, "" if all(piece.isdigit() for piece in pieces) else _layer(key)


def of_file(path: Path, known: Iterable[str] = ()) -> tuple[str, Claim | None]:
    """The layer and the role that a file name claims; ("", None) where it claims none.

    Args:
        known: layers that the model or other files name; the longest that the name holds whole is meant.
    """
    stem = path.name
    for suffix in path.suffixes[::-1]:
        if not re.fullmatch(r"\.[A-Za-z]\w*", suffix) or suffix[1:].lower() not in _SUFFIXES:
            break
        stem = stem[: -len(suffix)]
    found = STATISTICS.match(stem)
    if found:
        return _layer(found["layer"]), "A" if found["kind"].lower() == "mom2" else None
    for name in sorted(known, key=len, reverse=True):
        if _holds(stem, name):
            return name, _word_claim(stem.replace(name, "", 1))
    dotted = DOTTED.search(stem)
    if dotted:
        name = _bare(dotted[0])
        return _layer(name), _word_claim(stem.replace(".weight", "", 1).replace(_layer(name), "", 1))
    if stem.lower() in KEYS:
        return "", KEYS[stem.lower()]
    rest = [w for w in _words(stem) if w.lower() not in KEYS and w.lower() not in NOISE and not w.isdigit()]
    return _layer("_".join(rest)), _word_claim(stem)


def statistics_layer(path: Path) -> str:
    """The layer of a file of statistics ("fc2_float32_kfac_30.npz"), which names it plainly; "" for others."""
    found = STATISTICS.match(path.stem)
    return _layer(found["layer"]) if found else ""


def _holds(stem: str, name: str) -> bool:
    """Whether a file's name is that of a layer, with words before and after it that name no other layer."""
    if len(name) < 2 or name.isdigit() or name.lower() in {*KEYS, *NOISE}:
        return False
    at = stem.find(name)
    if at < 0:
        return False
    before, after = stem[:at], stem[at + len(name) :]
    if not all(_no_layer(word) for word in _words(before)) or before[-1:].isalnum() or before.endswith("."):
        return False
    if not after:
        return True
    if after[0].isalnum():
        return False
    return ("." in name and after[0] != ".") or all(_no_layer(word) for word in _words(after))


def _no_layer(word: str) -> bool:
    return word.lower() in {*KEYS, *NOISE}


def _words(stem: str) -> list[str]:
    return [word for word in re.split(r"[\s_.\-]+", stem) if word]


def _word_claim(text: str) -> Claim | None:
    """The first role among the words of a file's name; two words before one, no single letters."""
    words = [word.lower() for word in _words(text)]
    pairs = [f"{one}_{two}" for one, two in pairwise(words)]
    return next((KEYS[word] for word in (*pairs, *words) if len(word) > 2 and word in KEYS), None)


def _bare(name: str) -> str:
    """A dotted name without words for what is in the file: "cache_model.layers.3.mlp.down_proj_factors".

    Numbers go only behind such words ("_cache_30"): "fc_2" is a module.
    """
    words = sorted((w for w in {*KEYS, *NOISE} if len(w) > 3 and w not in MODULES), key=len, reverse=True)
    endings = "|".join([r"b?float\d+", "null_space", *map(re.escape, words)])
    last = re.compile(rf"[_.](?:{endings})(?:_(?:gamma|n)?\d+(?:\.\d+)?)*$", re.IGNORECASE)
    first = re.compile(rf"^(?:{endings})_", re.IGNORECASE)
    changed = True
    while changed:
        before = name
        name = first.sub("", last.sub("", name))
        if name.endswith(("_proj_proj", "_attn_proj", "_fc_proj")):  # a file of projections of q_proj
            name = name.removesuffix("_proj")
        changed = name != before
    return name


MODULES = {"proj", "projection", "layer", "model", "state", "data", "values", "keep", "step", "null", "space", "eigen"}
_SUFFIXES = {"npz", "npy", "pt", "pth", "bin", "safetensors", "ckpt", "pkl", "tar", "gz", "zip", "th"}


def _layer(text: str) -> str:
    for prefix in ("_orig_mod.", "module."):
        text = text.removeprefix(prefix)
    return text.removesuffix(".weight").strip("/. ")


def matched(name: str, layers: Iterable[str]) -> str | None:
    """The model's layer that a name means: itself, or the only one with the same ending."""
    layers = list(layers)
    if name in layers:
        return name
    plain = name.replace("/", ".").replace("_", ".")
    same = [layer for layer in layers if layer.replace("_", ".") == plain]
    ends = same or [layer for layer in layers if layer.endswith(f".{name}") or name.endswith(f".{layer}")]
    return ends[0] if len(ends) == 1 else None
