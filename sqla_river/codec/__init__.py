"""How args become JSON and back, class by class, compiled once. ``args.py`` is its face.

Inside, imports go one way: shapes and fields, plain, containers, plan, library, records.
"""
