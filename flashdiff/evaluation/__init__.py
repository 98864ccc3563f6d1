"""How good images are: distances to a reference set, fit to their prompts, diversity, copies. `flashdiff evaluate`."""
