"""What is known of the parameters that are clipped together, and whether it still holds.

In comes their source, in each step anew; out go its tensors, with a plan and a measurement that describe
them as they are. It imports all that describes and measures, and the face of a strategy; never a clipper,
nor what changes gradients.
"""
