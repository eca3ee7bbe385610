"""Layout-free checkpoints, where a run is stored, and the export to a Hugging Face directory."""
