"""The operations of the network between its matrix products: plain PyTorch for any device, Triton for CUDA."""
