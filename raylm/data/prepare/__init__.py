"""The stage ``prepare``: its passes over the corpus, and the data card."""
