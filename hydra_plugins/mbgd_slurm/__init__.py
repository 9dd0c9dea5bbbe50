"""Hydra's launcher for sweeps as SLURM job arrays. Hydra finds it by the folder's name."""
