"""What every benchmark shares: the workload, timing, facts of the machine, tables, and the command line."""
