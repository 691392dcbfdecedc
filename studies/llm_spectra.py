"""Spectra, kept shares and overlaps of K-FAC, EK-FAC and the activation covariance, layer by layer, on any causal LM.

    python studies/llm_spectra.py --preset smoke --out results/spectra

Takes K-FAC factors, EK-FAC eigenvalues and covariances of the chosen layers on capability documents, and writes
DIR/results.csv and DIR/llm_spectra.pdf/.png. `--model embedded` (the default) is a small Llama trained on a generated
world, on first use and without a network; a name or a path takes any Hugging Face model. A run that was interrupted
continues where it stopped when it is started again with the same arguments.
"""

import itertools
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro
from tqdm import tqdm

from curvlab.batches import output_width
from curvlab.capture import Batch, check_exact
from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.curvature.origin import weights_checksum
from curvlab.data.text import encode_documents, read_documents, shuffled_documents
from curvlab.data.world import make_world
from curvlab.editing import default_layers
from curvlab.editing.job import longest
from curvlab.layers import LayerShape, find_layers
from curvlab.losses import CrossEntropy
from curvlab.memory import human, peak
from curvlab.models.language import EMBEDDED, embedded_model, load_language_model
from curvlab.projector import overlap
from curvlab.records import Row, cached_rows, fingerprint, provenance, write_table
from curvlab.refusal import refuse, refuse_unusable
from curvlab.spectrum import Spectrum, log_spaced
from figures.llm_spectra import draw

METHODS = ("kfac", "ekfac", "covariance")
POINTS = 48  # of a spectrum, evenly spaced in the logarithm of the index
MLP = ("*.mlp.*_proj", "*.mlp.c_fc")  # of the embedded models: all products of their MLPs


@dataclass(frozen=True)
class Preset:
    """What the presets set; any of it can be given on the command line."""

    size: Literal["tiny", "smoke", "default"]  # of the embedded world and its model
    n_capability: int
    gammas: tuple[float, ...]


PRESETS = {
    "tiny": Preset("tiny", 12, (0.5, 0.9)),
    "smoke": Preset("smoke", 200, (0.5, 0.7, 0.9, 0.97, 0.99, 0.999)),
    "default": Preset("default", 1000, (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)),
}


@dataclass(frozen=True)
class Config:
    """Command line of the study; None means: as the preset says.

    Attributes:
        preset: tiny (for tests), smoke, default.
        out: folder of the results.
        model: embedded (a small Llama), embedded-gpt2, or a Hugging Face name or path.
        layers: names or patterns; None takes all products of the embedded models' MLPs, and of others the output
            projections at the paper's depth.
        capability: a text file (documents, see `read_documents`); None takes the world's documents, or WikiText for
            other models.
        n_capability: documents, cut at 512 tokens.
        gammas: energy shares of the null spaces.
        labels: of K-FAC and EK-FAC.
        seed: of the choice of documents and of labels drawn from the model.
        data: folder with edits/ and text/ (else CURVLAB_DATA); the embedded world mixes real facts and stories in
            if it is given.
    """

    preset: Literal["tiny", "smoke", "default"] = "default"
    out: Path = Path("results/llm_spectra")
    model: str = "embedded"
    layers: tuple[str, ...] | None = None
    capability: Path | None = None
    n_capability: int | None = None
    gammas: tuple[float, ...] | None = None
    labels: Literal["model", "data", "exact"] = "model"
    seed: int = 0
    data: Path | None = None
    device: str = "cpu"
    dtype: str = "auto"

    @property
    def embedded(self) -> bool:
        return self.model.startswith("embedded")


def resolve(config: Config) -> tuple[Config, Preset]:
    """Fill in the preset and check everything that can be checked before work begins."""
    preset = PRESETS[config.preset]
    for name in ("n_capability", "gammas"):
        if getattr(config, name) is not None:
            preset = replace(preset, **{name: getattr(config, name)})
    if not preset.gammas or any(not 0 < g < 1 for g in preset.gammas):
        refuse(f"--gammas must lie strictly between 0 and 1, got {list(preset.gammas)}")
    if preset.n_capability < 1:
        refuse("--n-capability must be positive")
    if config.embedded and config.model not in EMBEDDED:
        refuse(f"--model {config.model}: choose {', '.join(EMBEDDED)}, or a Hugging Face name or path")
    if not config.embedded and config.capability is None:
        folder = config.data or os.environ.get("CURVLAB_DATA")
        if not folder:
            refuse("give --capability FILE, or --data (or CURVLAB_DATA) for WikiText")
        config = replace(config, capability=Path(folder) / "text" / "wikitext2_valid.txt")
    if config.capability is not None and not config.capability.is_file():
        refuse(f"--capability: no such file: {config.capability}")
    refuse_unusable(config.device, config.out)
    return config, replace(preset, gammas=tuple(sorted(preset.gammas)))


