"""distclip inside other frameworks: one module each, which imports its framework only when it is used.

In come the framework's own objects; out go its steps, clipped as ``Clipper`` does, and reports where its
logs look for them. Built on ``step`` and ``clipper``; nothing imports it but what a user imports.
"""
