"""Kernels for decode steps, in which every sequence is one row, where they beat the libraries'."""
