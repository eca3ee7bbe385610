"""The whole pipeline on the embedded corpus, as a newcomer runs it: stages, server, questions and their figures."""
