"""What a model is worth: cross-entropy, bits per byte, generation probes, reports."""
