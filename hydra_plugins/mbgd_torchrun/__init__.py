"""Hydra's launcher for sweeps over runs of several workers. Found by Hydra because of the folder's name."""
