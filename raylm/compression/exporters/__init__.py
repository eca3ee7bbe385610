"""From a compressed Hugging Face directory to what an engine runs."""
