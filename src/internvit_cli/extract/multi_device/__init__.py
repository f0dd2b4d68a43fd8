"""Encode on several devices, each in its own process."""
