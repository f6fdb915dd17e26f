"""What runs the graphs: `base` has the protocols, `registry` the choice, a folder each the engines."""
