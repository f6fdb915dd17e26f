"""The three stages (vqvae, var, car): losses, the loop, and what a run is recorded in."""
