"""The preflight of a cluster: one probe a node, what is between nodes, and what of it would break a run.

The probes run on the nodes (:mod:`~raylm.launcher.preflight.probe`), called by a driver on the cluster
(:mod:`~raylm.launcher.preflight.driver`), whose record :mod:`~raylm.launcher.preflight.judge` reads anywhere.
"""
