"""Layouts of other papers in the same grid, each a few lines: change one thing."""
