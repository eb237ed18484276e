"""The shapes of the server's requests and replies (pydantic, strict)."""
