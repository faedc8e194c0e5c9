"""Speed beside the peers', a module for each comparison."""
