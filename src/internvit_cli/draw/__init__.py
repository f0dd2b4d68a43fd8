"""Drawing with Pillow and numpy alone: text, colour scales, figures, contact sheets, pictures in a terminal."""