@dataclass(frozen=True)
class Subject:
    """The model, the layers that are looked at, and the documents they are looked at with."""

    model: Any
    layers: tuple[LayerShape, ...]
    batches: list[Batch]
    dataset: str
    checksum: str


def prepare(config: Config, preset: Preset) -> Subject:
    """Load (or train) the model and encode the documents."""
    model: Any
    if config.capability is not None:
        read_documents(config.capability)  # what cannot be read is said before a model is loaded or trained
    if config.embedded:
        world = make_world(preset.size, data=config.data)
        model, tokenizer = embedded_model(world, EMBEDDED[config.model])
        dataset, documents = world.name, world.capability(preset.n_capability, config.seed)
    else:
        model, tokenizer = load_language_model(config.model, device=config.device, dtype=config.dtype)
    model.to(config.device)
    if config.capability is not None:
        documents = shuffled_documents(config.capability, tokenizer, config.seed)[: preset.n_capability]
        dataset = config.capability.name
    patterns = config.layers or _default_layers(config, model)
    layers = tuple(layer.shape for layer in find_layers(model, patterns))
    batches = encode_documents(tokenizer, documents, max_length=min(512, longest(model)), batch_size=32)
    if config.labels == "exact":
        check_exact(max(batch.targets.shape[1] for batch in batches), output_width(model))
    return Subject(model, layers, batches, dataset, fingerprint({"documents": documents}))


def _default_layers(config: Config, model: Any) -> list[str]:
    if not config.embedded:
        return default_layers(model)
    names = [name for name, _ in model.named_modules()]
    return [pattern for pattern in MLP if any(name.endswith(pattern.rsplit("*", 1)[1]) for name in names)]


class Fits:
    """K-FAC and EK-FAC of all layers, taken when the first layer needs them, from checkpoints where there are any."""

    def __init__(self, config: Config, subject: Subject, folder: Path) -> None:
        self.subject, self.folder = subject, folder
        self.options: dict[str, Any] = {"labels": config.labels, "seed": config.seed}
        self.arguments = (subject.model, CrossEntropy(), subject.batches, [layer.name for layer in subject.layers])

    @cached_property
    def kfac(self) -> KFAC:
        return KFAC.fit(*self.arguments, checkpoint=self.folder / "kfac.safetensors", **self.options)

    @cached_property
    def ekfac(self) -> EKFAC:
        path = self.folder / "ekfac.safetensors"
        return EKFAC.fit(*self.arguments, kfac=self.kfac, checkpoint=path, **self.options)

    def spectra(self, number: int) -> dict[str, Spectrum]:
        """Of one layer; K-FAC's inputs are the covariance's, and EK-FAC's basis is K-FAC's."""
        name = self.subject.layers[number].name
        corrected = self.ekfac.spectrum()
        own = KFAC({name: self.kfac.factors[name]}, self.kfac.labels, self.kfac.sharing)
        block = corrected.blocks[number]
        return {
            "kfac": own.spectrum(),
            "ekfac": replace(corrected, blocks=(block,)),
            "covariance": Covariance.of(own).spectrum(),
        }


