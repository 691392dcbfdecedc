"""The state dictionaries of curvlinops' KFACLinearOperator and EKFACLinearOperator, saved by torch.save.

A is a mean over positions (with a last column of ones where the bias is joined). S has the scale of the operator's
loss reduction: with "mean" A ⊗ S is the curvature of the mean loss, with "sum" of the sum (curvlinops 3.0.1, kfac.py).
"""

from torch import Tensor

from curvlab.crosscheck.parts import Stored

ROLES = {
    "input_covariances": "A",
    "gradient_covariances": "S",
    "input_covariances_eigenvectors": "U_in",
    "gradient_covariances_eigenvectors": "U_out",
    "corrected_eigenvalues": "eigenvalues",
}
MODEL = "model_func_state_dict"


def by_role(stored: Stored) -> Stored:
    """Keys "<module>/<role>" and the model's own weights by their names, if it is such a dictionary; else as it was."""
    if "kfac_approx" not in stored.numbers or "fisher_type" not in stored.numbers:
        return stored
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored.tensors.items():
        head, _, module = key.partition("/")
        if head == MODEL:
            tensors[module] = tensor
        elif head in ROLES and module:
            # eigenvalues of a separate weight and bias lie one level deeper, by the parameters' positions
            base, _, position = module.partition("/")
            name = f"{base}.bias" if position and tensor.dim() == 1 else base
            tensors[f"{name}/{ROLES[head]}"] = tensor
        else:
            tensors[key] = tensor
    kind = "EKFAC" if any(key.partition("/")[0] == "corrected_eigenvalues" for key in stored.tensors) else "KFAC"
    return Stored(stored.path, f"curvlinops {kind}", tensors, stored.numbers)
