"""What goes wrong in rounds on purpose.

TriremeError
 |-- UpdateRejected     a client's update must not count; the round goes on without it
 `-- Unavailable
      `-- TooFewClients   no round comes together; what is complete stays, and it goes on when they are back
"""

from __future__ import annotations

from runtime.errors import TriremeError, Unavailable


class UpdateRejected(TriremeError):
    """The message says what is wrong with it, with figures."""


class TooFewClients(Unavailable):
    """Fewer than the minimum answered, as often as a round is tried."""