def layer_rows(preset: Preset, spectra: dict[str, Spectrum]) -> list[Row]:
    """Rows of one layer: its spectra, its null spaces over γ, and how they overlap."""
    rows: list[Row] = []
    for method, spectrum in spectra.items():
        (block,) = spectrum.blocks
        energies = block.magnitudes.flatten().sort(descending=True).values
        top = float(energies[: max(1, len(energies) // 100)].sum()) / block.total
        for index in log_spaced(len(energies), POINTS):
            share = float(energies[index - 1]) / block.total
            rows.append({"record": "spectrum", "method": method, "index": index, "share": share, "top_percent": top,
                         "trace": block.total})  # fmt: skip
    for gamma in preset.gammas:
        nulls = {method: spectrum.null_space(gamma) for method, spectrum in spectra.items()}
        for method, null in nulls.items():
            rows.append({"record": "null space", "method": method, "gamma": gamma, "removed": null.removed,
                         "kept": null.kept / null.dimensions, "energy_removed": null.energy_removed})  # fmt: skip
        for one, other in itertools.permutations(nulls, 2):
            share = overlap(nulls[one], nulls[other]) if nulls[one].kept else float("nan")
            rows.append({"record": "overlap", "method": one, "other": other, "gamma": gamma, "overlap": share,
                         "by_chance": nulls[other].kept / nulls[other].dimensions})  # fmt: skip
    return rows


def summary(table: pd.DataFrame, gamma: float) -> pd.DataFrame:
    """One line a layer: energy in the top 1 % of the directions, kept share at γ, and overlaps, in %."""
    at = table[table["gamma"] == gamma]
    lines = []
    for layer, rows in table.groupby("layer", sort=False):
        line: Row = {"layer": layer}
        for method in METHODS:
            own = rows[(rows["record"] == "spectrum") & (rows["method"] == method)]
            line[f"top 1 % {method}"] = f"{100 * own['top_percent'].iloc[0]:.1f}"
        for method in METHODS:
            own = at[(at["layer"] == layer) & (at["record"] == "null space") & (at["method"] == method)]
            line[f"kept {method}"] = f"{100 * own['kept'].iloc[0]:.1f}"
        for one, other in (("ekfac", "kfac"), ("covariance", "kfac"), ("kfac", "covariance")):
            own = at[(at["layer"] == layer) & (at["record"] == "overlap") & (at["method"] == one)]
            line[f"{one} in {other}"] = f"{100 * own[own['other'] == other]['overlap'].iloc[0]:.1f}"
        lines.append(line)
    return pd.DataFrame(lines)


def main(config: Config) -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    started = time.perf_counter()
    config, preset = resolve(config)
    try:
        subject = prepare(config, preset)
    except (FileNotFoundError, ValueError, OSError) as error:
        refuse(error)
    terms = sum(int((batch.targets >= 0).sum()) for batch in subject.batches)
    positions = sum(int(batch.inputs["attention_mask"].sum()) for batch in subject.batches)
    print(
        f"{config.model}: {sum(p.numel() for p in subject.model.parameters()) / 1e6:.1f} M parameters, "
        f"{len(subject.layers)} layers; {sum(map(len, subject.batches))} documents, {positions} tokens",
        flush=True,
    )
    origin: Row = {
        "study": "llm_spectra", "model": config.model, "weights": weights_checksum(subject.model),
        "labels": config.labels, "seed": config.seed, "documents": sum(map(len, subject.batches)), "terms": terms,
        "positions": positions, "dataset": subject.dataset, "dataset_checksum": subject.checksum,
        "device": config.device, "dtype": str(next(subject.model.parameters()).dtype), "preset": config.preset,
    } | provenance(__file__)  # fmt: skip
    identity = origin | {"layers": [asdict(layer) for layer in subject.layers], "gammas": preset.gammas}
    folder = config.out / "units" / fingerprint(identity)
    fits = Fits(config, subject, folder)

    def finish(number: int) -> list[Row]:
        layer, begun = subject.layers[number], time.perf_counter()
        own = {"layer": layer.name, "number": number, "d_out": layer.d_out, "d_in": layer.d_in}
        rows = layer_rows(preset, fits.spectra(number))
        cost = {"seconds": time.perf_counter() - begun, "peak_bytes": peak(config.device)}
        return [own | row | origin | cost for row in rows]

    rows: list[Row] = []
    try:
        for number in tqdm(range(len(subject.layers)), desc="layers", disable=None):
            rows += cached_rows(folder / f"{number}.json", lambda number=number: finish(number))  # type: ignore[misc]
    except (ValueError, FloatingPointError, MemoryError, OSError) as error:
        raise SystemExit(f"stopped, finished layers are kept in {config.out}: {error}") from error
    table = pd.DataFrame(rows)
    write_table(table, config.out / "results.csv")
    files = draw(table, config.out / "llm_spectra.pdf")
    for file in folder.glob("*.safetensors"):  # the rows are safe: the sums of the passes are no longer needed
        file.unlink()

    shown = min(preset.gammas, key=lambda gamma: abs(gamma - 0.9))
    print(f"\nenergy in the top 1 % of the directions, dimensions kept at γ = {shown:g}, and overlaps there, in %")
    print(summary(table, shown).to_string(index=False))
    print(f"\n{time.perf_counter() - started:.0f} s, peak {human(peak(config.device))}")
    print(f"results: {config.out / 'results.csv'}\nfigure:  {files[1]} and {files[0]}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
