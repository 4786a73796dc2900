"""How the attention of a running model is read, and how each reading is checked."""
