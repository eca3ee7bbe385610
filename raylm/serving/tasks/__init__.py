"""What the routes do with a model: generate, answer, point, classify, tag, embed."""
