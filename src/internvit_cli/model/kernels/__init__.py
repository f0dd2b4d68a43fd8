"""Implement the operations of the network between matrix products: in plain PyTorch, and in Triton for CUDA."""
