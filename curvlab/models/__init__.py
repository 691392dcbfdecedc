"""Small networks and how to train them."""

from curvlab.models.lenet import LeNet5
from curvlab.models.mlp import MLP
from curvlab.models.pretrained import pretrained_lenet
from curvlab.models.sequence import RunningMean
from curvlab.models.training import TrainingRun, pretrain

__all__ = ["MLP", "LeNet5", "RunningMean", "TrainingRun", "pretrain", "pretrained_lenet"]
