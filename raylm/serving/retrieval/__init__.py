"""Collections of documents: cut into passages, kept on disk, and searched by words and by meaning."""
