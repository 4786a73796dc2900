"""The app: a model's answers traced in a browser, and lines hidden from the model."""
