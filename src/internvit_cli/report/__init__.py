"""An output as one HTML page."""
