"""Contracts: whether the released sources of a library still are what the adapters rely on, without installing it."""
