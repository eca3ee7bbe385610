"""Model families by Hugging Face configuration, and loading what a directory holds. Knows no parallelism."""
