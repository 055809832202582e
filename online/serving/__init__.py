"""The seams of a rollout on what is really served: the gateway that deals requests out, and the Triton behind it.

door      GatewayDoor: the split of traffic and what was counted, over the gateway's control
versions  TritonVersions: a version beside the one that serves, proven, and in its place when it was promoted
"""

from online.serving.door import GatewayDoor
from online.serving.versions import TritonVersions

__all__ = ["GatewayDoor", "TritonVersions"]
