"""Facts of this machine (processor, GPU, packages), and writing its files; the standard library is enough."""
