"""Rows to disk, in the order that makes them safe."""
