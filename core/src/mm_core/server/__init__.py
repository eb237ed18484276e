"""The OpenAI-compatible server: HTTP in front of an AsyncEngine. Needs the extra `mm-core[serve]`."""
