"""What an experiment is on paper: its schema and YAML, the names it may use, its pictures and
the record of a run.

Needs no torch; the core (`inlay`) and the command line are built on it.
"""
