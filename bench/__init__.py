"""Measurements of `deit`, which imports none of them. README.md says how to run each."""
