"""The step's transformer in C, for CPUs with AMX: what the `amx` backend runs instead of an engine."""
