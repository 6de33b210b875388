"""What clipping costs, measured beside the others in one run: ``distclip bench``, or under torchrun
``torchrun --nproc-per-node 8 -m distclip.bench``. See ``--help``.

In come names of models and contenders; out go tables of counts and times. Imports the clipper as a user
does; nothing imports it but the command line.

Read in this order: ``shapes`` (the models), ``models`` (their gradients, placed), ``contenders`` (who clips),
``counting`` and ``timing`` (how it is measured), ``cases`` (what is measured), ``table`` (how it is shown);
``scaling`` plans for worlds that nobody has at hand.
"""
