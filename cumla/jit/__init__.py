"""CUDA C source to code for a GPU."""
