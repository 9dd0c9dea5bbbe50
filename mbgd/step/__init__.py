"""The sum of gradients → the update: the one division, clipping, the optimizer, and what is noticed on the way."""
