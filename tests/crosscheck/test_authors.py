"""The authors' format: our factors and null spaces in it do what theirs would, and theirs become ours."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvlab.crosscheck.authors import load_authors_factors, save_authors_cache, save_authors_factors
from curvlab.crosscheck.readers import UnreadableFile, read
from curvlab.curvature import KFAC, Covariance, GaussNewton
from curvlab.curvature import kfac as kfac_module
from curvlab.losses import CrossEntropy
from curvlab.projector import NullSpace, stack
from curvlab.spectrum import Spectrum

pytestmark = pytest.mark.usefixtures("float64")

Data = list[tuple[Tensor, Tensor]]
EPS = torch.finfo(torch.float32).eps
LAYERS = ["model.0", "model.2"]


class Named(nn.Module):
    """Layers under dotted names; a loss at every position."""

    def __init__(self, width: int = 7, bias: bool = True) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(width, 6, bias), nn.Tanh(), nn.Linear(6, 4, bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


def tokens(seed: int = 0, documents: int = 5) -> tuple[Named, Data]:
    torch.manual_seed(0)
    model = Named()
    torch.manual_seed(seed)
    return model, [(torch.randn(n, 3, 7), torch.randint(4, (n, 3))) for n in (documents, 2)]


def fit(seed: int = 0, **options) -> KFAC:  # type: ignore[no-untyped-def]
    model, data = tokens(seed)
    return KFAC.fit(model, CrossEntropy(), data, LAYERS, labels="data", **options)


def by_hooks(model: nn.Module, data: Data) -> dict[str, tuple[Tensor, Tensor, int]]:
    """A = Σ a aᵀ / N_tokens, B = Σ g gᵀ / N_tokens of a sum-reduced cross-entropy, in plain loops over tokens."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        A, B, N = torch.zeros(layer.weight.shape[1:] * 2), torch.zeros(layer.weight.shape[:1] * 2), 0
        for x, y in data:
            caught: list[tuple[Tensor, Tensor]] = []
            hook = layer.register_forward_hook(lambda _, inputs, out, caught=caught: caught.append((inputs[0], out)))
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
            hook.remove()
            ((a, s),) = caught
            (g,) = torch.autograd.grad(loss, s)
            for a_t, g_t in zip(a.flatten(0, 1), g.flatten(0, 1), strict=True):
                A, B, N = A + torch.outer(a_t, a_t), B + torch.outer(g_t, g_t), N + 1
        sums[name] = (A.detach() / N, B / N, N)
    return sums


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())


def test_factor_files_are_those_the_authors_would_write(tmp_path: Path) -> None:
    model, data = tokens()
    paths = save_authors_factors(fit(), tmp_path, model="org/Model-8B", dataset="wikipedia", n=7)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        f"org_Model-8B/wikipedia_stats/{name}_float32_kfac_7.npz" for name in LAYERS
    ]
    for path, (A, B, N) in zip(paths, by_hooks(model, data).values(), strict=True):
        content = torch.load(path, weights_only=True)  # as theirs does
        assert set(content) == {"A", "B", "N"}
        assert content["N"] == N == 21
        assert type(content["N"]) is int
        assert content["A"].dtype == content["B"].dtype == torch.float32
        assert_close(content["A"], A, 4 * EPS)
        assert_close(content["B"], B, 4 * EPS)
        (stored,) = read(path)
        assert stored.format == "torch zip"
        assert set(stored.tensors) == {"A", "B"}


def test_factors_come_back(tmp_path: Path) -> None:
    kfac = fit()
    paths = save_authors_factors(kfac, tmp_path, model="m", dataset="d", n=7)
    for given in (paths, tmp_path, [tmp_path / "m"]):
        back = load_authors_factors(given)
        assert (back.labels, back.sharing) == ("data", "expand")
        assert list(back.factors) == LAYERS
        for name, own in kfac.factors.items():
            found = back.factors[name]
            assert found.layer == own.layer
            assert found.scale == own.scale
            assert_close(found.A, own.A, 4 * EPS)
            assert_close(found.S, own.S, 4 * EPS)
    again = save_authors_factors(back, tmp_path / "again", model="m", dataset="d", n=7)
    for first, second in zip(paths, again, strict=True):
        one, two = (torch.load(path, weights_only=True) for path in (first, second))
        assert_close(two["A"], one["A"], 2 * EPS)  # A N / N in float32
        assert_close(two["B"], one["B"], 2 * EPS)
        assert one["N"] == two["N"]


