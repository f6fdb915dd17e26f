"""The commands: `car-run`, `car-run doctor`, `car-run verify`."""
