"""From files to uint8 tiles, or to the reason why not; nothing here imports torch."""
