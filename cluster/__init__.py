"""What talks to a cluster's API server, through the official client.

kinds         names and places of objects            api       connection, discovery, requests
refusal       the server's refusals, turned into ours    rights    what a deployment must be allowed
apply         server-side apply of a set             diff      what an apply would change
observe       what the cluster says of a workload    problems  why its pods do not run
rollout       how far it is, and the wait            revision  applied sets, kept in the cluster
sealed        the Secrets of such a set              preflight what its pods would be refused for
packing       how a set is written down
control       the secrets that pods mount: repository control, keys of the gateway
deploy        all of it from start to end, and undo
port_forward  a local port to a pod                  load_version  a model version, loaded pod by pod
"""
