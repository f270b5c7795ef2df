"""The commands of `pet-pipeline`, one module each.

Every module has `add_parser`, which describes the command, and `run`, which carries it out. PyTorch is
imported inside `run`, so that `--help` and mistyped options answer at once.
"""
