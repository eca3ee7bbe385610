"""From the names in the ``data`` section to documents: files, streams, rows, hub, embedded corpora."""
