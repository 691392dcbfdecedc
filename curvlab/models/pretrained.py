"""LeNet-5 as the studies begin with it: pre-trained once a seed, then read from the cache."""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from curvlab.data import ImagePair, subset
from curvlab.models.lenet import LeNet5
from curvlab.models.training import pretrain
from curvlab.records import fingerprint
from curvlab.storage import cache_folder, load_tensors, save_tensors

ALIVE = 0.02  # share of images on which each logit is positive at first
PROBED = 200  # images that this is seen on
DRAWS = 5000  # about one in a hundred is alive


def pretrained_lenet(
    pair: ImagePair,
    *,
    seed: int,
    images: int,
    epochs: int,
    activation: Literal["relu", "tanh"] = "relu",
    relu_logits: bool = False,
) -> nn.Sequential:
    """LeNet-5 trained on the pair's first task, float32, in evaluation mode; the same weights from the same arguments.

    Args:
        pair: the data; its checksum is part of the name under which the weights are kept.
        seed: of weights, minibatches and the choice of images.
        images: how many to train on; all where the task has no more.
        epochs: on MNIST; three times as many on the embedded digits, of which there are few.
        relu_logits: end the network in a ReLU behind its last layer ("clamp"): logits below zero become zero. No
            sound classifier; a slip of published code that `studies/authors_protocol.py` measures. A logit that is
            zero on all images gets no gradient and stays so, and its class is lost: initial weights are drawn from
            `seed` again and again until each logit is positive on `ALIVE` of a few images.

    Raises:
        RuntimeError: no such draw among the first `DRAWS`.
    """
    train = pair.pretrain_train
    count = min(images, len(train))
    epochs = epochs if pair.name == "mnist" else 3 * epochs
    identity = {
        "seed": seed, "activation": activation, "images": count, "epochs": epochs, "torch": torch.__version__,
        "data": pair.provenance()["dataset_checksum"],
    } | ({"relu_logits": f"alive {ALIVE} of {PROBED}"} if relu_logits else {})  # fmt: skip
    file = cache_folder() / f"lenet5-{fingerprint(identity)}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _clamped(pair.pretrain_train.x[:PROBED], activation) if relu_logits else LeNet5(activation)
    if not file.is_file():
        if count < len(train):
            train = subset(train, count, seed)
        pretrain(model, train.x, train.y, epochs=epochs, seed=seed, progress_desc=f"pre-training, seed {seed}")
        save_tensors(file, "lenet5", model.state_dict(), {"seed": str(seed)})
    model.load_state_dict(load_tensors(file, "lenet5")[0])
    return model.eval()


@torch.no_grad()
def _clamped(x: Tensor, activation: Literal["relu", "tanh"]) -> nn.Sequential:
    """A LeNet-5 with a ReLU on its logits, none of them dead on x (N, 1, 28, 28); draws from the global generator."""
    for _ in range(DRAWS):
        model = LeNet5(activation)
        if bool(((model(x) > 0).double().mean(0) >= ALIVE).all()):
            return nn.Sequential(OrderedDict([*model.named_children(), ("clamp", nn.ReLU())]))
    raise RuntimeError(f"none of {DRAWS} draws of initial weights has all its logits positive somewhere; another seed?")
