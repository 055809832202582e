"""Kubernetes manifests from a spec, and the checks of them that need no cluster.

sizing   arithmetic: GPUs, memory, probe budgets and scaling thresholds of a spec
overlay  an overlay from a spec, of patches and jobs     render  kubectl kustomize
written  YAML that keeps texts texts
patches  what an overlay changes of the pods             jobs    builds in the cluster
storage  the model store and its cache                   scaling the autoscaler and its signals
access   keys and certificate of the pods' gateway
surroundings  namespace, gateway, monitors               parts   names that patches hang on, from k8s/
lint/    what an API server would refuse, and what it would accept and a cluster would then fail on
"""
