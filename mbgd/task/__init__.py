"""Examples → losses: the model under its objective, what of it is trained, and its buffers."""
