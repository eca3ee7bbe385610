"""The Ray Serve application, and what its routes share."""
