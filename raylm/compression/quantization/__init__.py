"""Fewer bits for the weights of an exported graph, by nncf."""
