"""Tools for users: `python -m mbgd TOOL`. Each module has a DESCRIPTION, `arguments` and `main`."""
