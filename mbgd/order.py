from dataclasses import dataclass
import numpy as np
def mix(*values):
    h = 0
    for v in values:
        h = (h ^ (v & (2**64-1))) + 0x9E3779B97F4A7C15 & (2**64-1)
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & (2**64-1)
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & (2**64-1)
        h ^= h >> 31
    return h
@dataclass(frozen=True)
class Order:
    num_examples: int
    seed: int
    shuffle: bool = True
    def indices(self, epoch, start, stop):
        return self.at(epoch, np.arange(start, stop))
    def at(self, epoch, positions):
        return np.random.default_rng(mix(self.seed, epoch)).permutation(self.num_examples)[positions] if self.shuffle else positions
