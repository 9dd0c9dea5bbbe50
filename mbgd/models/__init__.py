"""The models that ship: small, and of a size that follows from the data."""

from mbgd.models.cnn import CNN
from mbgd.models.gpt import GPT
from mbgd.models.linear import Linear
from mbgd.models.mlp import MLP
from mbgd.models.resnet import ResNet

__all__ = ["CNN", "GPT", "MLP", "Linear", "ResNet"]
