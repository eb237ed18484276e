"""Helpers that several test folders share; on pytest's path as `support`."""
