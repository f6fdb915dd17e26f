"""The commands: `car-run`, `car-run doctor`, `car-run serve`, `car-run verify`."""
