"""A kernel's PTX made into Python functions.

prepare.py looks up the instructions and lays out memory, inline.py puts called functions in place,
flow.py orders the basic blocks, codegen.py and emit.py write their functions, which call
parting.py where lanes go different ways.
"""
