"""From the configuration to a replica's collections."""

from __future__ import annotations

from pathlib import Path

from raylm.config.stages import ServeConfig
from raylm.serving.retrieval.collection_store import CollectionStore
from raylm.serving.retrieval.encoder import open_encoder
from raylm.serving.retrieval.indexer import Indexer
from raylm.serving.retrieval.library import Library
from raylm.serving.retrieval.prepared import open_prepared
from raylm.serving.retrieval.shelf import DEFAULT

# In the run's directory: the index of serving.collection, and what clients upload.
PREPARED, UPLOADED = "prepared", "collections"


def open_library(config: ServeConfig, threads: int) -> Library:
    """The collections of a replica; indexes the prepared one where it is new or has changed."""
    serving, run = config.serving, config.run.directory
    uploaded = run / UPLOADED if serving.collections is None else Path(serving.collections).expanduser()
    prepared = None
    if serving.collection is not None:
        prepared = open_prepared(serving.collection, run / PREPARED / DEFAULT)
    encoder = open_encoder(serving.encoder, serving, threads) if serving.encoder is not None else None
    store = CollectionStore(uploaded, Indexer().write)
    return Library(store, prepared, encoder, serving.dense_weight, serving.collection_quota)
