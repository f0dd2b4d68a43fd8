"""One page that shows what an output holds: facts, a map of its images, token maps, duplicates, neighbors."""
