"""Tools for users: `mbgd TOOL`. Each module has a DESCRIPTION, `arguments` and `main`."""
