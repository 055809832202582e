"""A new version beside the old one: mirrored, then a canary, promoted or rolled back by a test that may be watched.

policy    what a user decides    seen     what the door counted, by version
evidence  e-processes: what the counts say, at any time and however often they are looked at
state     the rollout as a pure state machine    drive  carries it out, over two seams, and survives a crash anywhere
"""
