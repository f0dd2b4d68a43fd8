"""Encoding and training from Python."""
