"""Variants of training documents, made here or asked of a served model."""
