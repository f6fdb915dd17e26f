"""What the GPU backends share: the CUDA driver, device memory, streams and recorded graphs."""
