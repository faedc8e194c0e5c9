"""The claims of the paper, judged on problems that a CPU can hold."""
