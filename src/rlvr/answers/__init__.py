"""Final answers of mathematical problems: finding, reading and comparing them.

Imports no torch and nothing else of rlvr: worker processes start with it.
"""
