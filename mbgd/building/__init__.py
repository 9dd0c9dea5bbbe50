"""Configuration → objects. The only room that knows Hydra."""
