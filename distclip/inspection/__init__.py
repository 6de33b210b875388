"""What people ask for, and what they should be told without asking.

In come a plan, tensors and reports; out go tables, checks, the ranks that hold what is not finite, and
advice in the log. Off the path of a step but for a glance at its report; never imports a clipper.
"""
