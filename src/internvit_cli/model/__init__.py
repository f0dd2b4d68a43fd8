"""Find, describe and read checkpoints (without torch), and define the network itself."""
