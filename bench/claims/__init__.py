"""Tests the paper's claims on problems that are small enough for a CPU."""
