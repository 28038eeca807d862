"""Experiments on the toy world: variants of one recipe, a file for each question; ask.py runs them."""
