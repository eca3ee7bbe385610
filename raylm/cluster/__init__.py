"""Joining or starting Ray, what the cluster holds, and the environments of its processes."""
