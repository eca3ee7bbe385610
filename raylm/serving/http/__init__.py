"""Requests in, answers out: bodies, keys, limits, errors, the log, and the page."""
