"""The engine: loop, front doors, and text of tokens."""
