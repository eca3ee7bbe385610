"""What is cut out of a model, and how that is chosen."""
