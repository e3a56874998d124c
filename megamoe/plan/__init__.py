"""How a recipe runs on a cluster: arithmetic only, no torch."""
