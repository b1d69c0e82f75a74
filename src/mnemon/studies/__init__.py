"""Studies that can be run again: a base recipe, variants of it, seeds, and from them results, a page and figures.

`mnemon reproduce NAME` runs one (docs/studies.md).
"""
