"""The command `mbgd`: starts workers that train, and turns their failures into a few lines and an exit code."""
