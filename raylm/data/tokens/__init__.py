"""Tokenizers, and token shards on disk."""
