"""Benchmarks: each writes one JSON document whose numbers were measured side by side in one run."""
