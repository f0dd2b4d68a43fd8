"""From uint8 tiles to features on a device."""
