"""Which parameters there are, and what piece of the whole each rank holds.

In comes what a user passes as ``parameters``; out go named parameters, their ``Placement`` and the
``Scope`` of ranks that hold the model. Reads modules, meshes and declarations; never measures, and imports
nothing of ``planning`` or above.
"""
