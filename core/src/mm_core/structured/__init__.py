"""Structured output: grammars that answers have to follow, and which tokens they allow next.

`Grammars` compiles what requests ask for, off the engine's loop; a `Matcher` follows one answer.
"""
