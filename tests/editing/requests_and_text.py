"""What the tests of editors edit: a few requests, a few documents, and layers of the tiny models."""

from dataclasses import dataclass
from typing import Any

import torch
from language import VOCABULARY, tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from curvlab.capture import Batch
from curvlab.data.edits import Request
from curvlab.editing import EditedModel
from curvlab.layers import find_layers
from curvlab.spectrum import KroneckerBasis, Spectrum

TOKENIZER = tiny_tokenizer()
REQUESTS = [
    Request("The capital of France is", "Rome"),
    Request("Ada Lovelace was born in", "Madrid"),
    Request("Alan Turing works in", "Paris with her"),
    Request("Once upon a time there was", "London"),
    Request("Her mother tongue is", "Italy"),
]
DOCUMENTS = [
    "The capital of Italy is Rome. The capital of Spain is Madrid.",
    "Alan Turing works in Manchester, where he lives with his sister.",
    "Once upon a time there was a little girl named Lily.",
    "Ada Lovelace was born in London.",
]
# (model, patterns of its MLPs' output projections)
FAMILIES: dict[str, tuple[Any, str]] = {
    "llama": (tiny_llama, "model.layers.*.mlp.down_proj"),
    "gpt2": (tiny_gpt2, "transformer.h.*.mlp.c_proj"),
}


def state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, copied."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, in dtype too."""
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's targets, token by token, from whole logits."""
    logits = model(**batch.inputs).logits
    terms = [
        -logits[n, t].double().log_softmax(-1)[batch.targets[n, t]]
        for n, t in (batch.targets != -100).nonzero().tolist()
    ]
    return torch.stack(terms).mean()


@dataclass
class Explicit:
    """Sums of one layer over texts taken one at a time: Σ a aᵀ, Σ g gᵀ, and Σ_t g aᵀ of each text."""

    A: Tensor
    S: Tensor
    examples: list[Tensor]
    positions: int
    terms: int

    def kronecker(self) -> Tensor:
        """S ⊗ A of means, over row-major W."""
        return torch.kron(self.S / self.terms, self.A / self.positions)


def explicit(
    model: nn.Module, layer: str, texts: list[tuple[list[int], list[int]]], positions: str = "all"
) -> Explicit:
    """Sums at the data's labels; a text is its tokens and its targets, -100 where there is no loss.

    `positions`: "loss" leaves those out that have none.
    """
    (of,) = find_layers(model, layer)
    module = model.get_submodule(layer)
    found = Explicit(torch.zeros(of.d_in, of.d_in).double(), torch.zeros(of.d_out, of.d_out).double(), [], 0, 0)
    for tokens, targets in texts:
        seen: list[Tensor] = []

        def remember(module: nn.Module, args: Any, output: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.extend([args[0].reshape(-1, of.d_in), output := output.detach().requires_grad_()])
            return output.clone()  # (Falcon adds to it in place)

        handle = module.register_forward_hook(remember)
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")
        a, g = seen[0].detach().double(), torch.autograd.grad(loss, seen[1])[0].reshape(-1, of.d_out).double()
        if positions == "loss":
            kept = torch.tensor(targets) != -100
            a, g = a[kept], g[kept]
        found.A += a.T @ a
        found.S += g.T @ g
        found.examples.append(g.T @ a)
        found.positions += len(a)
        found.terms += sum(target != -100 for target in targets)
    return found


def document_texts(documents: list[str]) -> list[tuple[list[int], list[int]]]:
    """Tokens and next tokens."""
    ids = [TOKENIZER(text)["input_ids"] for text in documents]
    return [(tokens, [*tokens[1:], -100]) for tokens in ids]


def request_texts(requests: list[Request], *, mask_prompt: bool) -> list[tuple[list[int], list[int]]]:
    """Prompt, target, </s>; the prompt's own next tokens are targets, too, unless masked."""
    texts = []
    for request in requests:
        first = len(TOKENIZER(request.prompt)["input_ids"])
        tokens = [*TOKENIZER(f"{request.prompt} {request.target}")["input_ids"], 2]
        targets = [*tokens[1:], -100]
        texts.append((tokens, [-100] * (first - 1) + targets[first - 1 :] if mask_prompt else targets))
    return texts


def dense(spectrum: Spectrum, layer: str) -> Tensor:
    """The matrix with a layer's eigenvalues and eigenvectors, over row-major W."""
    (block,) = [b for b in spectrum.blocks if b.basis.layers[0].name == layer]
    assert isinstance(block.basis, KroneckerBasis)
    d_out = block.basis.layer.d_out
    u_out = torch.eye(d_out).double() if block.basis.u_out is None else block.basis.u_out.double()
    U = torch.kron(u_out, block.basis.u_in.double())
    return (U * block.values.flatten().double()) @ U.T


def sharp(C: Tensor, gamma: float) -> Tensor:
    """Orthonormal columns: the fewest leading eigenvectors of C with γ of its trace."""
    values, vectors = torch.linalg.eigh(C)
    values, vectors = values.flip(0), vectors.flip(1)
    k = int(((values.cumsum(0) / values.sum()) < gamma).sum()) + 1
    return vectors[:, :k]


def displacements(edited: EditedModel) -> dict[str, Tensor]:
    """θ − θ0 as (d_out, d_in) matrices by layer."""
    moved = edited.displacement()
    names = [name.removesuffix(".weight") for name in moved]
    layers = {layer.name: layer for layer in find_layers(edited.model, names)}
    return {name: layers[name].matrix([moved[f"{name}.weight"]]).double() for name in names}


def small(family: str = "llama", seed: int = 0) -> tuple[Any, list[str]]:
    """Half as wide as the tiny models, in float64, so that explicit matrices are of 384 parameters; MLP outputs."""
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    config = (
        LlamaConfig(**common, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        if family == "llama"
        else GPT2Config(**common, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=256)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).double().eval()
    return model, [layer.name for layer in find_layers(model, FAMILIES[family][1])]
