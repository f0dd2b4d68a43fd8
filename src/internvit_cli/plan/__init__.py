"""Turn a listing into a table of images with sizes and tiles, by reading only their headers."""
