"""Hold the factors, masks and updates of a production run against the reference.

    python studies/crosscheck.py out/wiki_stats --model Qwen/Qwen2.5-1.5B-Instruct --data wiki.jsonl --gamma 0.9

PATH is a file or folder: the authors' factor files and projection caches, ROME/MEMIT/AlphaEdit statistics and
projectors, safetensors, curvlinops and kronfluence factors, weights before and after an edit. Which tensor is what is
decided by evidence; nothing in a file is executed. Without --model sides are told by shapes; with --model and --data
(text documents, a file as the production run used) the statistics are recomputed in every convention and compared.

Writes DIR/crosscheck.json (a list of findings), crosscheck.md, crosscheck.pdf and .png. Exit status: 0 no errors,
1 errors, 2 a file that could not be read, or an argument that makes no sense.
"""

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from curvlab.batches import Batch
from curvlab.crosscheck import Report, crosscheck
from curvlab.crosscheck.curves import curves
from curvlab.crosscheck.formats.refusal import printable
from curvlab.crosscheck.tables import as_markdown, as_text
from curvlab.curvature import KFAC
from curvlab.layers import supported_layers
from curvlab.losses import CrossEntropy
from curvlab.memory import human, peak
from curvlab.records import provenance
from curvlab.refusal import require_device
from curvlab.storage import replacing
from figures.crosscheck import draw


@dataclass(frozen=True)
class Config:
    """Command line of the study.

    Attributes:
        paths: files and folders of the production run.
        model: whose layers they are: embedded, embedded-gpt2, or a Hugging Face name or path.
        layer: look at this layer only; names the tensors where files do not.
        data: text documents (.jsonl with "text", or plain text) that the statistics were taken on.
        n_data: the first so many documents.
        max_length: tokens of a document.
        batch_size: documents of a batch of the production run; matters for statistics taken a batch at a time.
        gamma: the energy share that masks should have.
        out: folder of the report.
        quiet: print what deviates only.
        seed: of labels drawn from the model.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    model: str | None = None
    layer: str | None = None
    data: Path | None = None
    n_data: int | None = None
    max_length: int = 512
    batch_size: int = 1
    gamma: float | None = None
    out: Path = Path("results/crosscheck")
    quiet: bool = False
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0


def main(config: Config) -> int:
    started = time.perf_counter()
    try:
        _check(config)
        model, batches = _subject(config)
        report = crosscheck(
            config.paths, model=model, data=batches, layer=config.layer, gamma=config.gamma, seed=config.seed
        )
        files = _write(config, report, model, batches)
    except (ValueError, OSError, MemoryError, FloatingPointError, ImportError) as error:
        print(f"crosscheck: {error}", file=sys.stderr)
        return 2
    shown = [f for f in report.findings if not (config.quiet and f.severity == "ok")]
    lines = [f"UNREADABLE {line}" for line in report.unreadable] + [as_text(shown), ""]
    lines.append(f"{report.verdict()}; {time.perf_counter() - started:.0f} s, peak {human(peak(config.device))}")
    lines.append("report: {0}, {1}\nfigure: {3} and {2}".format(*files))
    with suppress(BrokenPipeError):  # `| head`: the report is written already
        print("\n".join(lines), flush=True)
    return report.status


def _check(config: Config) -> None:
    """What can be refused before anything is loaded."""
    missing = [str(path) for path in config.paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    if config.data is not None and config.model is None:
        raise ValueError("--data needs --model: statistics are recomputed by running the model on the data")
    if config.data is not None and not config.data.is_file():
        raise FileNotFoundError(f"--data: no such file: {config.data}")
    for name in ("n_data", "max_length", "batch_size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(config, name)}")
    if config.gamma is not None and not 0 < config.gamma < 1:
        raise ValueError(f"--gamma must lie strictly between 0 and 1, got {config.gamma}")
    config.out.mkdir(parents=True, exist_ok=True)
    require_device(config.device)


def _subject(config: Config) -> tuple[Any, list[Batch] | None]:
    """The model and the batches, where they are given."""
    if config.model is None:
        return None, None
    from curvlab.data.text import encode_documents, read_documents
    from curvlab.data.world import make_world
    from curvlab.editing.job import longest
    from curvlab.models.language import EMBEDDED, embedded_model, load_language_model

    model: Any
    if config.model in EMBEDDED:
        model, tokenizer = embedded_model(make_world("default"), EMBEDDED[config.model])
        model.to(config.device)
    else:
        model, tokenizer = load_language_model(config.model, device=config.device, dtype=config.dtype)
    if config.data is None:
        return model, None
    documents = read_documents(config.data)[: config.n_data]
    length = min(config.max_length, longest(model))
    return model, encode_documents(tokenizer, documents, max_length=length, batch_size=config.batch_size)


def _write(config: Config, report: Report, model: Any, batches: list[Batch] | None) -> list[Path]:
    """crosscheck.json, .md, .pdf and .png; the numbers behind the figure and where they come from beside them."""
    title = printable(f"Cross-check of {', '.join(map(str, config.paths))}")
    files = [config.out / name for name in ("crosscheck.json", "crosscheck.md", "curves.json", "provenance.json")]
    reference = _reference(report, model, batches, config.seed)
    drawn = [curves(part, reference.get(part.layer), config.gamma) for part in report.parts]
    origin = provenance(__file__) | {
        "paths": [str(path) for path in config.paths], "model": config.model, "data": str(config.data or ""),
        "gamma": config.gamma, "verdict": report.verdict(), "unreadable": list(report.unreadable),
    }  # fmt: skip
    texts = [
        json.dumps([f.as_json() for f in report.findings], indent=1, ensure_ascii=False, allow_nan=False),
        f"{as_markdown(report.findings, title, report.unreadable)}\n{report.verdict()}\n",
        json.dumps(drawn),
        json.dumps(origin, indent=1),
    ]
    for file, text in zip(files, texts, strict=True):
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*files[:2], *draw(drawn, config.out / "crosscheck.pdf")]


def _reference(
    report: Report, model: Any, batches: list[Batch] | None, seed: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Our factors of the layers in the report, for the overlap of subspaces."""
    if batches is None:
        return {}
    known = {layer.name for layer in supported_layers(model)}
    names = [part.layer for part in report.parts if part.layer in known]
    if not names:
        return {}
    kfac = KFAC.fit(model, CrossEntropy(), batches, names, labels="data", seed=seed)
    return {name: {"A": f.A, "S": f.S} for name, f in kfac.factors.items()}


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
