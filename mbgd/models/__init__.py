"""The models that ship: small, with input and output sizes taken from the data."""

from mbgd.models.cnn import CNN
from mbgd.models.gpt import GPT
from mbgd.models.linear import Linear
from mbgd.models.mlp import MLP
from mbgd.models.resnet import ResNet

__all__ = ["CNN", "GPT", "MLP", "Linear", "ResNet"]
