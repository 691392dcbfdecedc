"""What each process of test_distributed.py runs: `torchrun … distributed_worker.py FOLDER`."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvlab import distributed
from curvlab.curvature import EKFAC, KFAC, Covariance
from curvlab.losses import CrossEntropy
from curvlab.models.sequence import RunningMean

WORDS, LAYERS = 11, ("fc1", "fc2")


def subject() -> nn.Module:
    """A causal sequence model; importing transformers would take longer than all the rest."""
    torch.manual_seed(0)
    return RunningMean([3, 6, WORDS]).double().eval()


def batches(number: int, size: int) -> list[Any]:
    """Sequences of random lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(number):
        x = torch.randn(size, 6, 3, generator=generator, dtype=torch.float64)
        mask = torch.arange(6) < torch.randint(2, 7, (size, 1), generator=generator)
        targets = torch.randint(WORDS, (size, 6), generator=generator).where(mask, -100)
        data.append((x, targets, mask))
    return data


DATA = {"many small batches": batches(9, 1), "one large batch": batches(1, 5)}


def images() -> tuple[nn.Module, list[Any]]:
    """Sizes that only one of two processes may see."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(torch.randn(1, 1, 4, 4 + i), torch.randint(2, (1,))) for i in range(3)]
    return model.double(), [(x.double(), y) for x, y in data]


def fits(distributed: bool, folder: Path | None = None) -> dict[str, Any]:
    options: dict[str, Any] = {"labels": "model", "seed": 2, "distributed": distributed}
    found: dict[str, Any] = {}
    for name, data in DATA.items():
        for kind in (KFAC, EKFAC, Covariance):
            if folder is not None:
                options["checkpoint"] = folder / f"{name}.{kind.__name__}"
            found[f"{kind.__name__}, {name}"] = kind.fit(subject(), CrossEntropy(), data, LAYERS, **options)  # type: ignore[attr-defined]
    options.pop("checkpoint", None)
    model, data = images()
    found["KFAC, images"] = KFAC.fit(model, CrossEntropy(), data, "0", **options)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    rank, world = distributed.turn()
    assert world == 2
    for name, fit in fits(True, folder).items():
        fit.save(folder / f"{name}.{rank}")
    seen = []
    model = subject()
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    KFAC.fit(model, CrossEntropy(), DATA["one large batch"], LAYERS, labels="data", distributed=True)
    (folder / f"examples.{rank}").write_text(str(sum(seen)))
    whole = DATA["one large batch"]
    for what, other, layers in (
        ("data", DATA["many small batches"][rank:], LAYERS),
        ("weights", whole, LAYERS),
        ("weights of another layer", whole, "fc2"),
    ):
        if what == "weights":
            with torch.no_grad():
                model.fc1.weight.mul_(1 + rank)
        try:
            KFAC.fit(model, CrossEntropy(), other, layers, labels="data", distributed=True)
        except ValueError as error:
            (folder / f"{what}.{rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
