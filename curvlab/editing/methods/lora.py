"""LoRA by peft (AdaLoRA as in EasyEdit): low-rank updates of the attention's projections, merged at the end."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvlab.editing.job import Job, editor
from curvlab.editing.training import Sequential, Training
from curvlab.layers import TransposedLayer, find_layers


@dataclass(frozen=True)
class LoRA(Training):
    """Low-rank training (paper's settings: EasyEdit's).

    Attributes:
        variant: "adalora" or "lora".
        rank, alpha, dropout: of the low-rank updates.
        modules: names of the adapted projections; () takes q_proj and v_proj, or GPT-2's c_attn.
        orthogonality: AdaLoRA's weight on ‖PᵀP − I‖² of its factors.
    """

    epochs: int = 70
    lr: float = 5e-3
    variant: Literal["adalora", "lora"] = "adalora"
    rank: int = 8
    alpha: int = 32
    dropout: float = 0.1
    modules: tuple[str, ...] = ()
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("adalora", "lora"):
            raise ValueError(f"variant must be 'adalora' or 'lora', got {self.variant!r}")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank must be at least 1 and dropout in [0, 1), got {self.rank}, {self.dropout}")


@dataclass(frozen=True)
class SequentialLoRA(LoRA, Sequential):
    """Low-rank training in rounds, each merged before the next."""


@editor("lora", LoRA)
def lora(job: Job, options: LoRA) -> None:
    """Low-rank updates (AdaLoRA) of the attention's query and value projections, all requests together."""
    _round(job, options)


@editor("lora-seq", SequentialLoRA)
def lora_seq(job: Job, options: SequentialLoRA) -> None:
    """Low-rank updates chunk by chunk, each merged into the weights before the next."""
    for requests, seed in options.rounds(job.requests, job.seed):
        _round(job, options, requests=requests, seed=seed)


def _round(job: Job, options: LoRA, **how: Any) -> None:
    from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model

    modules = list(options.modules) or _projections(job.model)
    layers = find_layers(job.model, _patterns(modules))
    job.matrix_layers([layer.name for layer in layers])
    requests = how.get("requests", job.requests)
    common: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM, "lora_alpha": options.alpha, "lora_dropout": options.dropout,
        "target_modules": modules, "fan_in_fan_out": isinstance(layers[0], TransposedLayer),
    }  # fmt: skip
    steps = options.epochs * -(-len(requests) // options.batch_size)
    config = (
        AdaLoraConfig(**common, init_r=round(1.5 * options.rank), target_r=options.rank, total_step=steps)
        if options.variant == "adalora"
        else LoraConfig(**common, r=options.rank)
    )
    generation = copy.deepcopy(job.model.generation_config)
    adaptive = options.variant == "adalora"
    with torch.random.fork_rng():
        torch.manual_seed(how.get("seed", job.seed))  # initial factors and dropout
        wrapped: Any = get_peft_model(job.model, config)
        try:
            for name, module in wrapped.named_modules():
                if "lora_dropout" in name:
                    module.train()
            optimizer = options.optimise([p for p in wrapped.parameters() if p.requires_grad])
            taken = 0

            def allocate() -> None:
                nonlocal taken
                taken += 1
                wrapped.base_model.update_and_allocate(taken)

            job.train(
                optimizer, options, layers=[layer.name for layer in layers],
                extra=(lambda: options.orthogonality * _orthogonality(wrapped)) if adaptive else None,
                after_step=allocate if adaptive else None, **how,
            )  # fmt: skip
            wrapped.merge_and_unload()
        except BaseException:
            wrapped.unload()
            raise
        finally:
            job.model.generation_config = generation
            vars(job.model).pop("peft_config", None)


def adapted(model: nn.Module) -> list[str]:
    """Patterns of the layers that are adapted by default.

    Raises:
        ValueError: a model whose attention has none of the known projections.
    """
    return _patterns(_projections(model))


def _patterns(modules: list[str]) -> list[str]:
    return [f"*.{name}" for name in modules]


def _projections(model: nn.Module) -> list[str]:
    ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for names in (["q_proj", "v_proj"], ["c_attn"], ["query_key_value"]):
        if ends.issuperset(names):
            return names
    raise ValueError("no q_proj and v_proj, c_attn or query_key_value was found; name modules=(…) to adapt")


def _orthogonality(model: nn.Module) -> Tensor:
    """Mean ‖P Pᵀ − I‖_F over the factors (Zhang et al. 2023, eq. 4), as peft computes it."""
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=p.dtype, device=p.device)))
    return torch.stack(terms).mean()
