"""Report pages of runs: one static HTML file about one run of any stage, or about several side by side."""
