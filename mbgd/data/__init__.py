"""The datasets that ship: small, real or made on the fly, and readable without a network."""

from mbgd.data.digits import digits
from mbgd.data.fashion_mnist import fashion_mnist
from mbgd.data.huggingface import HuggingFace, huggingface, huggingface_images
from mbgd.data.image_folder import ImageFolder
from mbgd.data.images import Images
from mbgd.data.in_memory import InMemory
from mbgd.data.regression import Regression
from mbgd.data.tensors import tensors
from mbgd.data.text import text
from mbgd.data.tokens import tokens
from mbgd.data.windows import TokenWindows

__all__ = [
    "HuggingFace",
    "ImageFolder",
    "Images",
    "InMemory",
    "Regression",
    "TokenWindows",
    "digits",
    "fashion_mnist",
    "huggingface",
    "huggingface_images",
    "tensors",
    "text",
    "tokens",
]
