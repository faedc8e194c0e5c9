"""What a GPU can show: `python -m bench.gpu`."""
