"""Neural-network layers of the memories; they know tensors and nothing about Hugging Face or training."""
