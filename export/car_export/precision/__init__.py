"""What half precision does to a model: the rounding of each graph, and overflow."""
