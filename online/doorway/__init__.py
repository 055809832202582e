"""The gateway with a feedback store behind it: `python -m online.doorway` is `python -m runtime.gateway` and its sink.

The gateway stands low and knows a sink, this room stands above the store and makes one; so SQLAlchemy is imported only
where feedback is taken.
"""
