"""From a listing to a table of images with sizes and tiles: headers alone are read."""
