"""The encoder: what a checkpoint is (no torch), how it is read, and the network itself."""
