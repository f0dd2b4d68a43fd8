"""Export features to other formats, merge outputs, and compare them."""
