"""``raylm tune`` over ways to compress a model: several figures at once, and the front of what is best in some."""
