"""One optimizer step: examples → losses → gradients → their sum → the one division, clipping and the optimizer."""
