"""What we are compared with: the published sampling loop in PyTorch, and diffusion models with a control."""
