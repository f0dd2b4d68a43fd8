"""Decode files into uint8 tiles, or return the reason why they cannot be; nothing here imports torch."""
