"""Metrics as pure functions: pictures `b 3 h w` in 0..1, one number per picture, no state on disk.

Each docstring names the published source and the range of the value.
"""
