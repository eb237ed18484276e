"""The device side: batches to tensors, memory, encoders, forward passes, sampling."""
