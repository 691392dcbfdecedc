"""MEND (Mitchell et al. 2022, arXiv 2110.11309): a trained network turns gradients into edits."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from filelock import FileLock

from curvlab.curvature.origin import weights_checksum
from curvlab.data.edits import Request, check_requests
from curvlab.editing.hypernetwork import Hypernetwork, hashed
from curvlab.editing.job import Job, editor, longest
from curvlab.editing.meta_draws import prompts_of, unrelated_texts
from curvlab.editing.meta_learning import MetaTraining, train_network
from curvlab.editing.rank_one import rank_one_factors
from curvlab.editing.training import Curve
from curvlab.layers import MatrixLayer, device_of
from curvlab.records import fingerprint
from curvlab.storage import cache_folder

FORMAT = 1  # raised when the same training would come out differently


@dataclass(frozen=True)
class MEND(MetaTraining):
    """Edits by a network, and how it is trained.

    Attributes:
        train_requests: what the network is trained on, none of them among the edited ones. Texts to be left alone
            are their neighbours and the capability set; neighbours about other training requests are welcome, for
            they teach that an edit is of its subject alone.
        network: a trained `Hypernetwork`, or the file of one; a file that is not there yet is written after training.
            None keeps what is trained in the cache folder.
        chunk: requests edited together; the gradients of the next chunk are of the edited model. None edits all
            together, their edits added up (as in the paper).
    """

    train_requests: Sequence[Request] = ()
    network: Hypernetwork | str | Path | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if not isinstance(self.network, (Hypernetwork, str, Path, type(None))):
            raise ValueError(f"network must be a Hypernetwork or a file, got {type(self.network).__name__}")


@editor("mend", MEND)
def mend(job: Job, options: MEND) -> None:
    """Edits that a trained network makes of the requests' gradients (MEND)."""
    encoding = options.encoding()
    encoding.check(job.tokenizer, job.requests, longest(job.model))
    layers = job.matrix_layers()
    network = find_network(job, layers, options)
    job.parameters()  # in float32 from one chunk to the next
    size = options.chunk or len(job.requests)
    for start in range(0, len(job.requests), size):
        batches = options.batches(job.tokenizer, job.requests[start : start + size])
        factors, loss = rank_one_factors(job.model, batches, layers, desc=job.desc)
        job.curves.append(Curve([loss], [0], "epochs"))
        with torch.no_grad():
            edits = network(factors)
        for layer in layers:
            W = layer.matrix()
            layer.write(W + edits[layer.name].to(W))
    job.counts["training_steps"] = network.record.get("steps", 0)


def find_network(job: Job, layers: list[MatrixLayer], options: MEND) -> Hypernetwork:
    """The network that the options give, from its file, from the cache, or trained now.

    Raises:
        ValueError: neither a network nor requests to train on; requests that are edited, too; a network of another
            model, of other layers, trained on what is edited, or otherwise than the options say.
    """
    train, network = list(options.train_requests), options.network
    file = None if network is None or isinstance(network, Hypernetwork) else Path(network).expanduser()
    if isinstance(network, Hypernetwork) or (file is not None and file.is_file() and not train):
        if train:
            raise ValueError("mend was given a trained network and train_requests: give one of them")
        found = network if isinstance(network, Hypernetwork) else Hypernetwork.load(str(file))
        found.check(layers, job.model if file is not None else None)
        _refuse_overlap(set(found.prompts.tolist()), job.requests)
        return found.to(device_of(job.model))
    if not train:
        missing = "" if file is None else f" ({file} does not exist)"
        raise ValueError(
            f"mend needs a trained network{missing}: edit(…, network=file), or train_requests=[…] to train one on, "
            "none of them among the edited requests"
        )
    check_requests(train, job.tokenizer, max_length=longest(job.model))
    options.encoding().check(job.tokenizer, train, longest(job.model))
    _refuse_overlap({hashed(prompt) for prompt in prompts_of(train)}, job.requests)
    trained: Hypernetwork = job.timed(_trained, job, layers, train, options, file)
    return trained.to(device_of(job.model))


def _trained(
    job: Job, layers: list[MatrixLayer], train: list[Request], options: MEND, file: Path | None
) -> Hypernetwork:
    """What the file (else the cache) holds, or a network trained now and written there."""
    unrelated = unrelated_texts(train, () if job.capability is None else job.capability.documents)
    key = _key(job, layers, train, unrelated, options)
    path = file or cache_folder() / "mend" / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # another process may be training it
        if not path.is_file():
            checkpoint = path.with_name(f".{key}.training.safetensors")
            network = train_network(
                job.model, job.tokenizer, layers, train, unrelated, options, seed=job.seed, checkpoint=checkpoint
            )
            network.record["key"] = key
            network.save(path)
            checkpoint.unlink(missing_ok=True)
            return network
        found = Hypernetwork.load(path)
    if found.record.get("key") != key:
        raise ValueError(
            f"{path} holds a network that was trained otherwise (other requests, options, layers, model or seed): "
            "leave train_requests out to use it, or name another file"
        )
    return found


def _key(job: Job, layers: list[MatrixLayer], train: list[Request], unrelated: list[str], options: MEND) -> str:
    """A hash of all that a trained network depends on."""
    parts = {
        "weights": weights_checksum(job.model),
        "layers": [asdict(layer.shape) for layer in layers],
        "requests": [asdict(request) for request in train],
        "tokens": [batch.inputs["input_ids"].tolist() for batch in options.batches(job.tokenizer, train)],
        "unrelated": unrelated,
        "options": {f.name: getattr(options, f.name) for f in fields(MetaTraining)},
        "seed": job.seed,
        "format": FORMAT,
    }
    return fingerprint(parts)


def _refuse_overlap(trained: set[int], requests: Sequence[Request]) -> None:
    both = [request for request in requests if any(hashed(prompt) in trained for prompt in prompts_of([request]))]
    if both:
        raise ValueError(
            f"mend's network must not be trained on what is edited: {len(both)} edited requests share a prompt or "
            f"paraphrase with the training requests, such as {both[0].prompt!r}"
        )
