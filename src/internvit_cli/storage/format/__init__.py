"""What a shard holds, in HDF5 and in .npy files."""
