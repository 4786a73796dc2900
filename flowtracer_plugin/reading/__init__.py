"""How a model is watched while it runs, and how what was read is checked."""
