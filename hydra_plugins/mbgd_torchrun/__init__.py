"""Hydra's launcher for sweeps over runs of several workers. Hydra finds it by the folder's name."""
