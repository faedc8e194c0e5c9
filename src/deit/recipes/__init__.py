"""Experiments as functions: one file for each data set or paper table, one function for each experiment."""
