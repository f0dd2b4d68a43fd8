"""Resize pictures on the device with the pixels of Pillow, bit for bit, and cut them into tiles."""
