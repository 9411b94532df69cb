"""Adapters for TRL."""
