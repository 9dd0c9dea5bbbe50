"""Examples → losses: model and objective as one module, its trained parameters, and its buffers."""
