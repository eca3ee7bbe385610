"""``raylm doctor``: what this machine has, what of it is broken, and the remedy.

One probe a function, each giving :class:`~raylm.doctor.finding.Finding` records. Only the standard library is needed,
so that it works where packages are broken or missing (``python -m raylm.doctor``); what may hang or crash runs in a
subprocess with a time limit.
"""
