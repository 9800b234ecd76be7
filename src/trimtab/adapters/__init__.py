"""The maths of the layers, and where they sit in a model."""
