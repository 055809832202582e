"""The gate before a candidate: what is new must have gained, and no old domain may have lost more than was allowed.

forgetting  losses by row, and bounds of what was lost    architecture  whether two folders hold one kind of model
verdict     the gate itself: figures, and each refusal by name
"""