def test_loaded_factors_merge_as_the_authors_merge(tmp_path: Path) -> None:
    """(Σ A_i N_i) / (Σ N_i), the same for B."""
    parts = []
    for seed in (0, 1):
        model, data = tokens(seed, documents=4 + 5 * seed)
        kfac = KFAC.fit(model, CrossEntropy(), data, LAYERS, labels="data")
        save_authors_factors(kfac, tmp_path / str(seed), model="m", dataset="d", n=7)
        parts.append(load_authors_factors(tmp_path / str(seed)))
    merged = KFAC.merge(*parts)
    for name in LAYERS:
        stored = [
            torch.load(tmp_path / str(seed) / "m" / "d_stats" / f"{name}_float32_kfac_7.npz", weights_only=True)
            for seed in (0, 1)
        ]
        N = sum(content["N"] for content in stored)
        assert stored[0]["N"] != stored[1]["N"]
        assert_close(merged.factors[name].A, sum(c["A"].double() * c["N"] for c in stored) / N, 4 * EPS)
        assert_close(merged.factors[name].S, sum(c["B"].double() * c["N"] for c in stored) / N, 4 * EPS)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    arguments = {"model": "m", "dataset": "d", "n": 7}
    with pytest.raises(ValueError, match="sharing='expand'"):
        save_authors_factors(fit(sharing="reduce"), tmp_path, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias=False"):
        save_authors_factors(fit(bias=True), tmp_path, **arguments)  # type: ignore[arg-type]
    for name in ("", "..", ".hidden", "a\nb"):
        with pytest.raises(ValueError, match="model must be a name"):
            save_authors_factors(fit(), tmp_path, model=name, dataset="d", n=7)
    with pytest.raises(ValueError, match="at least 1"):
        save_authors_factors(fit(), tmp_path, model="m", dataset="d", n=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"A": torch.eye(2), "B": torch.eye(2)}, "A, B and N was expected"),
        ({"Ua": torch.eye(2), "Ub": torch.eye(2), "M": torch.ones(2, 2)}, "A, B and N was expected"),
        ({"A": torch.ones(2, 3), "B": torch.eye(2), "N": 3}, "square matrix"),
        ({"A": torch.eye(2).long(), "B": torch.eye(2), "N": 3}, "square matrix of floats"),
        ({"A": torch.eye(2), "B": torch.full((2, 2), torch.nan), "N": 3}, "not finite"),
        ({"A": torch.zeros(0, 0), "B": torch.eye(2), "N": 3}, "empty"),
        ({"A": torch.eye(2), "B": torch.eye(2), "N": 0}, "N is 0"),
        ({"A": torch.eye(2), "B": torch.eye(2), "N": 1.5}, "N is 1.5"),
        ({"A": torch.eye(2), "B": torch.eye(2), "N": float("nan")}, "N is nan"),
    ],
)
def test_other_files_are_refused(content: dict[str, object], match: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.npz")
    with pytest.raises(UnreadableFile, match=match):
        load_authors_factors(tmp_path / "a.npz")


def test_two_files_of_a_layer_are_refused(tmp_path: Path) -> None:
    for dataset in ("d", "e"):
        save_authors_factors(fit(), tmp_path, model="m", dataset=dataset, n=7)
    with pytest.raises(ValueError, match=r"second file of layer 'model\.0'"):
        load_authors_factors(tmp_path)


# Projection caches


def authors_step(cache: dict[str, Tensor], G: Tensor) -> Tensor:
    Ua, Ub, M = cache["Ua"], cache["Ub"], cache["M"]
    return Ub @ ((Ub.T @ G @ Ua) * M.T) @ Ua.T


def full(gamma: float) -> NullSpace:
    return fit().spectrum().null_space(gamma)


def compact(gamma: float) -> NullSpace:
    return full(gamma).compact()


def staircase(gamma: float) -> NullSpace:
    """Leading eigenvectors alone, from the start; they end where γ needs all."""
    gamma = min(gamma, 0.9)
    model, data = tokens()
    wide = nn.Sequential(nn.Linear(7, 60), nn.Tanh(), model)
    wide[2] = Named(60)
    factors = KFAC.fit(wide, CrossEntropy(), data, ["2.model.0"], labels="data")
    null = factors.spectrum(gamma=gamma).null_space(gamma)
    assert not null.blocks[0].basis.complete
    return null


def covariance(gamma: float) -> NullSpace:
    model, data = tokens()
    return Covariance.fit(model, CrossEntropy(), data, LAYERS).spectrum().null_space(gamma)


@pytest.mark.parametrize("gamma", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("make", [full, compact, staircase, covariance])
def test_the_authors_step_with_our_cache_is_our_projection(
    make: Callable[[float], NullSpace], gamma: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kfac_module, "LANCZOS_FROM", 40)
    monkeypatch.setattr(kfac_module, "LANCZOS_UNTIL", 0.9)
    null = make(gamma)
    written = save_authors_cache(null, tmp_path / "cache.pt", dtype=torch.float64)
    content = torch.load(written, weights_only=True)
    assert list(content) == [f"{layer.name}.weight" for layer in null.layers]
    G = {layer.name: torch.randn(layer.d_out, layer.d_in) for layer in null.layers}
    projected = null.project(G)
    for layer, block in zip(null.layers, null.blocks, strict=True):
        cache = content[f"{layer.name}.weight"]
        assert cache["Ua"].shape == (layer.d_in, layer.d_in)
        assert cache["Ub"].shape == (layer.d_out, layer.d_out)
        assert cache["M"].shape == (layer.d_in, layer.d_out)
        assert cache["M"].dtype == torch.bool
        assert int(cache["M"].sum()) == int(block.kept)
        for U in (cache["Ua"], cache["Ub"]):
            assert_close(U.T @ U, torch.eye(len(U)), 1e-13)
        step = authors_step(cache, G[layer.name])
        assert_close(step, projected[layer.name], 1e-13)
        assert float((step - G[layer.name]).norm()) > 1e-3  # something was removed


def test_caches_are_in_float32_unless_asked(tmp_path: Path) -> None:
    null = full(0.9)
    content = torch.load(save_authors_cache(null, tmp_path / "c.npz"), weights_only=True)
    G = {layer.name: torch.randn(layer.d_out, layer.d_in) for layer in null.layers}
    for name, projected in null.project(G).items():
        cache = content[f"{name}.weight"]
        assert cache["Ua"].dtype == cache["Ub"].dtype == torch.float32
        assert_close(authors_step(cache, G[name].float()), projected, 64 * EPS)
    (stored,) = read(tmp_path / "c.npz")
    assert set(stored.tensors) == {f"{name}.weight/{key}" for name in LAYERS for key in ("Ua", "Ub", "M")}


def test_null_spaces_without_that_form_are_refused(tmp_path: Path) -> None:
    model, data = tokens()
    path = tmp_path / "c.pt"
    dense = GaussNewton.fit(model, CrossEntropy(), data, "model.2").spectrum().null_space(0.9)
    with pytest.raises(ValueError, match="dense basis"):
        save_authors_cache(dense, path)
    spectrum: Spectrum = fit().spectrum()
    several = stack([spectrum.null_space(0.5), spectrum.null_space(0.9)])
    assert isinstance(several, NullSpace)
    with pytest.raises(ValueError, match="stack of runs"):
        save_authors_cache(several, path)
    with pytest.raises(ValueError, match="bias=False"):
        save_authors_cache(fit(bias=True).spectrum().null_space(0.9), path)
    with pytest.raises(ValueError, match="floating-point"):
        save_authors_cache(full(0.9), path, dtype=torch.int64)
    assert not path.exists()
