"""Linear layers of a decode step: products of few rows, in a Triton kernel where it beats the library's."""
