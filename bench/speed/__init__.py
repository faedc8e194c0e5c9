"""Compares speed with other libraries, in a module for each comparison."""
