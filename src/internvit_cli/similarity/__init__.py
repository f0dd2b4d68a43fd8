"""Find similar images and duplicates, and choose the space in which vectors are compared."""
