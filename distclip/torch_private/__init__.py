"""The one door to what torch does not promise: its underscored names, and what its objects keep inside.

In come torch's objects (tensors, groups, modules, optimizers, scalers); out goes what they do not tell in
public, under a name that says what it is for. An entry is used as it is in torch 2.6, the oldest release that
distclip takes, and in those after it, unless its docstring says otherwise; ``tests/torch_private`` runs every
entry for real on the torch that is installed, so that another one fails there first, and by name. It imports
nothing of distclip but ``distclip.errors``, decides nothing about clipping, and talks to no other rank.
"""
