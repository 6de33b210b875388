"""What the clipping of an existing script does, and how it would be done right. In comes a script, which runs
unchanged; out go findings with the place of each call. On every rank the calls are watched and noted in
numbers, which travel through the process group's store: the audit starts no collective, so that nothing the
script does wrong can make it hang. What the numbers mean is judged on rank 0 alone, from what there is. May
import every room but the command line; nothing of the audit is imported unless it is asked for.
"""
