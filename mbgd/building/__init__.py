"""Configuration → objects. Only this room, cli/train.py and hydra_plugins/ import Hydra."""
