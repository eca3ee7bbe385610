"""``raylm chat``: a conversation in the terminal."""
