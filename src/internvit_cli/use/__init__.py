"""What features are for: computing them in memory, training on them, looking at them, finding pictures by them."""
