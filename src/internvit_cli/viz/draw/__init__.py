"""Draw text, color scales, figures and sheets with only Pillow and numpy."""
