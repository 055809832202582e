"""An update of a language model from new text that keeps what it knew: replay, KL, and a step part of the way.

recipe     what a user decides    memory  what a version keeps of its past: replayed rows, a hold-out of each domain
objective  the loss of an update    update  a version and new rows -> a candidate folder    blend  weights between two
"""
