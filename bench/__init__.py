"""Measurements of `deit`. The package imports none of them. README.md says how to run each one."""
