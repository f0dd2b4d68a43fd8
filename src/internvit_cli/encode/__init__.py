"""Encode uint8 tiles into features on a device."""
