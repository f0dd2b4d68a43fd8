"""Text, color scales, figures and sheets with Pillow and numpy alone."""
