"""The server's routes, a module a group; each module lists its own in `ROUTES`."""
