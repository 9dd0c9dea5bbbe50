"""The command `mbgd`: from its words to workers that train, and from their failures to a few lines and an exit code."""
