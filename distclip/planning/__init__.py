"""Do all ranks mean the same, are they set alike, and are copies copies? Once, and when the world changes.

In come placements and settings; out goes a ``Plan``: what counts how often, and the group that is summed
over; or an error on every rank. The only room beside ``layout.scope`` that talks to other ranks outside of
a step; never imports ``measure`` or what is built on it.
"""
