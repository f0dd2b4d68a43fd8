"""Write an output as one HTML page."""
