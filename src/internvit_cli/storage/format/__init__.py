"""Define the contents of a shard, and store them in HDF5 or .npy files."""
